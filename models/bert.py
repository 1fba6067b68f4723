"""BERT: the encoder with positions from 0 on. Source: Devlin et al. 2018 (arXiv:1810.04805)."""

from __future__ import annotations

import torch
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.models.architecture import BertArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig
from embedserve.models.encoder import Encoder
from embedserve.models.weights import Weights

_PREFIXES = ("bert.",)
# The pooler and the language-model head are trained with the encoder and not used for embeddings; position_ids is a
# buffer 0, 1, 2, … that old versions of transformers saved.
_IGNORED = (r"pooler\..*", r"embeddings\.position_ids", r"cls\..*")


class Bert:
    """See `registry.Family`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        assert isinstance(config.architecture, BertArchitecture)
        with Weights(config.weights_folder, prefixes=_PREFIXES, ignored=_IGNORED) as weights:
            self._encoder = Encoder(config.architecture, weights, device, dtype, kernels)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`."""
        return self._encoder(batch)
