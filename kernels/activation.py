"""Non-linearities of feed-forward blocks, by the names that `BertArchitecture.activation` carries."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """GELU, exact: `x · Φ(x) = x/2 · (1 + erf(x/√2))`; any shape, same dtype out.

    Source: Hendrycks and Gimpel 2016 (arXiv:1606.08415); BERT's `hidden_act: "gelu"`.
    """
    return F.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation: `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))`; any shape, same dtype out.

    Source: the same paper, section 2; `hidden_act: "gelu_new"` and `"gelu_pytorch_tanh"`.
    """
    return F.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    """`max(x, 0)`; any shape, same dtype out."""
    return F.relu(x)


def silu(x: Tensor) -> Tensor:
    """SiLU, the gate of SwiGLU: `x / (1 + e^-x)`; any shape, same dtype out. Source: arXiv:1606.08415."""
    return F.silu(x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
