"""What families build their layers from: parameters by name → embeddings, norms and linears that are ready to run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.models.weights import Parameters, Weights


@dataclass(frozen=True)
class Norm:
    """A LayerNorm with its parameters, [hidden] each. See `kernels.norm`."""

    kernels: Kernels
    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """`layer_norm(x)`."""
        return self.kernels.layer_norm(x, self.weight, self.bias, self.eps)

    def of_sum(self, x: Tensor, residual: Tensor) -> Tensor:
        """`layer_norm(x + residual)`; x may be overwritten."""
        return self.kernels.add_layer_norm(x, residual, self.weight, self.bias, self.eps)


@dataclass(frozen=True)
class RmsNorm:
    """An RMSNorm with its weight, [hidden]. See `kernels.norm`."""

    kernels: Kernels
    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """`rms_norm(x)`."""
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> Tensor:
        """`residual += x`, then `rms_norm(residual)`; x may be overwritten."""
        return self.kernels.add_rms_norm(x, residual, self.weight, self.eps)


@dataclass(frozen=True)
class Embedding:
    """The tables of an encoder and the LayerNorm of their sum. See `kernels.embedding`."""

    words: Tensor
    positions: Tensor | None
    norm: Norm

    def __call__(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The first states, [tokens, hidden], of int32 [tokens] each."""
        norm = self.norm
        return norm.kernels.embed(ids, self.words, positions, self.positions, norm.weight, norm.bias, norm.eps)


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
        return Norm(self.kernels, weight, bias, self._eps)

    def linear(self, names: Sequence[str], out: int, inner: int, activation: str | None = None) -> Linear:
        """The linears of `names`, of equal height, stacked to one of [out, inner] with a bias."""
        return self.kernels.linear(*self.stacked(names, out, inner), activation)

    def stacked(self, names: Sequence[str], out: int, inner: int) -> tuple[Tensor, Tensor]:
        """Weight [out, inner] and bias [out] of the linears of `names`, of equal height, one below the other."""
        rows = [out // len(names)] * len(names)
        weight = self.parameters.stacked([f"{name}.weight" for name in names], rows, inner)
        bias = self.parameters.stacked([f"{name}.bias" for name in names], rows)
        return weight, bias
