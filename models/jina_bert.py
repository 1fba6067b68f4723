"""JinaBERT: embeddings → post-LN layers with ALiBi and gated feed-forward blocks, over packed tokens.

    h = LN(word[id] + type[0])
    each layer:  q, k, v = h Wqkv + b;   q, k = LN_q(q), LN_k(k)          where the checkpoint has LN_q and LN_k
                 a = LN(attend(q, k, v, slopes) Wo + b + h)
                 a = LN_1(a + h)                                          where it has layer_norm_1
                 h = LN((act(a Wg) · (a Wu)) Wd + b + a)

Three variants are published under one model_type, and only their tensors tell them apart:

    jina-embeddings-v2-{small-en,base-en,base-de,base-zh}   neither of the two; the gate is the first half of
                                                            `gated_layers`
    jina-embeddings-v2-base-es                              LN_q and LN_k, over all heads' components at once
    jina-embeddings-v2-base-code                            both; the gate is the second half of `up_gated_layer`

Source: Günther et al. 2023 (arXiv:2310.19923).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedserve.kernels.alibi import alibi_slopes
from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.models.architecture import JinaBertArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig
from embedserve.models.parts import Embedding, Norm, Parts
from embedserve.models.weights import Weights

_PREFIXES = ("bert.",)
# The pooler and the language-model head are trained with the encoder and not used for embeddings.
_IGNORED = (r"pooler\..*", r"cls\..*", r"embeddings\.position_ids")


class JinaBert:
    """See `registry.Family`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        sizes = config.architecture
        assert isinstance(sizes, JinaBertArchitecture)
        with Weights(config.weights_folder, prefixes=_PREFIXES, ignored=_IGNORED) as weights:
            parts = Parts(weights, device, dtype, kernels, sizes.layer_norm_eps)
            self._encoder = JinaEncoder(sizes, parts, _names(weights))

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`."""
        return self._encoder(batch)


@dataclass(frozen=True)
class JinaNames:
    """Where the tensors of an encoder stand; `{}` is a layer's number.

    qkv: one name where they are stored as one. query_norm, key_norm, second_norm: None where the variant has none.
    gate_first: whether the gate is the upper half of `gated`, [2 · intermediate, hidden], or the lower.
    """

    words: str
    types: str
    norm: str
    qkv: tuple[str, ...]
    query_norm: str | None
    key_norm: str | None
    attention_out: str
    attention_norm: str
    second_norm: str | None
    gated: str
    gate_first: bool
    down: str
    layer_norm: str


def _names(weights: Weights) -> JinaNames:
    """The names of the variant that these weights are: the first layer decides for all.

    Nothing is guessed: a layer of another variant has tensors that are missing here, or left over.
    """
    layer = "encoder.layer.{}"
    attention, mlp = f"{layer}.attention", f"{layer}.mlp"

    def has(name: str) -> bool:
        return f"{name}.weight".format(0) in weights

    def found(name: str) -> str | None:
        return name if has(name) else None

    # Both or neither: of a pair of which one is missing, the other is asked for by name.
    normed = has(f"{attention}.self.layer_norm_q") or has(f"{attention}.self.layer_norm_k")
    second_norm = found(f"{layer}.layer_norm_1")
    gate_first = has(f"{mlp}.gated_layers")
    return JinaNames(
        words="embeddings.word_embeddings",
        types="embeddings.token_type_embeddings",
        norm="embeddings.LayerNorm",
        qkv=(f"{attention}.self.query", f"{attention}.self.key", f"{attention}.self.value"),
        query_norm=f"{attention}.self.layer_norm_q" if normed else None,
        key_norm=f"{attention}.self.layer_norm_k" if normed else None,
        attention_out=f"{attention}.output.dense",
        attention_norm=f"{attention}.output.LayerNorm",
        second_norm=second_norm,
        gated=f"{mlp}.gated_layers" if gate_first else f"{mlp}.up_gated_layer",
        gate_first=gate_first,
        down=f"{mlp}.down_layer" if has(f"{mlp}.down_layer") else f"{mlp}.wo",
        layer_norm=f"{mlp}.layernorm" if second_norm is None else f"{layer}.layer_norm_2",
    )


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    query_norm: Norm | None
    key_norm: Norm | None
    attention_out: Linear
    attention_norm: Norm
    second_norm: Norm | None
    gated: Linear
    down: Linear
    norm: Norm


class JinaEncoder:
    """Embeddings and layers, of any variant; jina-clip's text tower is one too."""

    def __init__(self, sizes: JinaBertArchitecture, parts: Parts, names: JinaNames) -> None:
        """Take the tensors of `names`. Raises CheckpointError."""
        width, parameters = sizes.hidden_size, parts.parameters
        self._heads = sizes.num_heads
        self._attend = parts.kernels.attend
        words = parameters.tensor(f"{names.words}.weight", sizes.vocab_size, width)
        # Texts are all of type 0, so its row belongs to every word.
        words += parameters.tensor(f"{names.types}.weight", sizes.type_vocab_size, width)[0]
        self._embed = Embedding(words, None, parts.norm(names.norm, width))
        self._slopes = alibi_slopes(sizes.num_heads, words.device)
        self._layers = [_layer(sizes, parts, names, index) for index in range(sizes.num_layers)]

    def __call__(self, batch: PackedBatch) -> Tensor:
        """Return the last layer's states, [tokens, hidden], in the dtype of the weights."""
        hidden = self._embed(batch.ids, batch.layout.positions)
        tokens, width = hidden.shape
        by_head = (tokens, self._heads, width // self._heads)
        for layer in self._layers:
            q, k, v = layer.qkv(hidden).view(tokens, 3, width).unbind(1)
            # Over the whole width, before the split into heads.
            if layer.query_norm is not None:
                q = layer.query_norm(q)
            if layer.key_norm is not None:
                k = layer.key_norm(k)
            attended = self._attend(
                q.view(by_head), k.view(by_head), v.view(by_head), batch.layout, slopes=self._slopes
            )
            mixed = layer.attention_norm.of_sum(layer.attention_out(attended), hidden)
            if layer.second_norm is not None:
                mixed = layer.second_norm.of_sum(mixed, hidden)
            hidden = layer.norm.of_sum(layer.down(layer.gated(mixed)), mixed)
        return hidden


def _layer(sizes: JinaBertArchitecture, parts: Parts, names: JinaNames, index: int) -> _Layer:
    width, inner = sizes.hidden_size, sizes.intermediate_size

    def norm(name: str) -> Norm:
        return parts.norm(name.format(index), width)

    def linear(name: str, rows: int) -> Linear:
        return parts.linear([name.format(index)], width, rows)

    gated = parts.parameters.tensor(f"{names.gated.format(index)}.weight", 2 * inner, width)
    return _Layer(
        qkv=parts.linear([name.format(index) for name in names.qkv], 3 * width, width),
        query_norm=norm(names.query_norm) if names.query_norm is not None else None,
        key_norm=norm(names.key_norm) if names.key_norm is not None else None,
        attention_out=linear(names.attention_out, width),
        attention_norm=norm(names.attention_norm),
        second_norm=norm(names.second_norm) if names.second_norm is not None else None,
        gated=parts.kernels.gated(gated, None, sizes.activation, names.gate_first),
        down=linear(names.down, inner),
        norm=norm(names.layer_norm),
    )
