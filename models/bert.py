"""BERT: embeddings → post-LN layers, over packed tokens.

    h = LN(word[id] + position[pos] + type[0])
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
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig
from embedserve.models.weights import Weights

_PREFIXES = ("bert.",)
# The pooler and the language-model head are trained with the encoder and not used for embeddings; position_ids is a
# buffer 0, 1, 2, … that old versions of transformers saved.
_IGNORED = (r"pooler\..*", r"embeddings\.position_ids", r"cls\..*")


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


class Bert:
    """A BERT encoder whose Q, K and V weights are one matrix. See `registry.Family`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        self._heads = config.num_heads
        self._eps = config.layer_norm_eps
        self._attend = kernels.attend
        with Weights(config.weights_folder, prefixes=_PREFIXES, ignored=_IGNORED) as weights:
            loader = _Loader(config, weights, device, dtype, kernels)
            self._words = loader.take("embeddings.word_embeddings.weight", config.vocab_size, config.hidden_size)
            self._positions = loader.positions()
            self._norm = loader.norm("embeddings.LayerNorm")
            self._layers = [loader.layer(index) for index in range(config.num_layers)]
            weights.finish()

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`."""
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


class _Loader:
    """Takes a layer's tensors, fuses what is computed together, and brings it to device and dtype."""

    def __init__(
        self, config: ModelConfig, weights: Weights, device: torch.device, dtype: torch.dtype, kernels: Kernels
    ) -> None:
        self._config, self._weights, self._kernels = config, weights, kernels
        self._device, self._dtype = device, dtype

    def take(self, name: str, *shape: int) -> Tensor:
        return self._weights.take(name, shape).to(self._device, self._dtype)

    def positions(self) -> Tensor:
        """Position embeddings with the type embedding added: only type 0 occurs in embedding requests."""
        config = self._config
        positions = self._weights.take(
            "embeddings.position_embeddings.weight", (config.max_positions, config.hidden_size)
        )
        types = self._weights.take(
            "embeddings.token_type_embeddings.weight", (config.type_vocab_size, config.hidden_size)
        )
        # In float32 before the cast, so that half precision rounds the sum once.
        return (positions.float() + types[0].float()).to(self._device, self._dtype)

    def norm(self, name: str) -> _Norm:
        width = self._config.hidden_size
        return _Norm(self.take(f"{name}.weight", width), self.take(f"{name}.bias", width))

    def linear(self, names: list[str], out: int, inner: int, activation: str | None = None) -> Linear:
        """The linears of `names`, each [out, inner], stacked into one."""
        weight = torch.cat([self.take(f"{name}.weight", out, inner) for name in names])
        bias = torch.cat([self.take(f"{name}.bias", out) for name in names])
        return self._kernels.linear(weight, bias, activation)

    def layer(self, index: int) -> _Layer:
        width, inner = self._config.hidden_size, self._config.intermediate_size
        name = f"encoder.layer.{index}"
        own = f"{name}.attention.self"
        return _Layer(
            qkv=self.linear([f"{own}.query", f"{own}.key", f"{own}.value"], width, width),
            attention_out=self.linear([f"{name}.attention.output.dense"], width, width),
            attention_norm=self.norm(f"{name}.attention.output.LayerNorm"),
            up=self.linear([f"{name}.intermediate.dense"], inner, width, self._config.activation),
            down=self.linear([f"{name}.output.dense"], width, inner),
            norm=self.norm(f"{name}.output.LayerNorm"),
        )
