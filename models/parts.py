"""What families build their layers from: parameters by name → LayerNorms and linears that are ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.kernels.norm import add_layer_norm, layer_norm
from embedserve.models.weights import Parameters, Weights


@dataclass(frozen=True)
class Norm:
    """A LayerNorm with its parameters, [hidden] each. See `kernels.norm`."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """`layer_norm(x)`; any shape that ends in hidden."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """`layer_norm(x + residual)`; x may be overwritten."""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class Parts:
    """Makes parts of a checkpoint's tensors. Every method raises CheckpointError as `Weights.take` does."""

    def __init__(
        self, weights: Weights, device: torch.device, dtype: torch.dtype, kernels: Kernels, eps: float
    ) -> None:
        """eps is that of all LayerNorms."""
        self.parameters = Parameters(weights, device, dtype)
        self.kernels = kernels
        self._eps = eps

    def norm(self, name: str, width: int) -> Norm:
        """The LayerNorm `name`."""
        weight, bias = (self.parameters.tensor(f"{name}.{part}", width) for part in ("weight", "bias"))
        return Norm(weight, bias, self._eps)

    def linear(self, names: Sequence[str], out: int, inner: int, activation: str | None = None) -> Linear:
        """The linears of `names`, of equal height, stacked to one of [out, inner] with a bias."""
        rows = [out // len(names)] * len(names)
        weight = self.parameters.stacked([f"{name}.weight" for name in names], rows, inner)
        bias = self.parameters.stacked([f"{name}.bias" for name in names], rows)
        return self.kernels.linear(weight, bias, activation)
