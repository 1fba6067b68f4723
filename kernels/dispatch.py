"""Which implementation of an operation runs where: the one place of that choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embedserve.kernels.attention import Attend, attend_by_runs, attend_padded, attend_varlen
from embedserve.kernels.linear import Linear, OneDnnLinear, TorchLinear

_HALF = (torch.float16, torch.bfloat16)
# FlashAttention's kernels begin with Ampere.
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Kernels:
    """The chosen operations: attend (see `Attend`), and linear(weight, bias, activation), which prepares a weight.

    pads: whether attend pads its rows to the longest, so that a batch should hold rows of like length.
    """

    attend: Attend
    linear: Callable[[Tensor, Tensor | None, str | None], Linear]
    pads: bool = False


REFERENCE = Kernels(attend=attend_by_runs, linear=TorchLinear)


def choose(device: torch.device, dtype: torch.dtype, *, reference: bool = False) -> Kernels:
    """Return the fastest operations that device and dtype can run; `reference` overrides with plain torch."""
    if reference:
        return REFERENCE
    if device.type == "cuda":
        packed = dtype in _HALF and torch.cuda.get_device_capability(device) >= _AMPERE
        return Kernels(attend=attend_varlen if packed else attend_padded, linear=TorchLinear, pads=not packed)
    if device.type == "cpu" and dtype == torch.float32 and OneDnnLinear.available():
        return Kernels(attend=attend_by_runs, linear=OneDnnLinear)
    return REFERENCE
