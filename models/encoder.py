"""The encoder that BERT, RoBERTa and XLM-RoBERTa share: embeddings → post-LN layers, over packed tokens.

    h = LN(word[id] + position[offset + index] + type[0])
    each layer:  h = LN(h + attend(h Wqkv + b) Wo + b);  h = LN(h + act(h Wi + b) Wd + b)

Source: Devlin et al. 2018 (arXiv:1810.04805); parameter names and shapes as transformers' BertModel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.kernels.norm import add_layer_norm, layer_norm
from embedserve.models.architecture import BertArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.weights import Parameters, Weights


@dataclass(frozen=True)
class _Norm:
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    attention_out: Linear
    attention_norm: _Norm
    up: Linear
    down: Linear
    norm: _Norm


class Encoder:
    """Embeddings and layers, with Q, K and V fused into one matrix.

    A family is this, the names under which its tensors stand, and those of tensors that it has no use for.
    """

    def __init__(
        self,
        architecture: BertArchitecture,
        weights: Weights,
        device: torch.device,
        dtype: torch.dtype,
        kernels: Kernels,
    ) -> None:
        """Take the encoder's tensors from `weights`. Raises CheckpointError."""
        self._heads = architecture.num_heads
        self._eps = architecture.layer_norm_eps
        self._attend = kernels.attend
        width = architecture.hidden_size
        loader = _Loader(architecture, Parameters(weights, device, dtype), kernels)
        self._words = loader.parameters.tensor("embeddings.word_embeddings.weight", architecture.vocab_size, width)
        self._positions = _positions(architecture, weights).to(device, dtype)
        self._norm = loader.norm("embeddings.LayerNorm")
        self._layers = [loader.layer(index) for index in range(architecture.num_layers)]

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the last layer's states, [tokens, hidden], in the dtype of the weights."""
        hidden = F.embedding(batch.ids, self._words).add_(F.embedding(batch.layout.positions, self._positions))
        hidden = layer_norm(hidden, self._norm.weight, self._norm.bias, self._eps)
        tokens, width = hidden.shape
        heads, head_dim = self._heads, width // self._heads
        for layer in self._layers:
            q, k, v = layer.qkv(hidden).view(tokens, 3, heads, head_dim).unbind(1)
            attended = layer.attention_out(self._attend(q, k, v, batch.layout))
            hidden = add_layer_norm(attended, hidden, layer.attention_norm.weight, layer.attention_norm.bias, self._eps)
            fed = layer.down(layer.up(hidden))
            hidden = add_layer_norm(fed, hidden, layer.norm.weight, layer.norm.bias, self._eps)
        return hidden


def _positions(sizes: BertArchitecture, weights: Weights) -> Tensor:
    """The position table from a text's first token on, with the type embedding added: texts are all of type 0.

    In float32, so that half precision rounds the sum once.
    """
    width = sizes.hidden_size
    rows = weights.take("embeddings.position_embeddings.weight", (sizes.position_rows, width))
    types = weights.take("embeddings.token_type_embeddings.weight", (sizes.type_vocab_size, width))
    return rows[sizes.position_offset :].float() + types[0].float()


class _Loader:
    """Makes layers of tensors."""

    def __init__(self, architecture: BertArchitecture, parameters: Parameters, kernels: Kernels) -> None:
        self.parameters = parameters
        self._architecture, self._kernels = architecture, kernels

    def norm(self, name: str) -> _Norm:
        width = self._architecture.hidden_size
        return _Norm(self.parameters.tensor(f"{name}.weight", width), self.parameters.tensor(f"{name}.bias", width))

    def linear(self, names: list[str], out: int, inner: int, activation: str | None = None) -> Linear:
        """The linears of `names`, each [out, inner], stacked into one."""
        rows = [out] * len(names)
        weight = self.parameters.stacked([f"{name}.weight" for name in names], rows, inner)
        bias = self.parameters.stacked([f"{name}.bias" for name in names], rows)
        return self._kernels.linear(weight, bias, activation)

    def layer(self, index: int) -> _Layer:
        width, inner = self._architecture.hidden_size, self._architecture.intermediate_size
        name = f"encoder.layer.{index}"
        own = f"{name}.attention.self"
        return _Layer(
            qkv=self.linear([f"{own}.query", f"{own}.key", f"{own}.value"], width, width),
            attention_out=self.linear([f"{name}.attention.output.dense"], width, width),
            attention_norm=self.norm(f"{name}.attention.output.LayerNorm"),
            up=self.linear([f"{name}.intermediate.dense"], inner, width, self._architecture.activation),
            down=self.linear([f"{name}.output.dense"], width, inner),
            norm=self.norm(f"{name}.output.LayerNorm"),
        )
