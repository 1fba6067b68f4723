"""The encoder that BERT, RoBERTa and XLM-RoBERTa share: embeddings → post-LN layers, over packed tokens.

    h = LN(word[id] + position[offset + index] + type[0])
    each layer:  h = LN(h + attend(h Wqkv + b) Wo + b);  h = LN(h + act(h Wi + b) Wd + b)

Source: Devlin et al. 2018 (arXiv:1810.04805); parameter names and shapes as transformers' BertModel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.models.architecture import BertArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.parts import Embedding, Norm, Parts
from embedserve.models.weights import Weights


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    attention_out: Linear
    attention_norm: Norm
    up: Linear
    down: Linear
    norm: Norm


class Encoder:
    """Embeddings and layers, with Q, K and V fused into one matrix.

    A family is this, the names under which its tensors stand, and those of tensors that it has no use for.
    """

    def __init__(
        self,
        sizes: BertArchitecture,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """Take the encoder's tensors from `weights`. Raises CheckpointError."""
        parts = Parts(weights, device, dtype, kernels, sizes.layer_norm_eps)
        self._heads = sizes.num_heads
        self._attend = kernels.attend
        words = parts.parameters.tensor("embeddings.word_embeddings.weight", sizes.vocab_size, sizes.hidden_size)
        positions = _positions(sizes, weights).to(device, dtype)
        self._embed = Embedding(words, positions, parts.norm("embeddings.LayerNorm", sizes.hidden_size))
        self._layers = [_layer(sizes, parts, f"encoder.layer.{index}") for index in range(sizes.num_layers)]

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the last layer's states, [tokens, hidden], in the dtype of the weights."""
        hidden = self._embed(batch.ids, batch.layout.positions)
        tokens, width = hidden.shape
        heads, head_dim = self._heads, width // self._heads
        for layer in self._layers:
            q, k, v = layer.qkv(hidden).view(tokens, 3, heads, head_dim).unbind(1)
            attended = layer.attention_out(self._attend(q, k, v, batch.layout))
            hidden = layer.attention_norm.of_sum(attended, hidden)
            hidden = layer.norm.of_sum(layer.down(layer.up(hidden)), hidden)
        return hidden


def _positions(sizes: BertArchitecture, weights: Weights) -> Tensor:
    """The position table from a text's first token on, with the type embedding added: texts are all of type 0.

    In float32, so that half precision rounds the sum once.
    """
    width = sizes.hidden_size
    rows = weights.take("embeddings.position_embeddings.weight", (sizes.position_rows, width))
    types = weights.take("embeddings.token_type_embeddings.weight", (sizes.type_vocab_size, width))
    return rows[sizes.position_offset :].float() + types[0].float()


def _layer(sizes: BertArchitecture, parts: Parts, name: str) -> _Layer:
    width, inner = sizes.hidden_size, sizes.intermediate_size
    return _Layer(
        qkv=parts.linear([f"{name}.attention.self.{part}" for part in ("query", "key", "value")], 3 * width, width),
        attention_out=parts.linear([f"{name}.attention.output.dense"], width, width),
        attention_norm=parts.norm(f"{name}.attention.output.LayerNorm", width),
        up=parts.linear([f"{name}.intermediate.dense"], inner, width, sizes.activation),
        down=parts.linear([f"{name}.output.dense"], width, inner),
        norm=parts.norm(f"{name}.output.LayerNorm", width),
    )
