"""LayerNorm, alone and after a residual sum."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`(x - mean(x)) / √(var(x) + eps) · weight + bias` over the last axis.

    x is [tokens, hidden], weight and bias are [hidden]; the result has x's shape and dtype. Mean and (biased) variance
    are accumulated in float32 also for half precision. Source: Ba, Kiros and Hinton 2016 (arXiv:1607.06450).
    """
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """`layer_norm(x + residual)`: what stands after both blocks of a post-LN layer.

    x and residual are [tokens, hidden]; x may be overwritten. Shapes, dtypes and accumulation as `layer_norm`.
    """
    return layer_norm(x.add_(residual), weight, bias, eps)
