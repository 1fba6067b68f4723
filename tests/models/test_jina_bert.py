"""Our packed JinaBERT against the float64 reference: three variants, tiny and at the true width of one layer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.jina_reference import TEXT_MISTAKES, Variant, jina_bert
from tests.models.packed import largest_difference, load, pack, random_texts, states_of
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from embedserve.models.errors import CheckpointError

VARIANTS: tuple[Variant, ...] = ("A", "B", "C")
LENGTHS = (1, 97, 2, 300, 97)
# 12 heads, so that the slopes are of the kind that is not a power of two; no two sizes are equal.
TINY: dict[str, Any] = {
    "architectures": ["JinaBertForMaskedLM"],
    "emb_pooler": "mean",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
    "hidden_size": 96,
    "intermediate_size": 200,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 8192,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "alibi",
    "type_vocab_size": 2,
    "vocab_size": 101,
}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 1}
SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_hidden_layers": 1}

Checkpoint = Callable[..., Path]


def random_tensors(variant: Variant, **changes: Any) -> dict[str, Tensor]:
    """The tensors of a variant, random, of a size that keeps activations near 1."""
    sizes = {**TINY, **changes}
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    chance = torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}

    def matrix(name: str, *shape: int) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=chance) * shape[-1] ** -0.5

    def linear(name: str, *shape: int) -> None:
        matrix(name, *shape)
        tensors[f"{name}.bias"] = torch.randn(shape[0], generator=chance) * 0.1

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = 1 + torch.randn(width, generator=chance) * 0.3
        tensors[f"{name}.bias"] = torch.randn(width, generator=chance) * 0.1

    matrix("embeddings.word_embeddings", sizes["vocab_size"], width)
    matrix("embeddings.token_type_embeddings", sizes["type_vocab_size"], width)
    norm("embeddings.LayerNorm")
    for index in range(sizes["num_hidden_layers"]):
        layer = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", width, width)
        linear(f"{layer}.attention.output.dense", width, width)
        norm(f"{layer}.attention.output.LayerNorm")
        if variant != "A":
            norm(f"{layer}.attention.self.layer_norm_q")
            norm(f"{layer}.attention.self.layer_norm_k")
        if variant == "B":
            norm(f"{layer}.layer_norm_1")
            norm(f"{layer}.layer_norm_2")
            matrix(f"{layer}.mlp.up_gated_layer", 2 * inner, width)
            linear(f"{layer}.mlp.down_layer", width, inner)
        else:
            matrix(f"{layer}.mlp.gated_layers", 2 * inner, width)
            linear(f"{layer}.mlp.wo", width, inner)
            norm(f"{layer}.mlp.layernorm")
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Writes config.json and weights; keywords change fields of the configuration."""

    def write(tensors: dict[str, Tensor], **changes: Any) -> Path:
        fields = {name: value for name, value in {**TINY, **changes}.items() if value is not None}
        (tmp_path / "config.json").write_text(json.dumps(fields))
        save_file(tensors, tmp_path / "model.safetensors")
        return tmp_path

    return write


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 8},
        {"num_attention_heads": 3},
        {"num_attention_heads": 1},
        {"feed_forward_type": "reglu"},
        {"layer_norm_eps": 1e-3},
    ],
    ids=str,
)
def test_states_are_those_of_the_formulas(
    checkpoint: Checkpoint, variant: Variant, reference: bool, changes: dict[str, Any]
) -> None:
    tensors = random_tensors(variant)
    texts = random_texts((1, 2, 97, 5))
    settings = {**TINY, **changes}
    expected = [
        jina_bert(
            tensors,
            variant,
            text,
            settings["num_attention_heads"],
            activation="relu" if settings["feed_forward_type"] == "reglu" else "gelu",
            eps=settings["layer_norm_eps"],
        )
        for text in texts
    ]
    found = states_of(load(checkpoint(tensors, **changes), reference=reference), texts)
    assert largest_difference(found, expected) < 3e-6


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("A", BASE), ("A", SMALL), ("B", BASE), ("C", BASE)],
    ids=["base-en, de, zh", "small-en", "code", "es"],
)
def test_a_layer_of_the_true_width(checkpoint: Checkpoint, variant: Variant, sizes: dict[str, Any]) -> None:
    tensors = random_tensors(variant, **sizes)
    texts = random_texts(LENGTHS)
    expected = [jina_bert(tensors, variant, text, sizes["num_attention_heads"]) for text in texts]
    found = states_of(load(checkpoint(tensors, **sizes)), texts)
    assert largest_difference(found, expected) < 5e-6


@pytest.mark.parametrize(("variant", "wrong"), [(v, mistake) for v in VARIANTS for mistake in TEXT_MISTAKES[v]])
def test_each_known_mistake_would_show(checkpoint: Checkpoint, variant: Variant, wrong: str) -> None:
    tensors = random_tensors(variant)
    texts = random_texts((41,))
    found = states_of(load(checkpoint(tensors)), texts)
    mistaken = [jina_bert(tensors, variant, text, 12, wrong=wrong) for text in texts]
    # tanh's is the smallest by far, 2e-4.
    assert largest_difference(found, mistaken) > 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_neighbours_and_order_change_nothing(checkpoint: Checkpoint, variant: Variant) -> None:
    model = load(checkpoint(random_tensors(variant)))
    texts = random_texts((7, 1, 130, 7, 33))
    alone = [states_of(model, [text])[0] for text in texts]
    assert largest_difference(states_of(model, texts), alone) < 2e-6
    assert largest_difference(states_of(model, texts[::-1])[::-1], alone) < 2e-6


