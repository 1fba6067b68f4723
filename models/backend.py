"""The protocol of all backends: a packed batch in, packed token states out.

Pooling, cutting and normalising come after any of them, in the same kernel, so they cannot differ.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig


class Backend(Protocol):
    """A loaded model.

    cost: what a batch costs, for the batcher: "packed", the sum of tokens; "padded", rows times the longest.
    dtype: in which it computes; that of the constructor, unless the files have but another. int8 is that of products
        alone, for native on a CPU: states and all else are float32 then.
    pools: whether the model's own graph pools, so that hidden_states returns one vector a row, [rows, hidden].
    """

    name: str
    cost: Literal["packed", "padded"]
    dtype: torch.dtype
    pools: bool

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Read the weights onto the device. Raises CheckpointError."""

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """Return the last layer's states, [tokens, hidden], in the batch's order, in the model's dtype."""

    def images(self, pixels: Tensor) -> Tensor:
        """Return pooled states of images, [images, hidden], in the model's dtype, neither cut nor normalised.

        pixels: uint8 [images, size, size, 3] on the device. Called only where `config.images` is set, and then the
        constructor has raised CheckpointError if the files have no image tower.
        """
