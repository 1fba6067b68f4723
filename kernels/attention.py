"""Attention over packed sequences, each on its own: `softmax(Q Kᵀ / √head_dim + B) V`.

Several implementations of one signature, `Attend`; `dispatch.py` chooses. Source: Vaswani et al. 2017
(arXiv:1706.03762); the bias B of ALiBi: Press et al. 2021 (arXiv:2108.12409), in the symmetric form of encoders.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


class Attend(Protocol):
    """Attention of each row of a packed batch to itself."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
    ) -> Tensor:
        """Return [tokens, heads · head_dim], in the dtype of q.

        q is [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim], where kv_heads divides heads and head h
        reads K and V of head h // (heads / kv_heads); strided views will do. causal: a token sees itself and what
        stands before it. slopes: float32 [heads], then `B[h, i, j] = -slopes[h] · |i - j|`, added after the scaling.
        """
        ...


# Measured: see attend_by_runs.
_SHORT = 96
# Queries that share a bias of ALiBi: it takes heads · this · length floats instead of heads · length².
_BIASED_QUERIES = 128


def attend_by_runs(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """One dense attention a run of rows of equal length: no padding, no mask. The reference, and the CPU's path.

    As many calls as there are lengths: cheap on a CPU, where a call costs microseconds and its work milliseconds. Short
    rows go as two explicit products, which took 0.3 ms where torch's fused CPU kernel took 0.9 (512 tokens in rows of
    16, 12 heads of 32); from about 128 tokens on the fused one is faster, for it does not write the scores to memory.
    """
    tokens, heads, head_dim = q.shape
    out = q.new_empty(tokens, heads * head_dim)
    for start, rows, length in layout.runs:
        end = start + rows * length
        states = _attend_alike(
            *(part[start:end].view(rows, length, part.shape[1], head_dim).transpose(1, 2) for part in (q, k, v)),
            causal=causal,
            slopes=slopes,
        )
        out[start:end].view(rows, length, heads, head_dim).copy_(states.transpose(1, 2))
    return out


def _attend_alike(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, slopes: Tensor | None) -> Tensor:
    """Rows of one length: q [rows, heads, length, head_dim], k and v with kv_heads. Returns as q."""
    grouped = q.shape[1] != k.shape[1]
    length, head_dim = q.shape[2:]
    if length <= _SHORT and not causal and not grouped:
        scores = (q * head_dim**-0.5) @ k.transpose(-1, -2)
        if slopes is not None:
            scores += _alibi(slopes, 0, length, length)
        return torch.softmax(scores, dim=-1) @ v
    if slopes is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    if causal or grouped:
        raise ValueError("no model has ALiBi together with causal or grouped attention")
    blocks = []
    for first in range(0, length, _BIASED_QUERIES):
        last = min(first + _BIASED_QUERIES, length)
        bias = _alibi(slopes, first, last, length).to(q.dtype)
        blocks.append(F.scaled_dot_product_attention(q[:, :, first:last], k, v, attn_mask=bias))
    return torch.cat(blocks, dim=2)


def _alibi(slopes: Tensor, first: int, last: int, length: int) -> Tensor:
    """The bias of queries first to last over all keys, float32 [heads, last - first, length]."""
    queries = torch.arange(first, last, device=slopes.device, dtype=torch.float32)
    keys = torch.arange(length, device=slopes.device, dtype=torch.float32)
    return -slopes[:, None, None] * (queries[:, None] - keys[None, :]).abs()


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """One dense attention over rows padded to the longest, the padding masked: float32 and older GPUs on CUDA."""
    tokens, heads, head_dim = q.shape
    rows, positions = layout.rows.long(), layout.positions.long()
    count, longest = layout.cu_seqlens.shape[0] - 1, layout.max_seqlen

    def pad(part: Tensor) -> Tensor:
        padded = part.new_zeros(count, longest, part.shape[1], head_dim)
        padded[rows, positions] = part
        return padded.transpose(1, 2)

    lengths = layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]
    keys = torch.arange(longest, device=q.device)
    mask = (keys[None, :] < lengths[:, None])[:, None, None, :]
    if causal:
        mask = mask & (keys[None, :] <= keys[:, None])
    if slopes is not None:
        bias = _alibi(slopes, 0, longest, longest)
        mask = bias[None].masked_fill(~mask, float("-inf")).to(q.dtype)
    grouped = q.shape[1] != k.shape[1]
    states = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), attn_mask=mask, enable_gqa=grouped)
    return states.transpose(1, 2)[rows, positions].reshape(tokens, heads * head_dim)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """FlashAttention over the packed rows in one kernel: float16 and bfloat16 on CUDA, Ampere or newer.

    Softmax and sums are accumulated in float32. Raises RuntimeError from torch for other dtypes or devices, ValueError
    for slopes, which the kernel does not take.
    """
    # Imported here: the module warns or fails at import on builds without CUDA attention kernels.
    from torch.nn.attention.varlen import varlen_attn

    if slopes is not None:
        raise ValueError("torch's packed kernel has no ALiBi")
    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    window = (-1, 0) if causal else (-1, -1)
    grouped = q.shape[1] != k.shape[1]
    states = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window, enable_gqa=grouped)
    assert isinstance(states, Tensor)  # a pair only with return_aux
    return states.flatten(1)
