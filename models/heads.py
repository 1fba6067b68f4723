"""bge-m3's two small layers over token states, whatever backend computed these: files → `kernels.heads.Head`."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from embedserve.kernels.heads import Head
from embedserve.models.config import HEADS, ModelConfig
from embedserve.models.weights import Parameters, Weights


def load_heads(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Mapping[str, Head]:
    """Read the heads of the outputs that `config.outputs` lists, by output. Raises CheckpointError."""
    width = config.hidden_size
    components = {"sparse": 1, "colbert": width}
    heads = {}
    for output in config.outputs:
        if output in components:
            with Weights(config.weights_folder, file=HEADS[output][0]) as weights:
                parameters = Parameters(weights, device, dtype)
                weight = parameters.tensor("weight", components[output], width)
                heads[output] = Head(weight, parameters.tensor("bias", components[output]))
    return heads
