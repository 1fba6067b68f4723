"""Attention in both directions over packed sequences: `softmax(Q Kᵀ / √head_dim) V`, each sequence on its own.

Three implementations of one signature, `(qkv, layout) -> [tokens, heads · head_dim]` with qkv
[tokens, 3, heads, head_dim] holding Q, K and V; `dispatch.py` chooses. Source: Vaswani et al. 2017 (arXiv:1706.03762).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed batch lie; the tensors are on the batch's device.

    cu_seqlens: int32 [rows + 1], the first token of each row, and the number of tokens at the end.
    rows: int32 [tokens], the row of each token. positions: int32 [tokens], its index within the row.
    max_seqlen: tokens of the longest row.
    runs: (first token, number of rows, tokens a row) of each stretch of rows of one length, on the host, in order,
        covering all tokens.
    """

    cu_seqlens: Tensor
    rows: Tensor
    positions: Tensor
    max_seqlen: int
    runs: tuple[tuple[int, int, int], ...]


# Measured: see attend_by_runs.
_SHORT = 96


def attend_by_runs(qkv: Tensor, layout: Layout) -> Tensor:
    """One dense attention a run of rows of equal length: no padding, no mask. The reference, and the CPU's path.

    As many calls as there are lengths: cheap on a CPU, where a call costs microseconds and its work milliseconds. Short
    rows go as two explicit products, which took 0.3 ms where torch's fused CPU kernel took 0.9 (512 tokens in rows of
    16, 12 heads of 32); from about 128 tokens on the fused one is faster, for it does not write the scores to memory.
    """
    tokens, _, heads, head_dim = qkv.shape
    out = qkv.new_empty(tokens, heads * head_dim)
    for start, rows, length in layout.runs:
        end = start + rows * length
        q, k, v = qkv[start:end].view(rows, length, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        if length <= _SHORT:
            states = torch.softmax((q * head_dim**-0.5) @ k.transpose(-1, -2), dim=-1) @ v
        else:
            states = F.scaled_dot_product_attention(q, k, v)
        out[start:end].view(rows, length, heads, head_dim).copy_(states.transpose(1, 2))
    return out


def attend_padded(qkv: Tensor, layout: Layout) -> Tensor:
    """One dense attention over rows padded to the longest, the padding masked: float32 and older GPUs on CUDA."""
    tokens, _, heads, head_dim = qkv.shape
    rows, positions = layout.rows.long(), layout.positions.long()
    count = layout.cu_seqlens.shape[0] - 1
    padded = qkv.new_zeros(count, layout.max_seqlen, 3, heads, head_dim)
    padded[rows, positions] = qkv
    lengths = layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]
    mask = torch.arange(layout.max_seqlen, device=qkv.device)[None, :] < lengths[:, None]
    q, k, v = padded.permute(2, 0, 3, 1, 4)
    states = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
    return states.transpose(1, 2)[rows, positions].reshape(tokens, heads * head_dim)


def attend_varlen(qkv: Tensor, layout: Layout) -> Tensor:
    """FlashAttention over the packed rows in one kernel: float16 and bfloat16 on CUDA, Ampere or newer.

    Softmax and sums are accumulated in float32. Raises RuntimeError from torch for other dtypes or devices.
    """
    # Imported here: the module warns or fails at import on builds without CUDA attention kernels.
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = qkv.unbind(1)
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    states = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest)
    assert isinstance(states, Tensor)  # a pair only with return_aux
    return states.flatten(1)
