"""The native backend: our own packed modules, one class a family."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from embedserve.kernels import dispatch
from embedserve.models import registry
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig


class NativeBackend:
    """Runs a family's packed module with the kernels that the device offers; see `Backend`."""

    name = "native"
    pools = False

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        kernels = dispatch.choose(device, dtype)
        self.dtype = dtype
        self.cost: Literal["packed", "padded"] = "padded" if kernels.pads else "packed"
        states = torch.float32 if dtype == torch.int8 else dtype
        self._model = registry.family(config.family)(config, device, states, kernels)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """See `Backend`."""
        return self._model(batch)

    def images(self, pixels: Tensor) -> Tensor:
        """See `Backend`."""
        return self._model.images(pixels)
