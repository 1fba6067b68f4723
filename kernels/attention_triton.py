"""Attention over packed rows in one Triton kernel that writes neither scores nor a bias to memory.

    O_i = Σ_j softmax_j(⟨q_i, k_j⟩ / √head_dim - slope · |i - j|) · v_j        i, j within one row; causal: j ≤ i

FlashAttention's forward pass (Dao 2023, arXiv:2307.08691): a program has a tile of a row's queries and one head, goes
over the row's keys tile by tile, and keeps each query's running maximum, running sum and weighted values in float32.
Tiles of keys that all queries see whole take no masks; causal rows never touch those that none sees. Grouped heads read
K and V where they lie. `attention.attend_by_runs` is the reference.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. It has not
been run on a GPU yet.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedserve.kernels.attention import Layout
from embedserve.kernels.tiles_triton import row_of_tile, tiles

_LARGEST_HEAD_DIM = 256
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG2_E = tl.constexpr(1.4426950408889634)
# Of float32, on tensor cores: three products of TF32's, whose error together is of float32's size. With plain
# multiply-adds ("ieee") ptxas spills 1.9 KB a thread on Hopper for the tiles below and head_dim 128, with these 24
# bytes. Half precision does not look at it.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit  # type: ignore[untyped-decorator]
def _see(  # type: ignore[no-untyped-def]
    mixed,
    total,
    highest,
    queries,
    k,
    v,
    k_token,
    v_token,
    scale,
    slope,
    block,
    first,
    last,
    length,
    HEAD_DIM: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    WIDTH: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    CAUSAL: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
    MASKED: tl.constexpr,  # noqa: N803
):
    """Let a tile of queries see the keys from first to last of their row. k and v point at the row's first token."""
    i = block * QUERIES + tl.arange(0, QUERIES)
    j = tl.arange(0, KEYS)
    channel = tl.arange(0, WIDTH)
    k_tile = j[:, None] * k_token + channel[None, :]
    v_tile = j[:, None] * v_token + channel[None, :]
    for begin in range(first, last, KEYS):
        # 64 bits: tokens times stride may pass 2^31. Once a tile; within it 32 do.
        offset = tl.cast(begin, tl.int64)
        there = channel[None, :] < HEAD_DIM
        if MASKED:
            there = there & (begin + j[:, None] < length)
        keys = tl.load(k + offset * k_token + k_tile, mask=there, other=0.0)
        # Not scaled yet: the scale goes into the exponent, where it is one fused multiply-add with the maximum.
        scores = tl.dot(queries, tl.trans(keys), input_precision=_PRECISION)
        if ALIBI:
            # Subtracted as floats: turning integers into floats is as slow as an exponential.
            scores -= slope * tl.abs(i.to(tl.float32)[:, None] - (begin + j).to(tl.float32)[None, :])
        if MASKED:
            seen = begin + j[None, :] < length
            if CAUSAL:
                seen = seen & (begin + j[None, :] <= i[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        # Never -inf: the first tile has key 0, which every query sees.
        raised = tl.maximum(highest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - raised[:, None])
        faded = tl.exp2(highest - raised)
        total = total * faded + tl.sum(weights, 1)
        values = tl.load(v + offset * v_token + v_tile, mask=there, other=0.0)
        mixed = tl.dot(weights.to(values.dtype), values, mixed * faded[:, None], input_precision=_PRECISION)
        highest = raised
    return mixed, total, highest


# Not specialised by what changes from batch to batch, or requests would wait for the compiler after the warm-up.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["slopes", "cu_seqlens"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    slopes,
    cu_seqlens,
    rows,
    scale,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    HEAD_DIM: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    GROUPS: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
    CAUSAL: tl.constexpr,  # noqa: N803
    ALIBI: tl.constexpr,  # noqa: N803
):
    """One tile of queries of one row, in one of heads; GROUPS heads of q share one of k and v."""
    tile = tl.program_id(0)
    if CAUSAL:
        # The last tiles of a row see most: they go first, so that none of them is left to run alone at the end.
        tile = tl.num_programs(0) - 1 - tile
    head = tl.program_id(1)
    row = row_of_tile(cu_seqlens, rows, tile, QUERIES)
    begin = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - begin
    block = tile - (begin // QUERIES + row)
    if block * QUERIES >= length:
        return
    start = begin.to(tl.int64)
    i = block * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, WIDTH)
    own = (i[:, None] < length) & (channel[None, :] < HEAD_DIM)
    queries = tl.load(q + head * q_head + (start + i)[:, None] * q_token + channel[None, :], mask=own, other=0.0)
    k += start * k_token + head // GROUPS * k_head
    v += start * v_token + head // GROUPS * v_head
    exponent = scale * _LOG2_E
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) / scale

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    last = tl.minimum(length, (block + 1) * QUERIES) if CAUSAL else length
    whole = (block * QUERIES if CAUSAL else length) // KEYS * KEYS
    mixed, total, highest = _see(
        mixed, total, highest, queries, k, v, k_token, v_token, exponent, slope, block, 0, whole, length,
        HEAD_DIM, WIDTH, QUERIES, KEYS, CAUSAL, ALIBI, False,
    )  # fmt: skip
    mixed, total, highest = _see(
        mixed, total, highest, queries, k, v, k_token, v_token, exponent, slope, block, whole, last, length,
        HEAD_DIM, WIDTH, QUERIES, KEYS, CAUSAL, ALIBI, True,
    )  # fmt: skip
    states = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (start + i)[:, None] * out_token + head * HEAD_DIM + channel[None, :], states, mask=own)


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: queries of a program, keys at a time; warps of a program, stages of its loop's pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def tiles_for(max_seqlen: int, head_dim: int, dtype: torch.dtype, *, hopper: bool) -> Tiles:
    """The tiles of a batch whose longest row has max_seqlen tokens: one of four programs for each model.

    Longest rows of up to 16, 32 and 64 tokens have programs of their own, or most of a tile would lie beyond their
    ends; 16 queries a warp are the least that tensor cores take. Long rows have the 128 queries and 64 keys that
    torch's FlexAttention settled on for A100 and H100 with head_dim 128; what it has for 64 on Hopper, 128 keys and
    four warps, spills registers here. Eight warps where four would spill, and on Hopper always: two groups of four, one
    of which exponentiates while the other multiplies. By the compiler's word (ptxas of CUDA 12.8: 113 registers a
    thread for head_dim 64 on Hopper, so two programs on a multiprocessor; at most 56 bytes spilled up to head_dim 128);
    not timed yet.
    """
    longest = max(16, triton.next_power_of_2(max_seqlen))
    if dtype == torch.float32 or head_dim > 128:
        # Twice the bytes in registers and shared memory.
        size = min(longest, 16 if dtype == torch.float32 and head_dim > 128 else 32)
        return Tiles(size, size, warps=4 if size > 16 or head_dim > 128 else 2, stages=2)
    if longest <= 64:
        return Tiles(longest, longest, warps=longest // 16, stages=2)
    return Tiles(128, 64, warps=8 if hopper or head_dim > 64 else 4, stages=3)


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether warps multiply in groups of four: Hopper and the Blackwells of data centres."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10)


def attend_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool = False, slopes: Tensor | None = None
) -> Tensor:
    """See `attention.Attend`; all of it, and slopes together with causal or grouped heads as well.

    float16, bfloat16 or float32, head_dim up to 256, channels side by side; scores, softmax and sums are float32.
    Rows may be empty. Raises ValueError for anything else.
    """
    tokens, heads, head_dim = q.shape
    if k.shape != v.shape or k.shape[::2] != q.shape[::2] or heads % k.shape[1]:
        raise ValueError(
            f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}: expected [tokens, heads, head_dim] and twice"
            " [tokens, kv_heads, head_dim] with kv_heads dividing heads"
        )
    if head_dim > _LARGEST_HEAD_DIM or q.dtype not in _DTYPES:
        raise ValueError(f"head_dim {head_dim} as {q.dtype}: expected up to {_LARGEST_HEAD_DIM}, a 16- or 32-bit float")
    if any(part.stride(2) != 1 for part in (q, k, v)):
        raise ValueError("the channels of q, k and v must stand side by side in memory")
    out = q.new_empty(tokens, heads * head_dim)
    cut = tiles_for(layout.max_seqlen, head_dim, q.dtype, hopper=_hopper(q.device))
    rows = layout.cu_seqlens.shape[0] - 1
    # Triton launches on the current device. Tiles have the first axis, the only one that goes beyond 65535.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _forward[(tiles(tokens, rows, cut.queries), heads)](
            q,
            k,
            v,
            out,
            layout.cu_seqlens if slopes is None else slopes,
            layout.cu_seqlens,
            rows,
            head_dim**-0.5,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            out.stride(0),
            HEAD_DIM=head_dim,
            WIDTH=max(16, triton.next_power_of_2(head_dim)),
            GROUPS=heads // k.shape[1],
            QUERIES=cut.queries,
            KEYS=cut.keys,
            CAUSAL=causal,
            ALIBI=slopes is not None,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return out
