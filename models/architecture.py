"""config.json → one frozen Architecture: what a family computes, in sizes and switches. No torch.

A field that would change vectors is applied or refused by name. `read_architecture` chooses the family; where it is
none of ours, the result is a ForeignArchitecture, which only the `transformers` backend runs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from embedserve.models.json_file import JsonFile

# Far above every encoder there is: beyond it lies a broken file, not a larger model.
LARGEST_HIDDEN_SIZE = 1 << 16
_LARGEST_LAYERS = 1 << 10
_LARGEST_HEADS = 1 << 10
_LARGEST_INTERMEDIATE = 1 << 18
_LARGEST_VOCABULARY = 1 << 24
_LARGEST_POSITIONS = 1 << 22
_LARGEST_IMAGE = 1 << 12


@dataclass(frozen=True)
class BertArchitecture:
    """A post-LN encoder with learned positions: BERT, RoBERTa, XLM-RoBERTa.

    position_rows: rows of the position table. position_offset: the row of a text's first token. activation: a key of
    `kernels.activation.ACTIVATIONS`.
    """

    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    position_rows: int
    position_offset: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text that has a row of the position table for each."""
        return self.position_rows - self.position_offset


@dataclass(frozen=True)
class JinaBertArchitecture:
    """JinaBERT: a post-LN encoder with ALiBi and gated feed-forward blocks. Which of its variants, the tensors tell.

    activation: of the gate, "gelu" (GEGLU) or "relu" (ReGLU).
    """

    family: ClassVar[str] = "jina_bert"
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str


@dataclass(frozen=True)
class Qwen3Architecture:
    """Qwen3: a pre-norm causal decoder with grouped heads. Queries are num_heads · head_dim wide, not hidden_size."""

    family: ClassVar[str] = "qwen3"
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float


