"""Our jina-clip against the float64 reference: the text tower's tensors, and the image tower with all its switches."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.models.jina_reference import IMAGE_MISTAKES, flash_names, jina_bert, vision
from tests.models.packed import largest_difference, load, random_texts, states_of
from tests.models.test_jina_bert import random_tensors
from torch import Tensor

from embedserve.models.errors import BatchError, CheckpointError

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# 4 patches by 4, heads of 8; the gate's width is not a multiple of anything.
TEXT: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 12,
    "intermediate_size": 200,
    "vocab_size": 101,
}
VISION: dict[str, Any] = {
    "embed_dim": 96,
    "width": 96,
    "image_size": 20,
    "patch_size": 5,
    "layers": 2,
    "head_width": 8,
    "mlp_ratio": 2.6667,
    "naive_swiglu": True,
    "intp_freq": False,
    "pt_hw_seq_len": 4,
    "rope_embeddings": True,
    "subln": True,
    "qkv_bias": True,
    "patch_dropout": 0.1,
    "x_attention": True,
}
BASE_TEXT = {"hidden_size": 768, "num_hidden_layers": 1, "intermediate_size": 3072}
BASE_VISION = {
    "embed_dim": 768,
    "width": 768,
    "image_size": 224,
    "patch_size": 16,
    "layers": 1,
    "head_width": 64,
    "pt_hw_seq_len": 14,
}

Checkpoint = Callable[..., Path]


def random_vision(**changes: Any) -> dict[str, Tensor]:
    """The image tower's tensors, random."""
    sizes = {**VISION, **changes}
    width, inner, patch = sizes["width"], int(sizes["width"] * sizes["mlp_ratio"]), sizes["patch_size"]
    chance = torch.Generator().manual_seed(6)
    tensors: dict[str, Tensor] = {}

    def vector(name: str, *shape: int, scale: float = 0.1, around: float = 0.0) -> None:
        tensors[f"vision_model.{name}"] = around + torch.randn(shape, generator=chance) * scale

    def linear(name: str, out: int, *inner: int) -> None:
        vector(f"{name}.weight", out, *inner, scale=torch.Size(inner).numel() ** -0.5)
        vector(f"{name}.bias", out)

    def norm(name: str, size: int = width) -> None:
        vector(f"{name}.weight", size, scale=0.3, around=1)
        vector(f"{name}.bias", size)

    vector("cls_token", 1, 1, width)
    vector("pos_embed", 1, 1 + (sizes["image_size"] // patch) ** 2, width)
    linear("patch_embed.proj", width, 3, patch, patch)
    for index in range(sizes["layers"]):
        block = f"blocks.{index}"
        norm(f"{block}.norm1")
        norm(f"{block}.norm2")
        # Twice the usual size, so that the rotation has something to change.
        if sizes["subln"]:
            for part in "qkv":
                vector(f"{block}.attn.{part}_proj.weight", width, width, scale=2 * width**-0.5)
            norm(f"{block}.attn.inner_attn_ln")
            norm(f"{block}.mlp.ffn_ln", inner)
        else:
            vector(f"{block}.attn.qkv.weight", 3 * width, width, scale=2 * width**-0.5)
        if sizes["qkv_bias"]:
            vector(f"{block}.attn.q_bias", width, scale=0.5)
            vector(f"{block}.attn.v_bias", width)
        linear(f"{block}.attn.proj", width, width)
        linear(f"{block}.mlp.w1", inner, width)
        linear(f"{block}.mlp.w2", inner, width)
        linear(f"{block}.mlp.w3", width, inner)
    norm("norm")
    return tensors


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Writes config.json and weights, the text tower's random ones beside the image tower's."""

    def write(
        images: dict[str, Tensor],
        *,
        text: dict[str, Any] | None = None,
        image: dict[str, Any] | None = None,
        **changes: Any,
    ) -> Path:
        kwargs = {**TEXT, **(text or {})}
        fields = {
            "architectures": ["JinaCLIPModel"],
            "model_type": "jina_clip",
            "add_projections": False,
            "text_config": {
                "embed_dim": kwargs["hidden_size"],
                "pooler_type": "mean_pooler",
                "hf_model_config_kwargs": kwargs,
            },
            "vision_config": {**VISION, **(image or {})},
            **changes,
        }
        (tmp_path / "config.json").write_text(json.dumps(fields))
        texts = flash_names(random_tensors("A", **kwargs))
        unused = {"logit_scale": torch.tensor(2.6592)}
        save_file({**texts, **unused, **images}, tmp_path / "model.safetensors")
        return tmp_path

    return write


def rotary_tables(grid: int, head_dim: int) -> dict[str, Tensor]:
    """Cosines and sines [grid², head_dim] as the author's code stores them, from the description."""
    half = head_dim // 2
    frequencies = [10000 ** (-2 * j / half) for j in range(half // 2) for _ in range(2)]
    angles = torch.tensor(
        [[p * f for p in (row, column) for f in frequencies] for row in range(grid) for column in range(grid)]
    )
    return {"vision_model.rope.freqs_cos": angles.cos(), "vision_model.rope.freqs_sin": angles.sin()}


def test_rotary_tables_in_the_file_are_compared_with_ours(checkpoint: Checkpoint) -> None:
    tables = rotary_tables(4, 8)
    load(checkpoint({**random_vision(), **tables}))
    swapped = {name: table.roll(4, dims=1) for name, table in tables.items()}
    with pytest.raises(CheckpointError, match="freqs_cos"):
        load(checkpoint({**random_vision(), **swapped}))


def random_pixels(count: int, size: int = 20) -> Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def embed(model: Any, pixels: Tensor) -> list[Tensor]:
    """Each image's vector, [1, hidden]."""
    return list(model.images(pixels)[:, None])


def expected_images(tensors: dict[str, Tensor], pixels: Tensor, patch: int = 5, **switches: Any) -> list[Tensor]:
    return [vision(tensors, image, 12, patch, MEAN, STD, **switches)[None] for image in pixels]


@pytest.mark.parametrize("sizes", [{}, BASE_TEXT], ids=["tiny", "true width"])
def test_texts_are_those_of_a_jina_bert_under_other_names(checkpoint: Checkpoint, sizes: dict[str, Any]) -> None:
    width = {"embed_dim": sizes["hidden_size"], "width": sizes["hidden_size"]} if sizes else {}
    texts = random_texts((1, 97, 2, 60))
    tensors = random_tensors("A", **{**TEXT, **sizes})
    expected = [jina_bert(tensors, "A", text, 12) for text in texts]
    found = states_of(load(checkpoint(random_vision(**width), text=sizes, image=width)), texts)
    assert largest_difference(found, expected) < 3e-6


@pytest.mark.parametrize(
    ("changes", "switches"),
    [
        ({}, {}),
        ({"subln": False}, {}),
        ({"qkv_bias": False}, {}),
        ({"subln": False, "qkv_bias": False}, {}),
        ({"rope_embeddings": False}, {"rotary": False}),
        ({"intp_freq": True, "pt_hw_seq_len": 7}, {"trained_grid": 7}),
    ],
    ids=str,
)
def test_images_are_those_of_the_formulas(
    checkpoint: Checkpoint, changes: dict[str, Any], switches: dict[str, Any]
) -> None:
    tensors = random_vision(**changes)
    pixels = random_pixels(3)
    found = embed(load(checkpoint(tensors, image=changes)), pixels)
    assert largest_difference(found, expected_images(tensors, pixels, **switches)) < 1e-5


def test_an_image_at_the_true_width(checkpoint: Checkpoint) -> None:
    tensors = random_vision(**BASE_VISION)
    pixels = random_pixels(1, 224)
    found = embed(load(checkpoint(tensors, text=BASE_TEXT, image=BASE_VISION)), pixels)
    assert largest_difference(found, expected_images(tensors, pixels, 16)) < 1e-5


@pytest.mark.parametrize("wrong", IMAGE_MISTAKES)
def test_each_known_mistake_would_show(checkpoint: Checkpoint, wrong: str) -> None:
    tensors = random_vision()
    pixels = random_pixels(1)
    found = embed(load(checkpoint(tensors)), pixels)
    assert largest_difference(found, expected_images(tensors, pixels, wrong=wrong)) > 1e-3


def test_images_beside_it_change_nothing(checkpoint: Checkpoint) -> None:
    model = load(checkpoint(random_vision()))
    pixels = random_pixels(5)
    alone = [embed(model, image[None])[0] for image in pixels]
    assert largest_difference(embed(model, pixels), alone) < 2e-6
    assert largest_difference(embed(model, pixels.flip(0))[::-1], alone) < 2e-6


@pytest.mark.parametrize("pixels", [torch.zeros(1, 20, 20, 3), torch.zeros(2, 20, 21, 3, dtype=torch.uint8)])
def test_pixels_of_another_kind_are_refused(checkpoint: Checkpoint, pixels: Tensor) -> None:
    model = load(checkpoint(random_vision()))
    with pytest.raises(BatchError, match=r"expected uint8 \[images, 20, 20, 3\]"):
        model.images(pixels)


@pytest.mark.parametrize(
    "extra",
    [
        "text_projection.weight",
        "vision_model.blocks.0.attn.k_bias",
        "vision_model.head.weight",
        "vision_model.blocks.2",
    ],
)
def test_a_tensor_without_use_is_refused(checkpoint: Checkpoint, extra: str) -> None:
    with pytest.raises(CheckpointError, match=extra):
        load(checkpoint({**random_vision(), extra: torch.ones(96)}))


def test_every_tensor_of_the_image_tower_is_needed(checkpoint: Checkpoint) -> None:
    tensors = random_vision()
    for name in tensors:
        with pytest.raises(CheckpointError, match=name):
            load(checkpoint({other: tensor for other, tensor in tensors.items() if other != name}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"add_projections": True}, "add_projections"),
        ({"image": {"proj_type": "linear"}}, "proj_type"),
        ({"image": {"pt_hw_seq_len": 16}}, "pt_hw_seq_len"),
        ({"image": {"ls_init_value": 0.1}}, "ls_init_value"),
        ({"image": {"post_norm": True}}, "post_norm"),
        ({"image": {"naive_swiglu": False}}, "naive_swiglu"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(checkpoint: Checkpoint, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        load(checkpoint(random_vision(), **changes))
