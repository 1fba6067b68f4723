"""Tiles of packed rows: which row a program of a Triton kernel works on, told from cu_seqlens on the device alone.

A row of n tokens takes ⌈n / SIZE⌉ tiles. Counted exactly, their number would have to come from the lengths; instead
row r gets the tiles from `⌊cu_seqlens[r] / SIZE⌋ + r` on, which are never too few:
`⌈(b - a) / SIZE⌉ ≤ ⌊b / SIZE⌋ - ⌊a / SIZE⌋ + 1`. So the grid depends on the sizes of the tensors and on nothing that is
in them: no wait for the device, one grid for every replay of a CUDA graph, and about one idle program a row. A grid of
(tiles of the longest row) × rows, FlashAttention's, would start a million programs of 128 queries for one row of 8192
tokens among a thousand of two, 16 heads.
"""

from __future__ import annotations

import triton
import triton.language as tl


def tiles(tokens: int, rows: int, size: int) -> int:
    """How many tiles there are room for; some stay unused."""
    return tokens // size + rows


@triton.jit  # type: ignore[untyped-decorator]
def row_of_tile(cu_seqlens, rows, tile, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The last row whose tiles begin at `tile` or before, by binary search; its own tiles may end before."""
    low = 0
    high = rows - 1
    while low < high:
        middle = (low + high + 1) // 2
        if tl.load(cu_seqlens + middle) // SIZE + middle <= tile:
            low = middle
        else:
            high = middle - 1
    return low
