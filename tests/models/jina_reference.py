"""JinaBERT and jina-clip's image tower, slowly, in float64, one text or image at a time, straight from the formulas.

Shares no code with the package. `wrong` names one mistake that implementations make; each must be told from the right
result by the tests, or those would not notice it in ours.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

Variant = Literal["A", "B", "C"]

TEXT_MISTAKES = {
    "A": ("halves swapped", "tanh", "slopes by one formula", "no bias", "bias scaled", "one-sided"),
    "B": ("halves swapped", "tanh", "one residual", "one head's norm for all", "no q norm", "v normed too"),
    "C": ("halves swapped", "one head's norm for all", "no q norm", "one norm for each head"),
}
IMAGE_MISTAKES = (
    "no rotation",
    "rows and columns swapped",
    "CLS rotated",
    "half-split pairs",
    "k has q's bias",
    "no norm of heads",
    "no norm of gated",
    "gates swapped",
    "gelu gate",
    "mean pooled",
    "patches by column",
    "BGR",
    "not normalised",
)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.special.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: Tensor) -> Tensor:
    powers = torch.exp(x - x.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def slopes(heads: int) -> list[float]:
    if math.log2(heads).is_integer():
        return [2 ** (-8 * (h + 1) / heads) for h in range(heads)]
    power = 2 ** math.floor(math.log2(heads))
    return slopes(power) + slopes(2 * power)[0::2][: heads - power]


def jina_bert(
    tensors: Mapping[str, Tensor],
    variant: Variant,
    ids: Tensor,
    heads: int,
    *,
    activation: str = "gelu",
    eps: float = 1e-12,
    wrong: str = "",
) -> Tensor:
    """States of one text, [tokens, hidden], float64."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    act = {"gelu": gelu_tanh if wrong == "tanh" else gelu, "relu": lambda x: x.clamp(min=0)}[activation]

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    x = t["embeddings.word_embeddings.weight"][ids.long()] + t["embeddings.token_type_embeddings.weight"][0]
    x = norm(x, "embeddings.LayerNorm")
    length, width = x.shape
    head_dim = width // heads
    factors = [2 ** (-8 * (h + 1) / heads) for h in range(heads)] if "one formula" in wrong else slopes(heads)
    index = torch.arange(length, dtype=torch.float64)
    distance = (index[:, None] - index[None, :]).abs()
    if wrong == "one-sided":
        distance = (index[:, None] - index[None, :]).clamp(min=0)
    layer = 0
    while (name := f"encoder.layer.{layer}") and f"{name}.attention.self.query.weight" in t:
        own = f"{name}.attention.self"
        q, k, v = linear(x, f"{own}.query"), linear(x, f"{own}.key"), linear(x, f"{own}.value")
        if variant in ("B", "C"):
            q_norm, k_norm = f"{own}.layer_norm_q", f"{own}.layer_norm_k"
            if wrong in ("one head's norm for all", "one norm for each head"):
                parts = []
                for vectors, kind in ((q, q_norm), (k, k_norm)):
                    weight, bias = t[f"{kind}.weight"], t[f"{kind}.bias"]
                    if wrong == "one head's norm for all":
                        weight, bias = weight[:head_dim].repeat(heads), bias[:head_dim].repeat(heads)
                    split = vectors.view(length, heads, head_dim)
                    parts.append(
                        layer_norm(split, weight.view(heads, head_dim), bias.view(heads, head_dim), eps).flatten(1)
                    )
                q, k = parts
            else:
                q = q if wrong == "no q norm" else norm(q, q_norm)
                k = norm(k, k_norm)
                v = norm(v, k_norm) if wrong == "v normed too" else v
        context = torch.empty_like(q)
        for head in range(heads):
            own_channels = slice(head * head_dim, (head + 1) * head_dim)
            scores = q[:, own_channels] @ k[:, own_channels].T / math.sqrt(head_dim)
            bias = -factors[head] * distance
            if wrong == "bias scaled":
                bias = bias / math.sqrt(head_dim)
            if wrong != "no bias":
                scores = scores + bias
            context[:, own_channels] = softmax(scores) @ v[:, own_channels]
        a = norm(linear(context, f"{name}.attention.output.dense") + x, f"{name}.attention.output.LayerNorm")
        if variant == "B":
            a = norm(a if wrong == "one residual" else a + x, f"{name}.layer_norm_1")
        first, second = (a @ t[f"{name}.mlp.{'up_gated_layer' if variant == 'B' else 'gated_layers'}.weight"].T).chunk(
            2, dim=1
        )
        gate, up = (second, first) if (variant == "B") != (wrong == "halves swapped") else (first, second)
        y = linear(act(gate) * up, f"{name}.mlp.{'down_layer' if variant == 'B' else 'wo'}")
        x = norm(y + a, f"{name}.layer_norm_2" if variant == "B" else f"{name}.mlp.layernorm")
        layer += 1
    return x


