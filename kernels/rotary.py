"""Rotary positions: each pair of a head's components is turned by an angle that grows with the token's position."""

from __future__ import annotations

import torch
from torch import Tensor

from embedserve.kernels.norm import rms_norm


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of `position · theta^(-2i / head_dim)` for i < head_dim / 2, each float32 [tokens, head_dim / 2].

    positions is int32 [tokens]. Computed for each batch, once for all layers: 512 tokens of Qwen3 take 0.06 ms, rows
    of a table 0.03, and the table of 32,768 positions would be 16 MiB for every engine.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    angles = positions.float()[:, None] * (1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn component i of each head with component i + head_dim / 2 ("half-split", not neighbours 2i and 2i + 1).

    `y_i = x_i cos_i - x_(i+d/2) sin_i` and `y_(i+d/2) = x_(i+d/2) cos_i + x_i sin_i`. x is [tokens, heads, head_dim],
    cos and sin are those of `rotary_angles`; the result has x's shape and dtype. In float32 also for half precision,
    rounded once at the end: transformers rounds cosine and sine to x's dtype first, at position 30,000 as at any other.
    Source: Su et al. 2021 (arXiv:2104.09864); the layout of GPT-NeoX, which Llama's and Qwen's checkpoints have.
    """
    cos, sin = cos[:, None], sin[:, None]
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    # Written half by half: putting two products together with cat takes twice as long (0.61 and 0.27 ms, 512 tokens).
    low, high = turned.chunk(2, dim=-1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return turned.to(x.dtype)


def norm_rotate(qk: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotate(rms_norm(qk))`: each head's own RMSNorm, then its position, as Qwen3 does it to queries and keys.

    qk is [tokens, heads, head_dim], the queries' heads and then the keys', and may be a part of the buffer that holds
    the values too; weight is [heads, head_dim], cos and sin are those of `rotary_angles`. qk may be overwritten; the
    result has its shape and dtype, rounded after the norm, after the weight and after the turn.
    Source: Qwen3 technical report (arXiv:2505.09388).
    """
    return rotate(rms_norm(qk, weight, eps), cos, sin)
