"""Rotary positions of images: one half of a head's components turns with a patch's row, the other with its column."""

from __future__ import annotations

import torch
from torch import Tensor

_THETA = 10_000.0


def rotary_turns_2d(grid: int, head_dim: int, scale: float) -> Tensor:
    """The turns of an image's tokens as complex numbers of length 1, complex64 [1 + grid², head_dim / 2].

    The first is CLS, which stays as it is; then the patches, row by row. With `ω_j = 10000^(-4j / head_dim)` for
    j < head_dim / 4, the patch in row r and column c has `e^(i·scale·r·ω_j)` in its first head_dim / 4 turns and
    `e^(i·scale·c·ω_j)` in the others. head_dim is a multiple of 4.
    Source: Fang et al. 2023 (arXiv:2303.11331), EVA-02.
    """
    frequencies = _THETA ** (-torch.arange(0, head_dim // 2, 2, dtype=torch.float64) / (head_dim // 2))
    angles = scale * torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    rows = angles[:, None].expand(grid, grid, -1)
    columns = angles[None, :].expand(grid, grid, -1)
    patches = torch.cat([rows, columns], dim=-1).flatten(0, 1)
    turns = torch.cat([torch.zeros_like(patches[:1]), patches])
    return torch.polar(torch.ones_like(turns), turns).to(torch.complex64)


def rotate_neighbours(x: Tensor, turns: Tensor) -> Tensor:
    """Turn each pair of neighbouring components, 2i and 2i + 1: `(a, b) → (a cos - b sin, b cos + a sin)`.

    x is [images, tokens, heads, head_dim], turns complex64 [tokens, head_dim / 2]; the result has x's shape and dtype.
    In float32 also for half precision. Source: Su et al. 2021 (arXiv:2104.09864), the paper's own layout.
    """
    *outer, width = x.shape
    pairs = torch.view_as_complex(x.float().reshape(*outer, width // 2, 2))
    return torch.view_as_real(pairs * turns[:, None]).flatten(-2).to(x.dtype)
