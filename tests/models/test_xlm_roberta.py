"""Our packed XLM-RoBERTa against transformers' on random weights, tiny and at the true width of one layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.packed import CPU, expected_states, largest_difference, load, pack, random_texts, randomise, states_of
from torch import Tensor
from transformers import RobertaModel, XLMRobertaForMaskedLM, XLMRobertaModel

from embedserve.kernels.heads import colbert_vectors, sparse_weights
from embedserve.models.config import read_config
from embedserve.models.errors import CheckpointError
from embedserve.models.heads import load_heads

# No size is a power of two or equals another.
TINY: dict[str, Any] = {
    "architectures": ["XLMRobertaModel"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 96,
    "intermediate_size": 200,
    "layer_norm_eps": 1e-5,
    "max_position_embeddings": 66,
    "model_type": "xlm-roberta",
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 101,
}
BGE_M3 = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 1}
BCE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
BASES: dict[str, Any] = {"xlm-roberta": XLMRobertaModel, "roberta": RobertaModel}

Checkpoint = Callable[..., Path]


def reference(base: Any = XLMRobertaModel, **changes: Any) -> Any:
    fields = {name: value for name, value in {**TINY, **changes}.items() if name not in ("model_type", "architectures")}
    kind = base.config_class
    model = base(kind(**fields)) if base is XLMRobertaForMaskedLM else base(kind(**fields), add_pooling_layer=False)
    return randomise(model)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Writes config.json and weights; keywords change fields of the configuration."""

    def write(tensors: dict[str, Tensor], **changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**TINY, **changes}))
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors"
        )
        return tmp_path

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 32},
        {"hidden_act": "gelu_new"},
        {"type_vocab_size": 2},
        {"layer_norm_eps": 1e-3},
        {"pad_token_id": 0},
        {"pad_token_id": 3},
        {"model_type": "roberta", "architectures": ["RobertaModel"]},
        pytest.param(BGE_M3, id="one layer of bge-m3"),
        pytest.param(BCE, id="one layer of bce"),
    ],
    ids=str,
)
def test_states_are_those_of_transformers(checkpoint: Checkpoint, changes: dict[str, Any]) -> None:
    theirs = reference(BASES[changes.get("model_type", "xlm-roberta")], **changes)
    ours = load(checkpoint(dict(theirs.state_dict()), **changes))
    texts = random_texts()
    assert largest_difference(states_of(ours, texts), expected_states(theirs, texts)) < 1e-5


def test_a_text_may_fill_the_whole_position_table(checkpoint: Checkpoint) -> None:
    sizes = {"max_position_embeddings": 8194, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
    theirs = reference(**sizes)
    folder = checkpoint(dict(theirs.state_dict()), **sizes)
    assert read_config(folder).max_positions == 8192
    texts = random_texts([8192, 3])
    assert largest_difference(states_of(load(folder), texts), expected_states(theirs, texts)) < 1e-5


def test_the_offset_matters_to_this_comparison(checkpoint: Checkpoint) -> None:
    theirs = reference()
    ours = load(checkpoint(dict(theirs.state_dict()), pad_token_id=2))
    texts = random_texts()
    assert largest_difference(states_of(ours, texts), expected_states(theirs, texts)) > 1e-2


def test_a_token_with_the_padding_s_id_takes_a_position_like_any_other(checkpoint: Checkpoint) -> None:
    """transformers counts the ids that are not the padding's; given the positions, it agrees."""
    theirs = reference()
    text = torch.tensor([0, 50, 1, 51, 52, 2], dtype=torch.int32)
    found = states_of(load(checkpoint(dict(theirs.state_dict()))), [text])
    positions = 2 + torch.arange(len(text))[None]
    assert largest_difference(found, expected_states(theirs, [text], position_ids=positions)) < 1e-5
    assert largest_difference(found, expected_states(theirs, [text])) > 1e-2


def test_neighbours_and_order_change_nothing(checkpoint: Checkpoint) -> None:
    ours = load(checkpoint(dict(reference().state_dict())))
    texts = random_texts()
    together = states_of(ours, texts)
    assert largest_difference(states_of(ours, texts[::-1])[::-1], together) < 1e-6
    alone = [states_of(ours, [text])[0] for text in texts]
    assert largest_difference(alone, together) < 1e-5


@pytest.mark.parametrize("prefix", ["", "roberta.", "xlm-roberta."])
def test_checkpoints_of_larger_models_load_without_their_heads(checkpoint: Checkpoint, prefix: str) -> None:
    theirs = reference(XLMRobertaForMaskedLM)
    tensors = {name.replace("roberta.", prefix, 1): tensor for name, tensor in theirs.state_dict().items()}
    assert any(name.startswith("lm_head.") for name in tensors)
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(66)[None]
    tensors[f"{prefix}pooler.dense.bias"] = torch.ones(96)
    texts = random_texts()
    assert (
        largest_difference(states_of(load(checkpoint(tensors)), texts), expected_states(theirs.roberta, texts)) < 1e-5
    )


def test_a_table_of_another_length_is_refused(checkpoint: Checkpoint) -> None:
    folder = checkpoint(dict(reference(max_position_embeddings=64).state_dict()))
    with pytest.raises(CheckpointError, match=r"position_embeddings.*\[64, 96\].*\[66, 96\]"):
        load(folder)


# bge-m3's two further outputs.


def write_heads(folder: Path, dtype: torch.dtype = torch.float16, **shapes: int) -> dict[str, dict[str, Tensor]]:
    """sparse_linear and colbert_linear, in half precision as the author's are; returns their tensors."""
    torch.manual_seed(3)
    heads = {}
    for output, components in {"sparse": 1, "colbert": 96, **shapes}.items():
        heads[output] = {
            "weight": (torch.randn(components, 96) / 96**0.5).to(dtype),
            "bias": torch.randn(components).to(dtype) * 0.1,
        }
        save_file(heads[output], folder / f"{output}_linear.safetensors")
    return heads


@torch.inference_mode()
def test_the_heads_make_their_outputs_of_the_same_states(checkpoint: Checkpoint) -> None:
    theirs = reference()
    folder = checkpoint(dict(theirs.state_dict()))
    heads = write_heads(folder)
    found = load_heads(read_config(folder), CPU, torch.float32)
    assert set(found) == {"sparse", "colbert"}

    batch = pack(random_texts())
    states = load(folder)(batch)
    expected = torch.cat(expected_states(theirs, torch.split(batch.ids, batch.host.lengths.tolist()))).double()
    projected = {name: expected @ head["weight"].double().T + head["bias"].double() for name, head in heads.items()}

    weights, _ = sparse_weights(states, found["sparse"], batch.layout)
    assert (weights - projected["sparse"][:, 0].clamp_min(0)).abs().max() < 1e-5
    vectors, _ = colbert_vectors(states, found["colbert"], batch.layout)
    behind_the_first = projected["colbert"][batch.layout.positions > 0]
    assert largest_difference([vectors], [torch.nn.functional.normalize(behind_the_first)]) < 1e-5


def test_without_their_files_there_are_no_heads(checkpoint: Checkpoint) -> None:
    assert not load_heads(read_config(checkpoint(dict(reference().state_dict()))), CPU, torch.float32)


def test_a_head_of_another_shape_is_refused_by_its_file(checkpoint: Checkpoint) -> None:
    folder = checkpoint(dict(reference().state_dict()))
    write_heads(folder, sparse=2)
    with pytest.raises(CheckpointError, match=r"sparse_linear\.safetensors.*\[2, 96\].*\[1, 96\]"):
        load_heads(read_config(folder), CPU, torch.float32)
