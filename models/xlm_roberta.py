"""RoBERTa and XLM-RoBERTa: the encoder whose positions begin behind the padding's row.

A text's token with index i has row `pad_token_id + 1 + i` of the position table. transformers numbers the tokens that
are not the padding's id instead; a text that holds `<pad>` as one of its tokens is counted through here.

Source: Liu et al. 2019 (arXiv:1907.11692), Conneau et al. 2020 (arXiv:1911.02116); names and shapes as transformers'
XLMRobertaModel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.models.architecture import BertArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig
from embedserve.models.encoder import Encoder
from embedserve.models.weights import Weights

_PREFIXES = ("roberta.", "xlm-roberta.")
_IGNORED = (r"pooler\..*", r"embeddings\.position_ids", r"lm_head\..*")


class XlmRoberta:
    """See `registry.Family`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        assert isinstance(config.architecture, BertArchitecture)
        with Weights(config.weights_folder, prefixes=_PREFIXES, ignored=_IGNORED) as weights:
            self._encoder = Encoder(config.architecture, weights, device, dtype, kernels)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`."""
        return self._encoder(batch)
