"""Attention over packed sequences, each on its own: `softmax(Q Kᵀ / √head_dim + B) V`.

Several implementations of one signature, `Attend`; `dispatch.py` chooses. Source: Vaswani et al. 2017
(arXiv:1706.03762); B is zero, or the bias of `alibi.py`.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.kernels.alibi import alibi_bias, mirrored_alibi_bias


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


PROGRAM_LENGTHS = (16, 32, 64, 128)
"""Longest rows for which the packed kernels have programs of their own: where a model has run a batch of each, on one
device, no request waits for a compiler any more (a second or two for each program)."""


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
# Numbers of a bias of ALiBi that attend_padded makes at a time: 128 MiB in float32.
_LARGEST_BIAS = 1 << 25
# FlashAttention has the rows of a batch on an axis of its grid that ends there.
_MOST_ROWS = 65_535


def attend_by_runs(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """One dense attention a run of rows of equal length: no padding, no mask. The reference, and the CPU's path.

    As many calls as there are lengths: cheap on a CPU, where a call costs microseconds and its work milliseconds. Short
    rows go as two explicit products, which took 0.3 ms where torch's fused CPU kernel took 0.9 (512 tokens in rows of
    16, 12 heads of 32); from about 128 tokens on the fused one is faster, for it does not write the scores to memory.
    """
    _check_alibi(q, k, causal=causal, slopes=slopes)
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
    bias = None
    if slopes is not None:
        # The order of the keys is the softmax's own affair, and in the reversed one ALiBi's bias needs no memory.
        # 8192 tokens, 12 heads of 64, seconds of one core and memory: 2.9 and 80 MiB, without any bias 2.9 and 28 MiB;
        # with a bias made for 128 queries at a time 6.2 and 290 MiB, with the whole one 5.5 to 11.4 and 3.3 GiB.
        bias, k, v = mirrored_alibi_bias(slopes, length).to(q.dtype), k.flip(2), v.flip(2)
    if length <= _SHORT and not causal and not grouped:
        scores = (q * head_dim**-0.5) @ k.transpose(-1, -2)
        if bias is not None:
            scores += bias
        return torch.softmax(scores, dim=-1) @ v
    # Four axes: torch's fused kernel does not take a mask with three, and the other one writes out the scores.
    mask = None if bias is None else bias[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def attend_padded(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """One dense attention over rows padded to the longest, the padding masked: GPUs before Ampere.

    With slopes, as many queries at a time as keep the bias, [rows, heads, queries, longest], within a bound.
    """
    _check_alibi(q, k, causal=causal, slopes=slopes)
    tokens, heads, head_dim = q.shape
    rows, positions = layout.rows.long(), layout.positions.long()
    count, longest = layout.cu_seqlens.shape[0] - 1, layout.max_seqlen

    def pad(part: Tensor) -> Tensor:
        padded = part.new_zeros(count, longest, part.shape[1], head_dim)
        padded[rows, positions] = part
        return padded.transpose(1, 2)

    if (groups := heads // k.shape[1]) > 1:
        # In float32 torch's kernels that write out no scores take no groups.
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    q_padded, k_padded, v_padded = pad(q), pad(k), pad(v)
    if causal:
        # No token sees the padding behind its row, so no mask is needed, which would also keep those kernels away.
        states = F.scaled_dot_product_attention(q_padded, k_padded, v_padded, is_causal=True)
        return states.transpose(1, 2)[rows, positions].reshape(tokens, heads * head_dim)
    lengths = layout.cu_seqlens[1:] - layout.cu_seqlens[:-1]
    keys = torch.arange(longest, device=q.device)
    mask = (keys[None, :] < lengths[:, None])[:, None, None, :]
    if slopes is None:
        states = F.scaled_dot_product_attention(q_padded, k_padded, v_padded, attn_mask=mask)
    else:
        states = torch.empty_like(q_padded)
        queries = max(1, _LARGEST_BIAS // (count * heads * longest))
        for first in range(0, longest, queries):
            last = min(first + queries, longest)
            bias = alibi_bias(slopes, first, last, longest).to(q.dtype)[None].masked_fill(~mask, float("-inf"))
            states[:, :, first:last] = F.scaled_dot_product_attention(
                q_padded[:, :, first:last], k_padded, v_padded, attn_mask=bias
            )
    return states.transpose(1, 2)[rows, positions].reshape(tokens, heads * head_dim)


def attend_varlen(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """Packed rows in one kernel, in any of three dtypes: CUDA, Ampere or newer.

    torch's FlashAttention where it has all that is asked for, else ours: ALiBi, float32, a head_dim that is no multiple
    of 8, more than 65,535 rows, grouped heads before torch 2.12. Both accumulate softmax and sums in float32, and take
    empty rows. Raises RuntimeError from torch on other devices, ImportError where torch came without Triton.
    """
    _check_alibi(q, k, causal=causal, slopes=slopes)
    grouped = q.shape[1] != k.shape[1]
    if (
        slopes is not None
        or q.dtype == torch.float32
        or q.shape[2] % 8
        or len(layout.cu_seqlens) - 1 > _MOST_ROWS
        or (grouped and not _varlen_takes_groups())
    ):
        # Imported here: CPU builds of torch come without Triton.
        from embedserve.kernels.attention_triton import attend_triton

        return attend_triton(q, k, v, layout, causal=causal, slopes=slopes)
    # Imported here: the module warns or fails at import on builds without CUDA attention kernels.
    from torch.nn.attention.varlen import varlen_attn

    cu_seqlens, longest = layout.cu_seqlens, layout.max_seqlen
    options: dict[str, Any] = {"window_size": (-1, 0)} if causal else {}
    if grouped:
        options["enable_gqa"] = True
    states = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(states, Tensor)  # a pair only with return_aux
    return states.flatten(1)


@functools.cache
def _varlen_takes_groups() -> bool:
    """Whether torch's packed kernel takes grouped heads: documented from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def _check_alibi(q: Tensor, k: Tensor, *, causal: bool, slopes: Tensor | None) -> None:
    if slopes is not None and (causal or q.shape[1] != k.shape[1]):
        raise ValueError("no model has ALiBi together with causal or grouped attention")
