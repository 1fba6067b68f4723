"""Qwen3: embeddings → pre-norm causal layers → final norm, over packed tokens.

    h = word[id];  x = norm(h)
    each layer:  q, k, v = x Wqkv;  q, k = turn(headnorm(q)), turn(headnorm(k))
                 h = h + attend(q, k, v) Wo;             x = norm(h)
                 h = h + (silu(x Wg) · (x Wu)) Wd;       x = norm(h)      the next layer's norm, or the last one
    x

norm is RMSNorm; headnorm is RMSNorm over each head's own components, with one weight for all heads; turn is the rotary
position, after the norm. Several heads of q share one of k and v. No linear has a bias.

Source: Qwen3 technical report (arXiv:2505.09388); parameter names and shapes as transformers' Qwen3Model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.kernels.rotary import rotary_angles
from embedserve.models.architecture import Qwen3Architecture
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig
from embedserve.models.parts import RmsNorm
from embedserve.models.weights import Parameters, Weights

# Qwen3-Embedding's own files have none; what transformers saves of a Qwen3ForCausalLM has one.
_PREFIXES = ("model.",)
# The language-model head; embeddings do not need it.
_IGNORED = (r"lm_head\.weight",)


@dataclass(frozen=True)
class _Layer:
    qkv: Linear
    head_norm: Tensor
    attention_out: Linear
    feed_forward_norm: RmsNorm
    gated: Linear
    down: Linear
    next_norm: RmsNorm


class Qwen3:
    """A Qwen3 decoder without its language-model head. See `registry.Family`."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        architecture = config.architecture
        assert isinstance(architecture, Qwen3Architecture)
        self._architecture = architecture
        self._kernels = kernels
        with Weights(config.weights_folder, prefixes=_PREFIXES, ignored=_IGNORED) as weights:
            loader = _Loader(architecture, Parameters(weights, device, dtype), kernels)
            # First, for it is the largest: what converting it needs besides is then not on top of everything else.
            self._words = loader.words()
            self._norm = loader.norm("layers.0.input_layernorm")
            self._layers = [loader.layer(index) for index in range(architecture.num_layers)]

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`."""
        sizes = self._architecture
        heads, kv_heads = sizes.num_heads, sizes.num_kv_heads
        hidden = F.embedding(batch.ids, self._words)
        tokens = hidden.shape[0]
        cos, sin = rotary_angles(batch.layout.positions, sizes.head_dim, sizes.rope_theta)
        normed = self._norm(hidden)
        for layer in self._layers:
            qkv = layer.qkv(normed).view(tokens, heads + 2 * kv_heads, sizes.head_dim)
            qk, v = qkv[:, :-kv_heads], qkv[:, -kv_heads:]
            qk = self._kernels.norm_rotate(qk, layer.head_norm, sizes.rms_norm_eps, cos, sin)
            attended = self._kernels.attend(qk[:, :heads], qk[:, heads:], v, batch.layout, causal=True)
            normed = layer.feed_forward_norm.after_adding(layer.attention_out(attended), hidden)
            normed = layer.next_norm.after_adding(layer.down(layer.gated(normed)), hidden)
        return normed


class _Loader:
    """Takes a layer's tensors and fuses what is computed together."""

    def __init__(self, architecture: Qwen3Architecture, parameters: Parameters, kernels: Kernels) -> None:
        self._sizes, self._parameters, self._kernels = architecture, parameters, kernels

    def words(self) -> Tensor:
        return self._parameters.tensor("embed_tokens.weight", self._sizes.vocab_size, self._sizes.hidden_size)

    def norm(self, name: str) -> RmsNorm:
        weight = self._parameters.tensor(f"{name}.weight", self._sizes.hidden_size)
        return RmsNorm(self._kernels, weight, self._sizes.rms_norm_eps)

    def linear(self, names: list[str], rows: list[int], inner: int) -> Linear:
        return self._kernels.linear(self.stacked(names, rows, inner), None, None)

    def stacked(self, names: list[str], rows: list[int], inner: int) -> Tensor:
        return self._parameters.stacked([f"{name}.weight" for name in names], rows, inner)

    def head_norm(self, name: str) -> Tensor:
        """The norms of q and k, written out for each head, [heads + kv_heads, head_dim]: both are done in one go."""
        sizes = self._sizes
        q = self._parameters.tensor(f"{name}.q_norm.weight", sizes.head_dim)
        k = self._parameters.tensor(f"{name}.k_norm.weight", sizes.head_dim)
        return torch.cat([q.expand(sizes.num_heads, -1), k.expand(sizes.num_kv_heads, -1)])

    def layer(self, index: int) -> _Layer:
        sizes = self._sizes
        hidden, inner = sizes.hidden_size, sizes.intermediate_size
        q, kv = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        name = f"layers.{index}"
        own, mlp = f"{name}.self_attn", f"{name}.mlp"
        gate_up = [f"{mlp}.gate_proj", f"{mlp}.up_proj"]
        last = index + 1 == sizes.num_layers
        return _Layer(
            qkv=self.linear([f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj"], [q, kv, kv], hidden),
            head_norm=self.head_norm(own),
            attention_out=self.linear([f"{own}.o_proj"], [hidden], q),
            feed_forward_norm=self.norm(f"{name}.post_attention_layernorm"),
            gated=self._kernels.gated(self.stacked(gate_up, [inner, inner], hidden), None, "silu", True),
            down=self.linear([f"{mlp}.down_proj"], [hidden], inner),
            next_norm=self.norm("norm" if last else f"layers.{index + 1}.input_layernorm"),
        )