def test_a_text_of_8192_tokens_takes_no_square_of_memory(checkpoint: Checkpoint) -> None:
    model = load(checkpoint(random_tensors("A", num_hidden_layers=1), num_hidden_layers=1))
    batch = pack(random_texts((8192,)))
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        states = model(batch)
    assert torch.isfinite(states).all()
    # The feed-forward block's, 8192 · 200 floats; a bias of all pairs would be 12 · 8192² floats, 3 GiB.
    assert max(event.cpu_memory_usage for event in recorded.events()) < 20 << 20


def test_half_precision_weights_run_in_float32(checkpoint: Checkpoint) -> None:
    halves = {name: tensor.half() for name, tensor in random_tensors("A").items()}
    texts = random_texts((5, 17))
    expected = [jina_bert(halves, "A", text, 12) for text in texts]
    assert largest_difference(states_of(load(checkpoint(halves)), texts), expected) < 3e-6


def test_a_prefix_and_unused_tensors_change_nothing(checkpoint: Checkpoint) -> None:
    tensors = random_tensors("A")
    texts = random_texts((5, 17))
    expected = [jina_bert(tensors, "A", text, 12) for text in texts]
    unused = {"pooler.dense.weight": torch.ones(96, 96), "cls.predictions.bias": torch.ones(101)}
    prefixed = {f"bert.{name}": tensor for name, tensor in {**tensors, **unused}.items()}
    assert largest_difference(states_of(load(checkpoint(prefixed)), texts), expected) < 3e-6


def of_layer(index: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"encoder.layer.{index}.")}


@pytest.mark.parametrize("first", VARIANTS)
@pytest.mark.parametrize("second", VARIANTS)
def test_all_layers_are_of_one_variant(checkpoint: Checkpoint, first: Variant, second: Variant) -> None:
    whole = random_tensors(first)
    mixed = {name: tensor for name, tensor in whole.items() if name not in of_layer(1, whole)}
    folder = checkpoint({**mixed, **of_layer(1, random_tensors(second))})
    if first == second:
        load(folder)
    else:
        with pytest.raises(CheckpointError, match=r"encoder\.layer\.1\.") as raised:
            load(folder)
        assert str(folder) in str(raised.value)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_is_needed_and_no_other_taken(checkpoint: Checkpoint, variant: Variant) -> None:
    tensors = random_tensors(variant)
    for name in tensors:
        if "layer.1" in name:
            continue
        with pytest.raises(CheckpointError, match=r"encoder\.layer\.|embeddings\."):
            load(checkpoint({other: tensor for other, tensor in tensors.items() if other != name}))
    for extra in ("encoder.layer.0.intermediate.dense.weight", "embeddings.position_embeddings.weight"):
        with pytest.raises(CheckpointError, match=extra):
            load(checkpoint({**tensors, extra: torch.ones(60, 96)}))


def test_a_query_norm_without_a_key_norm_is_refused(checkpoint: Checkpoint) -> None:
    tensors = {name: tensor for name, tensor in random_tensors("C").items() if "layer_norm_k" not in name}
    with pytest.raises(CheckpointError, match="layer_norm_k"):
        load(checkpoint(tensors))


PLAIN = {"architectures": ["BertModel"], "position_embedding_type": None, "feed_forward_type": None, "emb_pooler": None}


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_bert_does_not_load_a_jina_bert_whose_config_says_nothing(
    checkpoint: Checkpoint, variant: Variant
) -> None:
    tensors = random_tensors(variant)
    with pytest.raises(CheckpointError, match="names another architecture"):
        load(checkpoint(tensors, **PLAIN))
    # Even one that has all that a BERT needs: what is left over is an error too.
    bert = {
        "embeddings.position_embeddings.weight": torch.zeros(8192, 96),
        **{
            f"encoder.layer.{index}.{name}": torch.zeros(shape)
            for index in range(2)
            for name, shape in {
                "intermediate.dense.weight": (200, 96),
                "intermediate.dense.bias": (200,),
                "output.dense.weight": (96, 200),
                "output.dense.bias": (96,),
                "output.LayerNorm.weight": (96,),
                "output.LayerNorm.bias": (96,),
            }.items()
        },
    }
    with pytest.raises(CheckpointError, match=r"no use for tensor 'encoder\.layer\.0"):
        load(checkpoint({**tensors, **bert}, **PLAIN))


def test_jina_bert_does_not_load_a_plain_bert(checkpoint: Checkpoint) -> None:
    tensors = {name: tensor for name, tensor in random_tensors("A").items() if ".mlp." not in name}
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.0\.mlp"):
        load(checkpoint({**tensors, "encoder.layer.0.intermediate.dense.weight": torch.ones(200, 96)}))
