"""Embedding gather and LayerNorm on CUDA, in one kernel: `layer_norm(words[id] + table[position])`.

A program has one token: it reads a row of each table and writes the normalised sum. The sum is float32 and rounded
nowhere in between; torch takes two gathers, a sum and a norm, and writes three states to memory on the way.
`embedding.embed` is the reference.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. It has not
been run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedserve.kernels.norm_triton import normalised, row_size


# Ids and positions are parts of a staging buffer: where in it may change from batch to batch, and must not ask for
# another compilation.
@triton.jit(do_not_specialize_on_alignment=["ids", "positions"])  # type: ignore[untyped-decorator]
def _embed(  # type: ignore[no-untyped-def]
    ids,
    words,
    positions,
    table,
    out,
    weight,
    bias,
    eps,
    HIDDEN: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    WIDTH: tl.constexpr,  # noqa: N803
    TABLE: tl.constexpr,  # noqa: N803
):
    """One token. Tables and out are contiguous."""
    # 64 bits: rows times hidden may pass 2^31.
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < HIDDEN
    word = tl.load(ids + token).to(tl.int64)
    state = tl.load(words + word * HIDDEN + column, mask=there, other=0.0).to(tl.float32)
    if TABLE:
        position = tl.load(positions + token).to(tl.int64)
        state += tl.load(table + position * HIDDEN + column, mask=there, other=0.0).to(tl.float32)
    state = normalised(state, weight, bias, eps, column, there, HIDDEN)
    tl.store(out + token * HIDDEN + column, state.to(out.dtype.element_ty), mask=there)


def embed(
    ids: Tensor, words: Tensor, positions: Tensor, table: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    """See `embedding.embed`. Ids and positions beyond the tables are the caller's mistake: nobody looks on the device.

    Raises ValueError for tables that are not contiguous.
    """
    hidden = words.shape[1]
    rows = words if table is None else table
    if not (words.is_contiguous() and rows.is_contiguous() and ids.is_contiguous() and positions.is_contiguous()):
        raise ValueError("the tables of an embedding, its ids and its positions must be contiguous")
    out = torch.empty(len(ids), hidden, dtype=words.dtype, device=words.device)
    # Triton launches on the current device.
    with torch.cuda.device_of(words):  # type: ignore[no-untyped-call]
        _embed[(len(ids),)](
            ids,
            words,
            positions,
            rows,
            out,
            weight,
            bias,
            eps,
            HIDDEN=hidden,
            TABLE=table is not None,
            **row_size(hidden),
        )
    return out