def flash_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Variant A's tensors under the names of jina-clip's text tower, with Q, K and V in one."""
    renamed = {}
    for old, tensor in tensors.items():
        new = old.replace("embeddings.LayerNorm", "emb_ln").replace("encoder.layer.", "encoder.layers.")
        new = new.replace("attention.output.dense", "mixer.out_proj").replace("attention.output.LayerNorm", "norm1")
        new = new.replace("mlp.layernorm", "norm2")
        if ".attention.self.key." in new or ".attention.self.value." in new:
            continue
        if ".attention.self.query." in new:
            tensor = torch.cat([tensors[old.replace("query", part)] for part in ("query", "key", "value")])
            new = new.replace("attention.self.query", "mixer.Wqkv")
        renamed[f"text_model.transformer.{new}"] = tensor
    return renamed


def vision(
    tensors: Mapping[str, Tensor],
    pixels: Tensor,
    heads: int,
    patch: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    *,
    trained_grid: int | None = None,
    rotary: bool = True,
    eps: float = 1e-6,
    wrong: str = "",
) -> Tensor:
    """The vector of one image, uint8 [size, size, 3] → float64 [hidden], not normalised.

    trained_grid: pt_hw_seq_len with intp_freq; None without.
    """
    t = {
        name.removeprefix("vision_model."): tensor.double()
        for name, tensor in tensors.items()
        if name.startswith("vision_model.")
    }

    def norm(x: Tensor, name: str) -> Tensor:
        return layer_norm(x, t[f"{name}.weight"], t[f"{name}.bias"], eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    size = len(pixels)
    grid = size // patch
    image = pixels.double() / 255
    if wrong != "not normalised":
        image = (image - torch.tensor(mean, dtype=torch.float64)) / torch.tensor(std, dtype=torch.float64)
    if wrong == "BGR":
        image = image.flip(2)
    kernel = t["patch_embed.proj.weight"]
    width = len(kernel)
    tokens = [t["cls_token"][0, 0]]
    places = [(row, column) for row in range(grid) for column in range(grid)]
    if wrong == "patches by column":
        places = [(row, column) for column, row in places]
    for row, column in places:
        part = image[row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
        tokens.append((kernel * part.permute(2, 0, 1)).sum((1, 2, 3)) + t["patch_embed.proj.bias"])
    x = torch.stack(tokens) + t["pos_embed"][0]

    head_dim = width // heads
    half = head_dim // 2
    frequencies = torch.tensor([10000 ** (-2 * j / half) for j in range(half // 2)], dtype=torch.float64)
    scale = 1.0 if trained_grid is None else trained_grid / grid

    def turn(vectors: Tensor) -> Tensor:
        """[tokens, head_dim] of one head."""
        turned = vectors.clone()
        if wrong == "no rotation" or not rotary:
            return turned
        for token in range(len(vectors)):
            if token == 0 and wrong != "CLS rotated":
                continue
            row, column = divmod(max(token - 1, 0), grid)
            if token == 0:
                row, column = 1, 1
            if wrong == "rows and columns swapped":
                row, column = column, row
            for axis, position in ((0, row), (1, column)):
                begin, end = axis * half, (axis + 1) * half
                first, second = slice(begin, end, 2), slice(begin + 1, end, 2)
                if wrong == "half-split pairs":
                    first, second = slice(begin, begin + half // 2), slice(begin + half // 2, end)
                cos, sin = torch.cos(position * scale * frequencies), torch.sin(position * scale * frequencies)
                a, b = vectors[token, first], vectors[token, second]
                turned[token, first], turned[token, second] = a * cos - b * sin, b * cos + a * sin
        return turned

    block = 0
    while (name := f"blocks.{block}") and f"{name}.norm1.weight" in t:
        inner = norm(x, f"{name}.norm1")
        if f"{name}.attn.qkv.weight" in t:
            q, k, v = (inner @ t[f"{name}.attn.qkv.weight"].T).chunk(3, dim=1)
        else:
            q, k, v = (inner @ t[f"{name}.attn.{part}_proj.weight"].T for part in "qkv")
        if f"{name}.attn.q_bias" in t:
            q, v = q + t[f"{name}.attn.q_bias"], v + t[f"{name}.attn.v_bias"]
            # Without the rotation it would not show: it shifts all scores of a query alike.
            k = k + t[f"{name}.attn.q_bias"] if wrong == "k has q's bias" else k
        context = torch.empty_like(q)
        for head in range(heads):
            own = slice(head * head_dim, (head + 1) * head_dim)
            scores = turn(q[:, own]) @ turn(k[:, own]).T / math.sqrt(head_dim)
            context[:, own] = softmax(scores) @ v[:, own]
        if f"{name}.attn.inner_attn_ln.weight" in t and wrong != "no norm of heads":
            context = norm(context, f"{name}.attn.inner_attn_ln")
        x = x + linear(context, f"{name}.attn.proj")
        inner = norm(x, f"{name}.norm2")
        gate, up = linear(inner, f"{name}.mlp.w1"), linear(inner, f"{name}.mlp.w2")
        if wrong == "gates swapped":
            gate, up = up, gate
        gated = (gelu(gate) if wrong == "gelu gate" else gate / (1 + torch.exp(-gate))) * up
        if f"{name}.mlp.ffn_ln.weight" in t and wrong != "no norm of gated":
            gated = norm(gated, f"{name}.mlp.ffn_ln")
        x = x + linear(gated, f"{name}.mlp.w3")
        block += 1
    x = norm(x, "norm")
    return x.mean(0) if wrong == "mean pooled" else x[0]
