"""Our packed BERT against transformers' on random weights, tiny and at true width; strict reading of weights."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.packed import expected_states, largest_difference, load, random_texts, states_of
from transformers import BertModel

from embedserve.models import registry
from embedserve.models.bert import Bert
from embedserve.models.errors import CheckpointError

Checkpoint = Callable[..., Path]
MakeBert = Callable[..., BertModel]

# One layer at the true width.
BGE_LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 1}
BGE_BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
BGE_SMALL_EN = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12, "num_hidden_layers": 1}
BGE_SMALL_ZH = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 1}


def difference(folder: Path, theirs: BertModel, *, reference: bool = False) -> float:
    texts = random_texts(first=0)
    return largest_difference(states_of(load(folder, reference=reference), texts), expected_states(theirs, texts))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 1},
        {"num_attention_heads": 32},
        {"hidden_act": "gelu_new"},
        {"hidden_act": "relu"},
        {"type_vocab_size": 1},
        {"layer_norm_eps": 1e-3},
        {"num_hidden_layers": 1, "intermediate_size": 5},
        pytest.param(BGE_LARGE, id="one layer of bge-large"),
        pytest.param(BGE_BASE, id="one layer of bge-base"),
        pytest.param(BGE_SMALL_EN, id="one layer of bge-small-en"),
        pytest.param(BGE_SMALL_ZH, id="one layer of bge-small-zh"),
    ],
    ids=str,
)
@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_states_are_those_of_transformers(
    checkpoint: Checkpoint, tiny_bert: MakeBert, changes: dict[str, Any], reference: bool
) -> None:
    theirs = tiny_bert(**changes)
    folder = checkpoint(config=changes, tensors=dict(theirs.state_dict()))
    assert difference(folder, theirs, reference=reference) < 1e-5


def test_the_activation_matters_to_this_comparison(checkpoint: Checkpoint, tiny_bert: MakeBert) -> None:
    folder = checkpoint(config={"hidden_act": "relu"})
    assert difference(folder, tiny_bert()) > 1e-2


def old_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    changed = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, tensor in tensors.items():
        for new, old in changed.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    return renamed


def prefixed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"bert.{name}": tensor for name, tensor in tensors.items()}


def with_unused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    unused = {
        "pooler.dense.weight": torch.ones(96, 96),
        "pooler.dense.bias": torch.ones(96),
        "embeddings.position_ids": torch.arange(60)[None],
        "cls.predictions.bias": torch.ones(101),
    }
    return {**tensors, **unused}


def half(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.half() for name, tensor in tensors.items()}


@pytest.mark.parametrize("form", [old_names, prefixed, with_unused, lambda t: prefixed(old_names(t))])
def test_forms_of_checkpoints_give_the_same_states(
    checkpoint: Checkpoint, tiny_bert: MakeBert, form: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]
) -> None:
    theirs = tiny_bert()
    folder = checkpoint(tensors=form(dict(theirs.state_dict())))
    assert difference(folder, theirs) < 1e-5


def test_half_precision_weights_run_in_float32(checkpoint: Checkpoint, tiny_bert: MakeBert) -> None:
    theirs = tiny_bert().half().float()
    folder = checkpoint(tensors=half(dict(theirs.state_dict())))
    assert difference(folder, theirs) < 1e-5


def shard(folder: Path) -> Path:
    """Split model.safetensors in two, as save_pretrained does above a size; returns the index."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, members in files.items():
        save_file({name: tensors[name] for name in members}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {name: file for file, ns in files.items() for name in ns}})
    )
    return index


def test_sharded_weights(checkpoint: Checkpoint, tiny_bert: MakeBert) -> None:
    folder = checkpoint()
    shard(folder)
    assert difference(folder, tiny_bert()) < 1e-5


def test_a_missing_shard_is_named(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "weight_map"),
        ("[]", "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ('{"weight_map": {"a": 1}}', "weight_map"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "plain name"),
        ('{"weight_map": {"a": "a.bin"}}', "plain name"),
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', "'a' is missing"),
    ],
)
def test_a_broken_index_is_refused(checkpoint: Checkpoint, content: str, said: str) -> None:
    folder = checkpoint()
    shard(folder).write_text(content)
    with pytest.raises(CheckpointError, match=said):
        load(folder)


NAME = "encoder.layer.1.attention.self.key.weight"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({NAME: None}, NAME),
        ({NAME: torch.ones(96, 95)}, r"\[96, 95\].*\[96, 96\]"),
        ({NAME: torch.ones(96, 96, dtype=torch.int8)}, "stored as I8"),
        ({"encoder.layer.2.output.dense.bias": torch.ones(96)}, "encoder.layer.2.output.dense.bias"),
        ({"encoder.layer.0.attention.self.distance_embedding.weight": torch.ones(4)}, "distance_embedding"),
        ({"embeddings.word_embeddings.weight": torch.ones(100, 96)}, r"\[100, 96\]"),
        ({"embeddings.LayerNorm.weight": None}, "embeddings.LayerNorm.gamma"),
    ],
    ids=["missing", "misshapen", "integers", "left over layer", "relative positions", "vocabulary", "norm"],
)
def test_tensors_that_do_not_fit_are_refused(
    checkpoint: Checkpoint, tiny_bert: MakeBert, damage: dict[str, torch.Tensor | None], said: str
) -> None:
    tensors = {**tiny_bert().state_dict(), **damage}
    folder = checkpoint(tensors={name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(CheckpointError, match=said) as raised:
        load(folder)
    assert str(folder) in str(raised.value)


def test_a_pickle_is_refused_unread(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: .*convert it"):
        load(folder)


def test_no_weights_at_all(checkpoint: Checkpoint) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors"):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_file_is_refused(checkpoint: Checkpoint, content: bytes) -> None:
    folder = checkpoint()
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(folder)


def test_the_registry_names_what_it_has() -> None:
    assert registry.family("bert") is Bert
    with pytest.raises(CheckpointError, match=r"unknown backend 'tensorrt'.*native"):
        registry.backend("tensorrt")
