"""ALiBi, attention with linear biases, in the symmetric form of encoders: `B[h, i, j] = -slope_h · |i - j|`.

What is here is the bias alone; `attention.py` and `attention_triton.py` attend with it. Source: Press et al. 2021
(arXiv:2108.12409); for both directions, Günther et al. 2023 (arXiv:2310.19923).
"""

from __future__ import annotations

import torch
from torch import Tensor


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Return the slopes of `heads` heads, float32 [heads].

    For a power of two, `2^(-8·(h+1)/heads)`. Otherwise the slopes of the next lower power c, and after them every
    second slope of 2c heads, beginning with its first, until there are enough.
    """
    power = 1 << (heads.bit_length() - 1)
    exponents = [-8 * (head + 1) / power for head in range(power)]
    exponents += [-8 * (head + 1) / (2 * power) for head in range(0, 2 * power, 2)][: heads - power]
    return torch.tensor([2.0**exponent for exponent in exponents], dtype=torch.float32, device=device)


def alibi_bias(slopes: Tensor, first: int, last: int, length: int) -> Tensor:
    """The bias of queries first to last over `length` keys, float32 [heads, last - first, length]."""
    queries = torch.arange(first, last, device=slopes.device, dtype=torch.float32)
    keys = torch.arange(length, device=slopes.device, dtype=torch.float32)
    return -slopes[:, None, None] * (queries[:, None] - keys[None, :]).abs()


def mirrored_alibi_bias(slopes: Tensor, length: int) -> Tensor:
    """The bias over keys in reversed order, `-slope_h · |i - (length - 1 - j)|`, float32 [heads, length, length].

    With the keys reversed it depends on i + j alone, so the whole matrix is a view of 2·length - 1 numbers a head,
    whose rows overlap: read it only. (In the keys' own order each row would begin one number before the last, and
    torch has no negative strides.)
    """
    distances = torch.arange(1 - length, length, device=slopes.device, dtype=torch.float32).abs()
    biases = -slopes[:, None] * distances
    return biases.as_strided((len(slopes), length, length), (2 * length - 1, 1, 1))
