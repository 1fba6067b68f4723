"""jina-clip-v1: a JinaBERT for texts and an EVA-02 vision transformer for images; their vectors share one space.

    image:  h = [cls, patches Wp + b] + position
            each block:  q, k, v = LN(h) Wqkv + b, where k has no bias;  q, k = turn(q), turn(k), patches only
                         h = h + LN(attend(q, k, v)) Wo + b
                         h = h + LN(silu(LN(h) W1 + b) · (LN(h) W2 + b)) W3 + b
            LN(h)[cls]

Source: Koukounas et al. 2024 (arXiv:2405.20204); of the image tower Fang et al. 2023 (arXiv:2303.11331).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embedserve.kernels.attention import Layout
from embedserve.kernels.dispatch import Kernels
from embedserve.kernels.linear import Linear
from embedserve.kernels.rotary_2d import rotary_turns_2d, rotate_neighbours
from embedserve.models.architecture import JinaClipArchitecture, VisionArchitecture
from embedserve.models.batch import PackedBatch
from embedserve.models.config import ImageSettings, ModelConfig
from embedserve.models.errors import BatchError, CheckpointError
from embedserve.models.jina_bert import JinaEncoder, JinaNames
from embedserve.models.parts import Norm, Parts
from embedserve.models.weights import Weights

# logit_scale belongs to the training's loss; the rotary tables are computed, and those of the file compared with them.
_IGNORED = (r"logit_scale", r"text_model\.transformer\.pooler\..*", r"vision_model\.(.*\.)?rope\.freqs_(cos|sin)")

_LAYER = "text_model.transformer.encoder.layers.{}"
_TEXT_NAMES = JinaNames(
    words="text_model.transformer.embeddings.word_embeddings",
    types="text_model.transformer.embeddings.token_type_embeddings",
    norm="text_model.transformer.emb_ln",
    qkv=(f"{_LAYER}.mixer.Wqkv",),
    query_norm=None,
    key_norm=None,
    attention_out=f"{_LAYER}.mixer.out_proj",
    attention_norm=f"{_LAYER}.norm1",
    second_norm=None,
    gated=f"{_LAYER}.mlp.gated_layers",
    gate_first=True,
    down=f"{_LAYER}.mlp.wo",
    layer_norm=f"{_LAYER}.norm2",
)


class JinaClip:
    """See `registry.Family`; and `images`, which embeds images."""

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> None:
        sizes = config.architecture
        assert isinstance(sizes, JinaClipArchitecture)
        assert config.images is not None, "configurations of this architecture have image settings"
        with Weights(config.weights_folder, ignored=_IGNORED) as weights:
            text = Parts(weights, device, dtype, kernels, sizes.text.layer_norm_eps)
            self._text = JinaEncoder(sizes.text, text, _TEXT_NAMES)
            vision = Parts(weights, device, dtype, kernels, sizes.vision.layer_norm_eps)
            self._vision = _VisionTower(sizes.vision, config.images, vision, weights)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """See `registry.Family`: states of texts."""
        return self._text(batch)

    def images(self, pixels: Tensor) -> Tensor:
        """Embed images: uint8 [images, height, width, 3], square and of the model's size, on the device.

        Returns [images, hidden] in the model's dtype, not normalised.
        """
        return self._vision(pixels)


@dataclass(frozen=True)
class _Block:
    attention_norm: Norm
    qkv: Linear
    heads_norm: Norm | None
    attention_out: Linear
    feed_forward_norm: Norm
    gated: Linear
    gated_norm: Norm | None
    down: Linear


def _check_turns(weights: Weights, turns: Tensor) -> None:
    """Compare the patches' turns with the tables of cosines and sines that some versions of the author's code store.

    Raises CheckpointError where they differ: config.json would then mean another rotation than it is read as.
    """
    for name, ours in (("cos", turns.real), ("sin", turns.imag)):
        stored = f"vision_model.rope.freqs_{name}"
        if stored in weights:
            # Each turn is of two neighbouring components.
            expected = ours.repeat_interleave(2, dim=1)
            found = weights.take(stored, tuple(expected.shape)).float()
            if float((found - expected).abs().max()) > 1e-2:
                raise CheckpointError(
                    f"{weights.folder}: tensor {stored!r} holds other rotary positions than config.json asks for; the "
                    "two do not belong to one checkpoint"
                )


class _VisionTower:
    def __init__(self, sizes: VisionArchitecture, settings: ImageSettings, parts: Parts, weights: Weights) -> None:
        self._sizes = sizes
        self._attend = parts.kernels.attend
        width, patch, parameters = sizes.hidden_size, sizes.patch_size, parts.parameters
        # A convolution whose steps are as long as its kernel is a product with each patch's pixels.
        kernel = parameters.tensor("vision_model.patch_embed.proj.weight", width, 3, patch, patch)
        bias = parameters.tensor("vision_model.patch_embed.proj.bias", width)
        self._embed = parts.kernels.linear(kernel.flatten(1), bias, None)
        self._cls = parameters.tensor("vision_model.cls_token", 1, 1, width)
        self._positions = parameters.tensor("vision_model.pos_embed", 1, 1 + sizes.grid**2, width)
        self._blocks = [_block(sizes, parts, f"vision_model.blocks.{index}") for index in range(sizes.num_layers)]
        self._norm = parts.norm("vision_model.norm", width)
        device = self._cls.device
        self._mean = torch.tensor(settings.mean, device=device)
        self._std = torch.tensor(settings.std, device=device)
        self._turns: Tensor | None = None
        if sizes.rotary:
            turns = rotary_turns_2d(sizes.grid, width // sizes.num_heads, sizes.rope_scale)
            assert len(turns) == 1 + sizes.grid**2
            _check_turns(weights, turns[1:])
            self._turns = turns.to(device)

    def __call__(self, pixels: Tensor) -> Tensor:
        sizes = self._sizes
        patches = self._patches(pixels)
        images, length, width = len(pixels), 1 + patches.shape[1], sizes.hidden_size
        embedded = self._embed(patches.flatten(0, 1)).view(images, length - 1, width)
        hidden = torch.cat([self._cls.expand(images, 1, width), embedded], dim=1).add_(self._positions)
        hidden = hidden.view(images * length, width)
        layout = _layout(images, length, pixels.device)
        for block in self._blocks:
            qkv = block.qkv(block.attention_norm(hidden))
            q, k, v = qkv.view(images, length, 3, sizes.num_heads, width // sizes.num_heads).unbind(2)
            if self._turns is not None:
                q, k = rotate_neighbours(q, self._turns), rotate_neighbours(k, self._turns)
            attended = self._attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), layout)
            if block.heads_norm is not None:
                attended = block.heads_norm(attended)
            hidden = block.attention_out(attended).add_(hidden)
            gated = block.gated(block.feed_forward_norm(hidden))
            if block.gated_norm is not None:
                gated = block.gated_norm(gated)
            hidden = block.down(gated).add_(hidden)
        return self._norm(hidden.view(images, length, width)[:, 0])

    def _patches(self, pixels: Tensor) -> Tensor:
        """[images, grid², 3 · patch²]: patches row by row, of each first all red values, then green, then blue."""
        sizes = self._sizes
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != (sizes.image_size, sizes.image_size, 3):
            raise BatchError(
                f"images are {str(pixels.dtype).removeprefix('torch.')} {list(pixels.shape)}; expected uint8 "
                f"[images, {sizes.image_size}, {sizes.image_size}, 3]"
            )
        grid, patch = sizes.grid, sizes.patch_size
        # In float32 whatever the model's dtype, and rounded once.
        values = ((pixels.float() / 255 - self._mean) / self._std).to(self._cls.dtype)
        cut = values.view(len(pixels), grid, patch, grid, patch, 3)
        return cut.permute(0, 1, 3, 5, 2, 4).reshape(len(pixels), grid * grid, 3 * patch * patch)


def _block(sizes: VisionArchitecture, parts: Parts, name: str) -> _Block:
    width, inner = sizes.hidden_size, sizes.intermediate_size
    return _Block(
        attention_norm=parts.norm(f"{name}.norm1", width),
        qkv=_qkv(sizes, parts, f"{name}.attn"),
        heads_norm=parts.norm(f"{name}.attn.inner_attn_ln", width) if sizes.sub_norm else None,
        attention_out=parts.linear([f"{name}.attn.proj"], width, width),
        feed_forward_norm=parts.norm(f"{name}.norm2", width),
        gated=parts.kernels.gated(*parts.stacked([f"{name}.mlp.w1", f"{name}.mlp.w2"], 2 * inner, width), "silu", True),
        gated_norm=parts.norm(f"{name}.mlp.ffn_ln", inner) if sizes.sub_norm else None,
        down=parts.linear([f"{name}.mlp.w3"], width, inner),
    )


def _qkv(sizes: VisionArchitecture, parts: Parts, name: str) -> Linear:
    """Q, K and V as one product; the checkpoint has biases of Q and V alone, and beside the linears, not in them."""
    width, parameters = sizes.hidden_size, parts.parameters
    # The original stores them apart where a norm follows the heads, and as one where none does.
    if sizes.sub_norm:
        weight = parameters.stacked([f"{name}.{part}_proj.weight" for part in "qkv"], [width] * 3, width)
    else:
        weight = parameters.tensor(f"{name}.qkv.weight", 3 * width, width)
    bias = None
    if sizes.qkv_bias:
        q, v = parameters.tensor(f"{name}.q_bias", width), parameters.tensor(f"{name}.v_bias", width)
        bias = torch.cat([q, torch.zeros_like(q), v])
    return parts.kernels.linear(weight, bias, None)


def _layout(images: int, length: int, device: torch.device) -> Layout:
    """Every image is a row of the same length."""
    tokens = torch.arange(images * length, dtype=torch.int32, device=device)
    return Layout(
        cu_seqlens=torch.arange(0, (images + 1) * length, length, dtype=torch.int32, device=device),
        # Not by repeat_interleave, which on some devices waits until the length of its result is known.
        rows=tokens // length,
        positions=tokens % length,
        max_seqlen=length,
        runs=((0, images, length),),
    )
