"""`y = act(x Wᵀ + b)`: a matrix product with the non-linearity that follows it."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.kernels.activation import ACTIVATIONS


class Linear(Protocol):
    """A weight that is ready to be multiplied with: x [tokens, in] -> [tokens, out], in x's dtype."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return `act(x Wᵀ + b)`."""


class TorchLinear:
    """The reference: whatever torch makes of `F.linear`; any device and dtype.

    weight is [out, in], bias [out] or None; activation is a key of `ACTIVATIONS` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias
        self._activation = ACTIVATIONS[activation] if activation is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        y = F.linear(x, self._weight, self._bias)
        return y if self._activation is None else self._activation(y)


class OneDnnLinear:
    """float32 and bfloat16 on the CPU through oneDNN: the weight is brought into its blocked layout once, and the
    activation is fused.

    torch's own `F.linear` calls MKL, which on an AVX-512 EPYC reached 200 GFLOP/s at 512 tokens and 115 at 16, where
    this one reached 450 and 290 (two threads, MiniLM's shapes). bfloat16 takes half of float32's time on CPUs that
    multiply it in hardware (AVX512_BF16, AMX): 0.70 ms where float32 took 1.40, 512 tokens, 1536 to 384.
    Accumulates in float32. oneDNN's GELU is the erf form (a polynomial of it, within 1e-6 of the exact value).

    The operations are torch's own, those that its compiler emits for the CPU; `available` says whether they are there.
    """

    _FUSED = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"), "relu": ("relu", "")}  # noqa: RUF012 (a table, never written)

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        self._fused, self._algorithm = self._FUSED[activation]
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, self._fused, [], self._algorithm)
        return y

    @staticmethod
    def available() -> bool:
        """Whether this build of torch has oneDNN and the two operations."""
        onednn: Any = torch.backends.mkldnn
        return bool(onednn.is_available()) and all(
            hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight")
        )
