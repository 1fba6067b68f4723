"""RoBERTa and XLM-RoBERTa: the encoder whose positions begin behind the padding's row; and bge-m3's two more outputs.

A text's token with index i has row `pad_token_id + 1 + i` of the position table. transformers numbers the tokens that
are not the padding's id instead; a text that holds `<pad>` as one of its tokens is counted through here.

Source: Liu et al. 2019 (arXiv:1907.11692), Conneau et al. 2020 (arXiv:1911.02116); names and shapes as transformers'
XLMRobertaModel.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.heads import Head
from embedserve.models.architecture import BertArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.config import HEADS, ModelConfig
from embedserve.models.encoder import Encoder
from embedserve.models.weights import Parameters, Weights

_PREFIXES = ("roberta.", "xlm-roberta.")
_IGNORED = (r"pooler\..*", r"embeddings\.position_ids", r"lm_head\..*")


class XlmRoberta:
    """See `registry.Family`. heads: what makes the outputs "sparse" and "colbert" of token states, where there are."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        assert isinstance(config.architecture, BertArchitecture)
        with Weights(config.weights_folder, prefixes=_PREFIXES, ignored=_IGNORED) as weights:
            self._encoder = Encoder(config.architecture, weights, device, dtype, kernels)
        width = config.hidden_size
        self.heads: Mapping[str, Head] = {
            output: _read_head(config.weights_folder, HEADS[output][0], components, width, device, dtype)
            for output, components in (("sparse", 1), ("colbert", width))
            if output in config.outputs
        }

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`."""
        return self._encoder(batch)


def _read_head(folder: Path, file: str, components: int, width: int, device: torch.device, dtype: torch.dtype) -> Head:
    with Weights(folder, file=file) as weights:
        parameters = Parameters(weights, device, dtype)
        return Head(parameters.tensor("weight", components, width), parameters.tensor("bias", components))