@dataclass(frozen=True)
class VisionArchitecture:
    """The image tower of jina-clip-v1, an EVA02 vision transformer. Images are image_size pixels square.

    rope_scale: positions of the rotary embedding run over 0 … grid - 1, times this.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    rotary: bool
    rope_scale: float
    qkv_bias: bool
    sub_norm: bool
    layer_norm_eps: float = 1e-6

    @property
    def grid(self) -> int:
        """Patches in a row, and rows of patches."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class JinaClipArchitecture:
    """jina-clip-v1: a JinaBERT for texts and a vision transformer for images, whose vectors share one space."""

    family: ClassVar[str] = "jina_clip"
    text: JinaBertArchitecture
    vision: VisionArchitecture

    @property
    def hidden_size(self) -> int:
        """Components of a token's state, and of an image's."""
        return self.text.hidden_size

    @property
    def vocab_size(self) -> int:
        """Of the text tower."""
        return self.text.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text."""
        return self.text.max_positions


@dataclass(frozen=True)
class ForeignArchitecture:
    """None of our families: the `transformers` backend runs it, if transformers knows model_type.

    remote_code: config.json names code of the checkpoint's own, which is never run.
    """

    family: ClassVar[str] = "foreign"
    model_type: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    remote_code: bool


Architecture = BertArchitecture | JinaBertArchitecture | Qwen3Architecture | JinaClipArchitecture | ForeignArchitecture


def read_architecture(values: JsonFile) -> Architecture:
    """Read config.json. Raises CheckpointError, naming file and field."""
    model_type = values.string("model_type")
    if not model_type:
        values.fail("model_type", model_type, "expected the name of an architecture")
    values.refuse("quantization_config", [], "quantised checkpoints are not supported; use the original one")
    values.refuse("pruned_heads", [{}, []], "pruned heads are not supported; use the unpruned model")
    # A JinaBERT calls itself "bert", and plain BERT would run it with wrong vectors.
    if model_type in ("bert", "jina_bert") and _says_jina(values):
        return _read_jina_bert(values)
    return _READERS.get(model_type, _read_foreign)(values)


def _says_jina(values: JsonFile) -> bool:
    if values.get("position_embedding_type") == "alibi":
        return True
    named = json.dumps([values.get("architectures"), values.get("auto_map"), values.get("model_type")])
    return "jina" in named.lower() or any(
        values.get(name) is not None for name in ("feed_forward_type", "emb_pooler", "alibi_starting_size")
    )


# --- BERT and XLM-RoBERTa ---------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


def _read_bert(values: JsonFile) -> BertArchitecture:
    _expect_classes(values, ("Bert",))
    return _post_norm_encoder(values, "bert")


def _read_xlm_roberta(values: JsonFile) -> BertArchitecture:
    _expect_classes(values, ("XLMRoberta", "Roberta", "Camembert"))
    architecture = _post_norm_encoder(values, "xlm_roberta")
    # A row for the padding, rows before it that nothing uses, and then the first token's.
    pad = values.integer("pad_token_id", 0, architecture.vocab_size - 1, default=1)
    if pad + 1 >= architecture.position_rows:
        values.fail(
            "max_position_embeddings",
            architecture.position_rows,
            f"expected more than {pad + 1}: positions begin behind pad_token_id",
        )
    return replace(architecture, position_offset=pad + 1)


def _post_norm_encoder(values: JsonFile, family: str) -> BertArchitecture:
    values.refuse("position_embedding_type", ["absolute"], "supported is absolute")
    _refuse_remote_code(values)
    _refuse_decoders(values)
    hidden, heads = _hidden_size_and_heads(values)
    activation = values.string("hidden_act") or "gelu"
    if activation not in _ACTIVATIONS:
        values.fail("hidden_act", activation, f"supported are {', '.join(_ACTIVATIONS)}")
    return BertArchitecture(
        family=family,
        hidden_size=hidden,
        num_layers=values.integer("num_hidden_layers", 1, _LARGEST_LAYERS),
        num_heads=heads,
        intermediate_size=values.integer("intermediate_size", 1, _LARGEST_INTERMEDIATE),
        vocab_size=values.integer("vocab_size", 1, _LARGEST_VOCABULARY),
        position_rows=values.integer("max_position_embeddings", 1, _LARGEST_POSITIONS),
        position_offset=0,
        type_vocab_size=values.integer("type_vocab_size", 1, 1 << 10, default=2),
        layer_norm_eps=values.number("layer_norm_eps", 0, 1, default=1e-12),
        activation=_ACTIVATIONS[activation],
    )


def _expect_classes(values: JsonFile, prefixes: tuple[str, ...]) -> None:
    """Fail unless `architectures`, where it is given, names classes of transformers that begin so."""
    architectures = values.get("architectures")
    if architectures is None:
        return
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        values.fail("architectures", architectures, "expected a list of class names")
    for name in architectures:
        if not name.startswith(prefixes):
            values.fail(
                "architectures",
                architectures,
                f"expected {prefixes[0]}Model or another {' or '.join(prefixes)} class of transformers",
            )


def _refuse_remote_code(values: JsonFile) -> None:
    if values.get("auto_map"):
        code = "code from checkpoints is never run, and the family that model_type names would compute something else"
        values.fail("auto_map", values.get("auto_map"), code)


def _refuse_decoders(values: JsonFile) -> None:
    for name in ("is_decoder", "add_cross_attention", "is_causal", "is_encoder_decoder"):
        if values.boolean(name, False):
            values.fail(name, True, "expected false: this family attends in both directions")


def _hidden_size_and_heads(values: JsonFile) -> tuple[int, int]:
    hidden = values.integer("hidden_size", 1, LARGEST_HIDDEN_SIZE)
    heads = values.integer("num_attention_heads", 1, _LARGEST_HEADS)
    if hidden % heads:
        values.fail("hidden_size", hidden, f"expected a multiple of num_attention_heads ({heads})")
    return hidden, heads


# --- JinaBERT ---------------------------------------------------------------------------------------------------------

_GATES = {"geglu": "gelu", "reglu": "relu"}


def _read_jina_bert(values: JsonFile) -> JinaBertArchitecture:
    values.refuse(
        "position_embedding_type", ["alibi"], "other fields say that this is a JinaBERT, whose positions are alibi"
    )
    values.refuse("emb_pooler", ["mean"], "supported is mean")
    _refuse_decoders(values)
    hidden, heads = _hidden_size_and_heads(values)
    # Where it is absent the tensors' names still tell a gated block from a plain one.
    gate = values.string("feed_forward_type") or "geglu"
    if gate not in _GATES:
        values.fail("feed_forward_type", gate, f"supported are {', '.join(_GATES)}")
    return JinaBertArchitecture(
        hidden_size=hidden,
        num_layers=values.integer("num_hidden_layers", 1, _LARGEST_LAYERS),
        num_heads=heads,
        intermediate_size=values.integer("intermediate_size", 1, _LARGEST_INTERMEDIATE),
        vocab_size=values.integer("vocab_size", 1, _LARGEST_VOCABULARY),
        max_positions=values.integer("max_position_embeddings", 1, _LARGEST_POSITIONS),
        type_vocab_size=values.integer("type_vocab_size", 1, 1 << 10, default=2),
        layer_norm_eps=values.number("layer_norm_eps", 0, 1, default=1e-12),
        activation=_GATES[gate],
    )


# --- Qwen3 ------------------------------------------------------------------------------------------------------------


def _read_qwen3(values: JsonFile) -> Qwen3Architecture:
    _expect_classes(values, ("Qwen3",))
    _refuse_remote_code(values)
    values.refuse("hidden_act", ["silu"], "supported is silu")
    values.refuse("attention_bias", [False], "supported is false")
    values.refuse("use_sliding_window", [False], "supported is false: every layer sees the whole text")
    values.refuse("is_causal", [True], "supported is true")
    values.refuse("use_bidirectional_attention", [False], "supported is false")
    kinds = values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds)):
        values.fail("layer_types", kinds, "supported is full_attention in every layer")
    heads = values.integer("num_attention_heads", 1, _LARGEST_HEADS)
    kv_heads = values.integer("num_key_value_heads", 1, heads, default=heads)
    if heads % kv_heads:
        values.fail("num_key_value_heads", kv_heads, f"expected a divisor of num_attention_heads ({heads})")
    head_dim = values.integer("head_dim", 2, 1 << 10, default=128)
    if head_dim % 2:
        values.fail("head_dim", head_dim, "expected an even number: rotary embeddings turn pairs of components")
    return Qwen3Architecture(
        hidden_size=values.integer("hidden_size", 1, LARGEST_HIDDEN_SIZE),
        num_layers=values.integer("num_hidden_layers", 1, _LARGEST_LAYERS),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=values.integer("intermediate_size", 1, _LARGEST_INTERMEDIATE),
        vocab_size=values.integer("vocab_size", 1, _LARGEST_VOCABULARY),
        max_positions=values.integer("max_position_embeddings", 1, _LARGEST_POSITIONS),
        rms_norm_eps=values.number("rms_norm_eps", 0, 1, default=1e-6),
        rope_theta=_rope_theta(values),
    )


def _rope_theta(values: JsonFile) -> float:
    """The base of the rotary frequencies: transformers 4 writes rope_theta, transformers 5 rope_parameters."""
    for name in ("rope_scaling", "rope_parameters"):
        scaling = values.child(name)
        for kind in ("rope_type", "type"):
            scaling.refuse(kind, ["default"], "stretched rotary embeddings are not supported")
    parameters = values.child("rope_parameters")
    source = parameters if parameters.get("rope_theta") is not None else values
    return source.number("rope_theta", 1, 1e12, default=10_000.0)


# --- jina-clip --------------------------------------------------------------------------------------------------------

# The text tower's sizes stand in the repository that hf_model_name_or_path names, not in the checkpoint: those of
# jinaai/jina-bert-flash-implementation, which hf_model_config_kwargs may change.
_CLIP_TEXT = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "vocab_size": 30528,
    "max_position_embeddings": 8192,
}


def _read_jina_clip(values: JsonFile) -> JinaClipArchitecture:
    text, vision = values.child("text_config"), values.child("vision_config")
    values.refuse("add_projections", [False], "projections are not supported")
    for settings in (text, vision):
        settings.refuse("proj_type", [], "projections are not supported")
    text.refuse("pooler_type", ["mean_pooler"], "supported is mean_pooler")
    kwargs = text.child("hf_model_config_kwargs")
    bert = _read_jina_bert(
        JsonFile(values.path, {**_CLIP_TEXT, **kwargs.values}, "text_config.hf_model_config_kwargs.")
    )
    width = text.integer("embed_dim", 1, LARGEST_HIDDEN_SIZE, default=bert.hidden_size)
    if width != bert.hidden_size:
        text.fail("embed_dim", width, f"expected the hidden_size of the text tower ({bert.hidden_size})")
    tower = _read_vision(vision)
    if tower.hidden_size != bert.hidden_size:
        vision.fail(
            "width", tower.hidden_size, f"expected that of the text tower ({bert.hidden_size}): vectors share a space"
        )
    return JinaClipArchitecture(text=bert, vision=tower)


def _read_vision(values: JsonFile) -> VisionArchitecture:
    width = values.integer(
        "width", 1, LARGEST_HIDDEN_SIZE, default=values.integer("embed_dim", 1, 1 << 16, default=768)
    )
    values.refuse("embed_dim", [width], "expected the width: the head is the identity")
    values.refuse("ls_init_value", [], "layer scale is not supported")
    values.refuse("naive_swiglu", [True], "supported is true")
    values.refuse("post_norm", [False], "supported is false")
    head_width = values.integer("head_width", 1, 1 << 10, default=64)
    if width % head_width or head_width % 4:
        values.fail("head_width", head_width, f"expected a multiple of 4 that divides the width ({width})")
    image, patch = (
        values.integer("image_size", 1, _LARGEST_IMAGE, default=224),
        values.integer("patch_size", 1, _LARGEST_IMAGE, default=16),
    )
    if image % patch:
        values.fail("patch_size", patch, f"expected a divisor of image_size ({image})")
    grid = image // patch
    # The rotary table has pt_hw_seq_len² rows; where they are not stretched to the grid, they must be the grid's.
    stretched = values.boolean("intp_freq", False)
    trained = values.integer("pt_hw_seq_len", 1, _LARGEST_IMAGE, default=16 if stretched else grid)
    if not stretched and trained != grid:
        values.fail("pt_hw_seq_len", trained, f"expected the patches of a row ({grid}) where intp_freq is false")
    return VisionArchitecture(
        hidden_size=width,
        num_layers=values.integer("layers", 1, _LARGEST_LAYERS, default=12),
        num_heads=width // head_width,
        intermediate_size=int(width * values.number("mlp_ratio", 0, 64, default=2.6667)),
        image_size=image,
        patch_size=patch,
        rotary=values.boolean("rope_embeddings", True),
        rope_scale=trained / grid,
        qkv_bias=values.boolean("qkv_bias", True),
        sub_norm=values.boolean("subln", True),
    )


# --- everything else --------------------------------------------------------------------------------------------------

# What architectures call the same thing; the first that is there counts.
_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd", "embedding_size")
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Their position tables begin behind the row of the padding, as RoBERTa's do.
_OFFSET_BY_PADDING = frozenset(
    {"mpnet", "longformer", "roberta-prelayernorm", "xlm-roberta-xl", "data2vec-text", "ibert"}
)


def _read_foreign(values: JsonFile) -> ForeignArchitecture:
    model_type = values.string("model_type") or ""
    # Models of several towers keep the text's settings apart.
    own = any(name in values.values for name in _WIDTHS) or "text_config" not in values.values
    sizes = values if own else values.child("text_config")
    width = next((name for name in _WIDTHS if name in sizes.values), "hidden_size")
    length = next((name for name in _LENGTHS if name in sizes.values), None)
    # T5 and its kin have relative positions, and no limit of their own.
    positions = sizes.integer(length, 1, _LARGEST_POSITIONS) if length is not None else _LARGEST_POSITIONS
    if model_type in _OFFSET_BY_PADDING:
        positions -= sizes.integer("pad_token_id", 0, 1 << 24, default=1) + 1
        if positions < 1:
            sizes.fail(length or "max_position_embeddings", positions, "expected more positions than pad_token_id")
    return ForeignArchitecture(
        model_type=model_type,
        hidden_size=sizes.integer(width, 1, LARGEST_HIDDEN_SIZE),
        vocab_size=sizes.integer("vocab_size", 1, _LARGEST_VOCABULARY),
        max_positions=positions,
        remote_code=bool(values.get("auto_map")),
    )


_READERS: dict[str, Callable[[JsonFile], Architecture]] = {
    "bert": _read_bert,
    "xlm-roberta": _read_xlm_roberta,
    "roberta": _read_xlm_roberta,
    "camembert": _read_xlm_roberta,
    "jina_bert": _read_jina_bert,
    "qwen3": _read_qwen3,
    "jina_clip": _read_jina_clip,
}
