"""Pooling on CUDA: token states → finished vectors in one pass, which reads no token that is not needed.

    mean: p = Σ_t h_t / n      max: p_j = max_t h_tj      cls: p = h_0      last: p = h_(n-1)
    v_j = p_j for j < dimensions[row], else 0;  v / max(‖v‖₂, 1e-12);  finite = all_j |v_j| < ∞

A program has a row: it adds its tokens up in float32, cuts, normalises, checks and writes. In "mean" and "max" a row of
thousands of tokens would keep one multiprocessor busy while the others wait, so larger batches are first brought down
to one float32 sum (or maximum) for every 64 tokens of a row, by programs of their own; what the rows' programs read
then are those. `pooling.pool_and_finish` is the reference.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. It has not
been run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedserve.kernels.pooling import SMALLEST_NORM, check_pooling
from embedserve.kernels.tiles_triton import row_of_tile, tiles

# Tokens that one program adds up. Of 8192, with 1024 components in half precision, it reads 128 KB, and the row's own
# program reads 128 sums of 4 KB.
_CHUNK = 64
# A batch of so few tokens is not worth a second kernel.
_FEW = 2 * _CHUNK
# Numbers that a program holds at a time: 64 for each thread of eight warps.
_TILE = 16384
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)


@triton.jit  # type: ignore[untyped-decorator]
def _reduce(  # type: ignore[no-untyped-def]
    source,
    first,
    count,
    stride,
    column,
    HIDDEN: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    WIDTH: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    MAXIMUM: tl.constexpr,  # noqa: N803
):
    """The sum or maximum of `count` rows of source from `first` on, float32 [WIDTH]; PARTS of them at a time."""
    empty = float("-inf") if MAXIMUM else 0.0
    reduced = tl.full([PARTS, WIDTH], empty, tl.float32)
    # 64 bits: tokens times stride may pass 2^31.
    source += first.to(tl.int64) * stride
    part = tl.arange(0, PARTS)
    for begin in range(0, count, PARTS):
        there = (begin + part[:, None] < count) & (column[None, :] < HIDDEN)
        offset = (begin + part[:, None]).to(tl.int64) * stride + column[None, :]
        state = tl.load(source + offset, mask=there, other=empty).to(tl.float32)
        if MAXIMUM:
            # Maxima pass over NaN, which must be seen: as infinity it stays the largest, and is not finite either.
            reduced = tl.maximum(reduced, tl.where(state == state, state, float("inf")))
        else:
            reduced += state
    return tl.max(reduced, 0) if MAXIMUM else tl.sum(reduced, 0)


# Not specialised by what changes from batch to batch, or requests would wait for the compiler after the warm-up.
@triton.jit(do_not_specialize=["rows"], do_not_specialize_on_alignment=["cu_seqlens"])  # type: ignore[untyped-decorator]
def _chunks(  # type: ignore[no-untyped-def]
    states,
    sums,
    cu_seqlens,
    rows,
    token,
    HIDDEN: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    MAXIMUM: tl.constexpr,  # noqa: N803
):
    """One chunk of one row: its sum or maximum, written to sums [tiles, HIDDEN]."""
    tile = tl.program_id(0)
    row = row_of_tile(cu_seqlens, rows, tile, CHUNK)
    begin = tl.load(cu_seqlens + row)
    end = tl.load(cu_seqlens + row + 1)
    first = begin + (tile - (begin // CHUNK + row)) * CHUNK
    if first >= end:
        return
    column = tl.arange(0, WIDTH)
    count = tl.minimum(end - first, CHUNK)
    reduced = _reduce(states, first, count, token, column, HIDDEN, WIDTH, PARTS, MAXIMUM)
    tl.store(sums + tile.to(tl.int64) * HIDDEN + column, reduced, mask=column < HIDDEN)


@triton.jit(do_not_specialize_on_alignment=["cu_seqlens", "dimensions"])  # type: ignore[untyped-decorator]
def _finish(  # type: ignore[no-untyped-def]
    source,
    vectors,
    finite,
    cu_seqlens,
    dimensions,
    stride,
    HIDDEN: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    PARTS: tl.constexpr,  # noqa: N803
    CHUNK: tl.constexpr,  # noqa: N803
    MODE: tl.constexpr,  # noqa: N803
    CUT: tl.constexpr,  # noqa: N803
    NORMALIZE: tl.constexpr,  # noqa: N803
):
    """One row: source is states [tokens, HIDDEN] where CHUNK is 1, else what `_chunks` made of them."""
    row = tl.program_id(0)
    begin = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - begin
    column = tl.arange(0, WIDTH)
    if MODE == "cls":
        first, count = begin, tl.minimum(length, 1)
    elif MODE == "last":
        first, count = begin + tl.maximum(length - 1, 0), tl.minimum(length, 1)
    elif CHUNK == 1:
        first, count = begin, length
    else:
        first, count = begin // CHUNK + row, tl.cdiv(length, CHUNK)
    vector = _reduce(source, first, count, stride, column, HIDDEN, WIDTH, PARTS, MODE == "max")
    if MODE == "mean":
        vector /= tl.maximum(length, 1)
    kept = column < HIDDEN
    if CUT:
        kept = kept & (column < tl.load(dimensions + row))
    vector = tl.where(kept & (length > 0), vector, 0.0)
    if NORMALIZE:
        vector /= tl.maximum(tl.sqrt(tl.sum(vector * vector, 0)), _SMALLEST_NORM)
    infinite = tl.sum((tl.abs(vector) < float("inf")).to(tl.int32), 0) < WIDTH
    tl.store(vectors + row.to(tl.int64) * HIDDEN + column, vector, mask=column < HIDDEN)
    tl.store(finite + row, tl.where(infinite, 0, 1).to(tl.int8))


def pool_and_finish(
    states: Tensor, cu_seqlens: Tensor, mode: str, dimensions: Tensor | None, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    """See `pooling.Pool`; states of up to 32 bits, components side by side. Raises ValueError for others.

    One kernel for "cls", "last" and up to 128 tokens, else two. NaN comes out of "max" as infinity, and of its
    normalisation as NaN; the row is not finite either way.
    """
    check_pooling(mode)
    tokens, hidden = states.shape
    if states.dtype == torch.float64 or states.stride(1) != 1:
        raise ValueError(f"states {states.dtype}, strides {states.stride()}: expected up to 32 bits, side by side")
    rows = len(cu_seqlens) - 1
    vectors = torch.empty(rows, hidden, dtype=torch.float32, device=states.device)
    finite = torch.empty(rows, dtype=torch.bool, device=states.device)
    width = triton.next_power_of_2(hidden)
    several = {"WIDTH": width, "PARTS": max(1, _TILE // width), "num_warps": 8}
    one = {"WIDTH": width, "PARTS": 1, "num_warps": min(max(width // 256, 1), 8)}
    source, chunk = states, 1
    # Triton launches on the current device.
    with torch.cuda.device_of(states):  # type: ignore[no-untyped-call]
        if mode in ("mean", "max") and tokens > _FEW:
            chunk = _CHUNK
            source = torch.empty(tiles(tokens, rows, chunk), hidden, dtype=torch.float32, device=states.device)
            _chunks[(len(source),)](
                states,
                source,
                cu_seqlens,
                rows,
                states.stride(0),
                HIDDEN=hidden,
                CHUNK=chunk,
                MAXIMUM=mode == "max",
                **several,
            )
        _finish[(rows,)](
            source,
            vectors,
            # Triton knows truth values as bits, memory as bytes.
            finite.view(torch.int8),
            cu_seqlens,
            cu_seqlens if dimensions is None else dimensions,
            source.stride(0),
            HIDDEN=hidden,
            CHUNK=chunk,
            MODE=mode,
            CUT=dimensions is not None,
            NORMALIZE=normalize,
            **(several if mode in ("mean", "max") else one),
        )
    return vectors, finite
