"""Our packed Qwen3 against transformers' Qwen3Model on random weights, tiny and at the true width of one layer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from embedserve.kernels import dispatch
from embedserve.kernels.attention import Layout, attend_by_runs
from embedserve.kernels.dispatch import REFERENCE
from embedserve.kernels.norm import rms_norm
from embedserve.kernels.pooling import pool
from embedserve.kernels.rotary import rotate
from embedserve.models import registry
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.config import read_config
from embedserve.models.errors import CheckpointError
from embedserve.models.qwen3 import Qwen3

CPU = torch.device("cpu")
LENGTHS = [1, 5, 60, 5, 17, 300]

# No size equals another, and heads · head_dim (96) is not hidden, as in the smallest of the real ones.
TINY: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 40,
    "intermediate_size": 56,
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": True,
    "vocab_size": 101,
}


def random_model(kind: type[Any] = Qwen3Model, **changes: Any) -> Any:
    """A Qwen3 of transformers with random weights; keywords change the configuration."""
    torch.manual_seed(7)
    fields = {name: value for name, value in {**TINY, **changes}.items() if name not in ("model_type", "architectures")}
    model = kind(Qwen3Config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, all norms are 1, so that one of them on the wrong axis would not show.
            scale = 0.3 if "norm" in name else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale + ("norm" in name))
    return model


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder as Qwen3-Embedding has it: config.json, weights whose names carry no prefix."""

    def write(tensors: dict[str, Tensor], **changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


def load(folder: Path, dtype: torch.dtype = torch.float32, kernels: dispatch.Kernels | None = None) -> Qwen3:
    return Qwen3(read_config(folder), CPU, dtype, kernels or dispatch.choose(CPU, dtype))


def texts_of(lengths: list[int], vocab: int = 101) -> list[np.ndarray]:
    generator = np.random.default_rng(1)
    return [generator.integers(0, vocab, length, dtype=np.int32) for length in lengths]


@torch.inference_mode()
def run(model: Qwen3, texts: list[np.ndarray]) -> list[Tensor]:
    """The states of each text, in the caller's order."""
    packed = PackedRows.pack(np.concatenate(texts), np.array([len(text) for text in texts], dtype=np.int32))
    states = torch.split(model(PackedBatch.on_cpu(packed)), packed.lengths.tolist())
    return [states[index] for index in np.argsort(packed.order)]


@torch.inference_mode()
def largest_difference(ours: Qwen3, theirs: Qwen3Model, lengths: list[int] = LENGTHS, vocab: int = 101) -> float:
    """Largest difference of a component, relative to the norm of its token's vector."""
    texts = texts_of(lengths, vocab)
    worst = 0.0
    for found, text in zip(run(ours, texts), texts, strict=True):
        expected = theirs(input_ids=torch.from_numpy(text).long()[None]).last_hidden_state[0]
        relative = (found - expected).abs().amax(dim=1) / expected.norm(dim=1)
        worst = max(worst, relative.max().item())
    return worst


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1, "num_attention_heads": 1},
        {"head_dim": 2},
        {"rope_theta": 10000},
        {"rms_norm_eps": 1e-2},
        {"num_hidden_layers": 1, "intermediate_size": 5},
    ],
    ids=str,
)
@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_states_are_those_of_transformers(
    checkpoint: Callable[..., Path], changes: dict[str, Any], reference: bool
) -> None:
    theirs = random_model(**changes)
    folder = checkpoint(dict(theirs.state_dict()), **changes)
    kernels = dispatch.choose(CPU, torch.float32, reference=reference)
    assert largest_difference(load(folder, kernels=kernels), theirs) < 1e-5


def test_one_layer_at_the_width_of_the_0_6b_model(checkpoint: Callable[..., Path]) -> None:
    true = {
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 32768,
        "num_attention_heads": 16,
        "num_hidden_layers": 1,
        "num_key_value_heads": 8,
        "vocab_size": 1000,
    }
    theirs = random_model(**true)
    folder = checkpoint(dict(theirs.state_dict()), **true)
    assert largest_difference(load(folder), theirs, [1, 7, 129, 400], vocab=1000) < 1e-5


# What implementations get wrong: each must show in the comparison above


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """GPT-J's layout: neighbours 2i and 2i + 1 turn together."""
    even, odd = x[..., ::2], x[..., 1::2]
    turned = (even * cos[:, None] - odd * sin[:, None], odd * cos[:, None] + even * sin[:, None])
    return torch.stack(turned, dim=-1).flatten(-2)


def norm_over_all_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean((1, 2), keepdim=True) + eps) * weight


def both_directions(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool, slopes: None = None) -> Tensor:
    return attend_by_runs(q, k, v, layout)


def heads_in_turns(q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool, slopes: None = None) -> Tensor:
    """Head h reads K and V of head h % kv_heads instead of h // group."""
    group = q.shape[1] // k.shape[1]
    return attend_by_runs(q, k.repeat(1, group, 1), v.repeat(1, group, 1), layout, causal=causal)


@pytest.mark.parametrize(
    "mistake",
    [
        {"norm_rotate": lambda qk, weight, eps, *angles: interleaved(rms_norm(qk, weight, eps), *angles)},
        {"norm_rotate": lambda qk, weight, eps, *angles: rotate(norm_over_all_heads(qk, weight, eps), *angles)},
        {"norm_rotate": lambda qk, weight, eps, *angles: rms_norm(rotate(qk, *angles), weight, eps)},
        {"gated": lambda *block: REFERENCE.gated(*block[:3], not block[3])},
        {"add_rms_norm": lambda x, residual, weight, eps: rms_norm(x + residual, weight, eps)},
        {"attend": both_directions},
        {"attend": heads_in_turns},
    ],
    ids=[
        "interleaved",
        "norm over all heads",
        "turn before norm",
        "gate and up swapped",
        "residual left as it was",
        "not causal",
        "kv in turns",
    ],
)
def test_a_mistake_would_show(checkpoint: Callable[..., Path], mistake: dict[str, Any]) -> None:
    theirs = random_model()
    folder = checkpoint(dict(theirs.state_dict()))
    assert largest_difference(load(folder, kernels=replace(REFERENCE, **mistake)), theirs) > 1e-2


# One text by itself, and with others


def test_neighbours_and_order_change_nothing(checkpoint: Callable[..., Path]) -> None:
    ours = load(checkpoint(dict(random_model().state_dict())))
    texts = texts_of(LENGTHS)
    together, reversed_ = run(ours, texts), run(ours, texts[::-1])[::-1]
    for text, first, second in zip(texts, together, reversed_, strict=True):
        alone = run(ours, [text])[0]
        assert (first - alone).abs().max() < 1e-5
        assert (second - alone).abs().max() < 1e-5


def test_the_last_token_counts_though_it_is_the_padding_token(checkpoint: Callable[..., Path]) -> None:
    """Qwen3's appended token is its padding token: a mask made from the ids would leave out the one that is pooled."""
    pad = 100
    theirs = random_model()
    ours = load(checkpoint(dict(theirs.state_dict()), pad_token_id=pad))
    texts = [np.array([3, pad], np.int32), np.array([1, pad, 2, 9, pad], np.int32), np.array([pad], np.int32)]
    packed = PackedRows.pack(np.concatenate(texts), np.array([2, 5, 1], dtype=np.int32))
    with torch.inference_mode():
        batch = PackedBatch.on_cpu(packed)
        found = packed.restore(pool(ours(batch), batch.layout.cu_seqlens, "last").numpy())
        for vector, text in zip(found, texts, strict=True):
            expected = theirs(input_ids=torch.from_numpy(text).long()[None]).last_hidden_state[0, -1]
            assert (torch.from_numpy(vector) - expected).abs().max() < 1e-5


def test_bfloat16_stays_close_to_float32(checkpoint: Callable[..., Path]) -> None:
    theirs = random_model().to(torch.bfloat16)
    folder = checkpoint(dict(theirs.state_dict()))
    half, full = run(load(folder, torch.bfloat16), texts_of(LENGTHS)), run(load(folder), texts_of(LENGTHS))
    for rounded, exact in zip(half, full, strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.cosine_similarity(rounded.float(), exact).min() > 0.999


# Forms of checkpoints


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"], ids=["one file", "shards"])
def test_a_causal_model_as_transformers_saves_it(tmp_path: Path, shard_size: str) -> None:
    """With the prefix `model.`, with a language-model head of its own, the rotary base where this version puts it."""
    theirs = random_model(Qwen3ForCausalLM, tie_word_embeddings=False, rope_theta=10000)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    assert largest_difference(load(tmp_path), theirs.model) < 1e-5


def test_a_tensor_of_a_sibling_is_refused(checkpoint: Callable[..., Path]) -> None:
    """Qwen2 has biases where Qwen3 has norms."""
    tensors = {**random_model().state_dict(), "layers.0.self_attn.q_proj.bias": torch.ones(96)}
    with pytest.raises(CheckpointError, match=r"no use for tensor 'layers\.0\.self_attn\.q_proj\.bias'"):
        load(checkpoint(tensors))


def test_the_registry_has_it() -> None:
    assert registry.family("qwen3") is Qwen3
