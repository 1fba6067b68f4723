"""A checkpoint folder's files → one frozen ModelConfig. Every quirk of a foreign format ends here.

Read are, where present: modules.json and each module's folder, config.json (see `architecture`),
sentence_bert_config.json, tokenizer_config.json (its model_max_length and flags of BERT's normaliser),
config_sentence_transformers.json, preprocessor_config.json of image models. The meaning is the one that
sentence-transformers 6.2 gives them. Whatever changes vectors is applied or refused by name, never passed over.

Imports no torch: front ends read the same configuration as engines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from embedserve.models.architecture import (
    LARGEST_HIDDEN_SIZE,
    Architecture,
    BertArchitecture,
    JinaClipArchitecture,
    read_architecture,
)
from embedserve.models.errors import CheckpointError
from embedserve.models.files import present
from embedserve.models.json_file import JsonFile, is_integer, kind_of, load_json

Pooling = Literal["cls", "mean", "max", "last"]

MAX_PROMPT_CHARACTERS = 8192
"""It is put before each of a request's texts, so its length counts as often."""


@dataclass(frozen=True)
class DimensionRange:
    """The vector sizes that a Matryoshka model was trained for: minimum to maximum, or only the listed ones."""

    minimum: int
    maximum: int
    listed: tuple[int, ...] | None = None

    def allows(self, dimension: int) -> bool:
        """Whether vectors may be cut to this size."""
        if self.listed is not None:
            return dimension in self.listed
        return self.minimum <= dimension <= self.maximum

    def __str__(self) -> str:
        if self.listed is not None:
            return ", ".join(map(str, self.listed))
        return f"{self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class ImageSettings:
    """How an image becomes pixels: its shortest edge is scaled to `size`, bicubic, and the middle is cut out.

    mean, std: of red, green and blue, on a scale from 0 to 1; pixels are `(x / 255 - mean) / std`.
    tokens: what the model makes of one image; its cost, and what a request is charged.
    """

    size: int
    tokens: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class ModelConfig:
    """What a checkpoint asks for. Sizes are in components, lengths in tokens including the special ones.

    folder: as given. weights_folder: where config.json, the tokenizer's files and the weights are (the same, or a
        subfolder that modules.json names).
    architecture: what config.json says.
    outputs: what the weights can give: "dense", and with bge-m3's heads "sparse" and "colbert".
    images: how images are prepared; None for models of texts alone.
    pooling, normalize: how token states become a vector.
    max_tokens: texts are cut to this length; never more than max_positions.
    do_lower_case: the front end's tokenizer lowers the text (prompt included) before its own normaliser. Nothing
        else is done to a text: sentence-transformers 6 does not strip it.
    bert_normalizer: flags of BERT's normaliser (lowercase, strip_accents, handle_chinese_chars) that
        tokenizer_config.json states; in transformers they count more than what tokenizer.json says.
    prompts: prefixes by name, put before the text as they stand. default_prompt_name: the one that
        sentence-transformers puts before every text for which none is asked; a server follows it or says so.
    include_prompt: false where the prompt's tokens stay out of the pooling; only ever false without prompts.
    instruction: what a query's instruction is put into, at `{instruction}`, to make its prompt; None where the model
        was trained without one.
    append_token_ids: what must stand at the end of every text, appended where the tokenizer's own rules do not.
    ignored_token_ids: special tokens that a sparse vector leaves out.
    matryoshka: sizes that vectors may be cut to, None where the model was not trained for it.
    default_dimension: vectors have this size unless the request says otherwise.
    stored_dtype: as config.json names it, or None.
    assumed: names of fields on which the files are silent, so that the value is a convention and the catalogue may
        know better.
    """

    folder: Path
    weights_folder: Path
    architecture: Architecture
    pad_token_id: int
    pooling: Pooling
    normalize: bool
    max_tokens: int
    do_lower_case: bool
    include_prompt: bool
    default_prompt_name: str | None
    similarity: str
    matryoshka: DimensionRange | None
    default_dimension: int
    stored_dtype: str | None
    prompts: Mapping[str, str] = field(default_factory=dict)
    bert_normalizer: Mapping[str, bool | None] = field(default_factory=dict)
    outputs: tuple[str, ...] = ("dense",)
    images: ImageSettings | None = None
    instruction: str | None = None
    append_token_ids: tuple[int, ...] = ()
    ignored_token_ids: tuple[int, ...] = ()
    assumed: frozenset[str] = frozenset()

    @property
    def family(self) -> str:
        """A key of `registry.FAMILIES`, or "foreign"."""
        return self.architecture.family

    @property
    def hidden_size(self) -> int:
        """Components of a token's state."""
        return self.architecture.hidden_size

    @property
    def vocab_size(self) -> int:
        """Rows of the token embeddings."""
        return self.architecture.vocab_size

    @property
    def max_positions(self) -> int:
        """Tokens of the longest text that the weights can take."""
        return self.architecture.max_positions

    @property
    def modalities(self) -> tuple[str, ...]:
        """What can be embedded: "text", and for image models "image"."""
        return ("text",) if self.images is None else ("text", "image")

    @property
    def dimension(self) -> int:
        """Components of an uncut vector."""
        return self.hidden_size

    @property
    def default_prompt(self) -> str:
        """The prompt of default_prompt_name, or the empty string."""
        return self.prompts[self.default_prompt_name] if self.default_prompt_name is not None else ""


def read_config(folder: Path) -> ModelConfig:
    """Read a sentence-transformers folder or a plain Hugging Face one.

    A plain folder says nothing of pooling; it gets sentence-transformers' convention, the mean without normalisation,
    and names both in `assumed`. Raises CheckpointError, naming file and field, for anything missing, malformed or
    unsupported.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected one with config.json and model.safetensors")
    modules = _read_modules(folder)
    weights_folder = modules.transformer
    if present(weights_folder / "adapter_config.json"):
        raise CheckpointError(
            f"{weights_folder / 'adapter_config.json'}: adapters are not supported; merge it into the model "
            "(merge_and_unload of peft) and serve the result"
        )
    if not present(weights_folder / "config.json") and weights_folder == folder:
        raise CheckpointError(
            f"{folder / 'config.json'}: the file is missing; copy the whole checkpoint folder. A folder of several "
            "models is named with --models-dir, and the models in it with --model"
        )
    values = JsonFile.read(weights_folder / "config.json")
    architecture = read_architecture(values)
    hidden = architecture.hidden_size
    if modules.pooled_size not in (None, hidden):
        raise CheckpointError(
            f"{modules.pooling_file}: the pooling expects {modules.pooled_size} components, but "
            f"{weights_folder / 'config.json'} has hidden_size {hidden}; the files do not belong together"
        )
    text = _read_text_settings(weights_folder, architecture.max_positions)
    settings = _read_sentence_settings(folder, hidden, modules.include_prompt)
    assumed = modules.assumed | text.pop("assumed") | settings.pop("assumed")
    return ModelConfig(
        folder=folder,
        weights_folder=weights_folder,
        architecture=architecture,
        pad_token_id=0
        if values.get("pad_token_id") is None
        else values.integer("pad_token_id", 0, architecture.vocab_size - 1),
        pooling=modules.pooling,
        normalize=modules.normalize,
        include_prompt=modules.include_prompt,
        matryoshka=_read_matryoshka(values, hidden),
        stored_dtype=values.string("dtype") or values.string("torch_dtype"),
        images=_read_image_settings(weights_folder, architecture),
        assumed=assumed,
        **_read_heads(weights_folder, values, architecture),
        **text,
        **settings,
    )


# --- modules.json -----------------------------------------------------------------------------------------------------


@dataclass
class _Modules:
    transformer: Path
    pooling: Pooling = "mean"
    pooling_file: Path | None = None
    pooled_size: int | None = None
    include_prompt: bool = True
    normalize: bool = False
    assumed: frozenset[str] = frozenset()


def _read_modules(folder: Path) -> _Modules:
    path = folder / "modules.json"
    if _is_jina_clip(folder):
        # Its modules.json names code of the checkpoint's own, which pools the mean and normalises.
        return _Modules(transformer=folder, normalize=True)
    if not present(path):
        return _Modules(transformer=folder, assumed=frozenset({"pooling", "normalize"}))
    entries = load_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: expected a list of objects, found {kind_of(entries)}; copy the file again")
    steps = [_read_module(path, entry) for entry in entries]
    names = [name for name, _ in steps]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise CheckpointError(
            f"{path}: the modules are {', '.join(names) or 'none'}; supported are Transformer, Pooling and, if wanted, "
            "Normalize, in this order"
        )
    modules = _Modules(transformer=steps[0][1])
    _read_pooling(modules, steps[1][1] / "config.json")
    if len(steps) == 3:
        normalize = JsonFile.read_optional(steps[2][1] / "config.json")
        for name in ("module_input_name", "module_output_name"):
            normalize.refuse(name, ["sentence_embedding"], "only the sentence embedding can be normalised")
        modules.normalize = True
    return modules


def _is_jina_clip(folder: Path) -> bool:
    path = folder / "config.json"
    return present(path) and JsonFile.read(path).get("model_type") == "jina_clip"


def _read_module(path: Path, entry: dict[str, Any]) -> tuple[str, Path]:
    """(class name, folder) of one entry."""
    values = JsonFile(path, entry)
    kind, place = values.string("type"), values.string("path")
    if not kind:
        values.fail("type", entry.get("type"), "expected the class of a module")
    if place is None:
        values.fail("path", None, "expected the module's folder, or an empty string")
    name = kind.rpartition(".")[2]
    # The package moved its modules twice; an equally named class of somebody else's code is not the same module.
    if not kind.startswith("sentence_transformers.") or name not in ("Transformer", "Pooling", "Normalize"):
        values.fail(
            "type",
            kind,
            "this module is not supported and leaving it out would give other vectors; "
            "supported are Transformer, Pooling and Normalize of sentence-transformers",
        )
    values.refuse("kwargs", [[], {}], "arguments of modules are not supported")
    relative = PurePosixPath(place)
    if relative.is_absolute() or ".." in relative.parts or "\\" in place or ":" in place or "\0" in place:
        values.fail("path", place, "expected a folder inside the checkpoint")
    return name, path.parent / place


_LEGACY_POOLING: dict[str, str] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_POOLINGS: dict[str, Pooling] = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_POOLING_FIELDS = frozenset(
    {*_LEGACY_POOLING, "pooling_mode", "embedding_dimension", "word_embedding_dimension", "include_prompt"}
)


def _read_pooling(modules: _Modules, path: Path) -> None:
    values = JsonFile.read(path)
    values.refuse_unknown(_POOLING_FIELDS, "this field of a Pooling module is unknown, so vectors might differ")
    size = "embedding_dimension" if "embedding_dimension" in values.values else "word_embedding_dimension"
    modules.pooling_file = path
    modules.pooled_size = values.integer(size, 1, LARGEST_HIDDEN_SIZE)
    modules.include_prompt = values.boolean("include_prompt", True)

    named = values.get("pooling_mode")
    flags = [mode for flag, mode in _LEGACY_POOLING.items() if values.boolean(flag, False)]
    if named is None:
        # sentence-transformers takes the mean where no flag is set.
        modes, shown = flags or ["mean"], "pooling_mode_*"
    else:
        modes, shown = (named if isinstance(named, list) else [named]), "pooling_mode"
    if len(modes) != 1:
        values.fail(shown, modes, "combined pooling modes are not supported; expected one of cls, mean, max, lasttoken")
    if not isinstance(modes[0], str) or modes[0] not in _POOLINGS:
        values.fail(shown, modes[0], "this pooling is not supported; expected one of cls, mean, max, lasttoken")
    modules.pooling = _POOLINGS[modes[0]]


# --- config.json, what is not the architecture's ----------------------------------------------------------------------

# Output → the file of its weights, and the pickle that the author published.
HEADS = {
    "sparse": ("sparse_linear.safetensors", "sparse_linear.pt"),
    "colbert": ("colbert_linear.safetensors", "colbert_linear.pt"),
}
# XLM-RoBERTa's vocabulary begins with <s> <pad> </s> <unk>; config.json names all but the last.
_XLM_ROBERTA_UNKNOWN = 3


def _read_heads(folder: Path, values: JsonFile, architecture: Architecture) -> dict[str, Any]:
    """Outputs of bge-m3 besides the dense one, by the files that are there."""
    if not isinstance(architecture, BertArchitecture):
        return {}
    found = [output for output, (file, _) in HEADS.items() if present(folder / file)]
    for output, (file, pickle) in HEADS.items():
        if output not in found and present(folder / pickle):
            raise CheckpointError(
                f"{folder / pickle}: a pickle can run code when it is read, so only safetensors are loaded, and "
                f"without {file} the {output} output would be missing; run `embedserve convert {folder}`"
            )
    if not found:
        return {}
    last = architecture.vocab_size - 1
    named = [
        values.integer(name, 0, last, default=default)
        for name, default in (("bos_token_id", 0), ("pad_token_id", 1), ("eos_token_id", 2))
    ]
    return {"outputs": ("dense", *found), "ignored_token_ids": (*named, _XLM_ROBERTA_UNKNOWN)}


def _read_image_settings(folder: Path, architecture: Architecture) -> ImageSettings | None:
    if not isinstance(architecture, JinaClipArchitecture):
        return None
    values = JsonFile.read_optional(folder / "preprocessor_config.json")
    size = architecture.vision.image_size
    values.refuse("size", [size, [size, size]], f"expected the image_size of config.json ({size})")
    values.refuse("resize_mode", ["shortest"], "supported is shortest")
    values.refuse("interpolation", ["bicubic"], "supported is bicubic")
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        values.refuse(name, [True], "supported is true")
    # Those of OpenAI's CLIP.
    mean = _triple(values, "mean", (0.48145466, 0.4578275, 0.40821073), lowest=-10)
    std = _triple(values, "std", (0.26862954, 0.26130258, 0.27577711), lowest=0)
    # Its patches, and the one that is pooled.
    return ImageSettings(size, architecture.vision.grid**2 + 1, mean, std)


def _triple(
    values: JsonFile, name: str, default: tuple[float, float, float], *, lowest: float
) -> tuple[float, float, float]:
    """`mean` or `std`, which other image processors call `image_mean` and `image_std`."""
    name = name if values.get(name) is not None else f"image_{name}"
    found = values.get(name)
    if found is None:
        return default
    if not (
        isinstance(found, list)
        and len(found) == 3
        and all(isinstance(x, int | float) and not isinstance(x, bool) and lowest < x < 10 for x in found)
    ):
        values.fail(name, found, f"expected three numbers above {lowest:g} and below 10")
    red, green, blue = map(float, found)
    return red, green, blue


def _read_matryoshka(values: JsonFile, hidden: int) -> DimensionRange | None:
    """`is_matryoshka` and `matryoshka_dimensions`, the fields that vLLM and model authors agreed on."""
    listed = values.get("matryoshka_dimensions")
    if listed is not None and not (
        isinstance(listed, list) and all(is_integer(size) and 1 <= size <= hidden for size in listed)
    ):
        values.fail("matryoshka_dimensions", listed, f"expected a list of integers from 1 to hidden_size ({hidden})")
    enabled = bool(listed) if values.get("is_matryoshka") is None else values.boolean("is_matryoshka", False)
    if not enabled:
        return None
    if not listed:
        return DimensionRange(1, hidden)
    sizes = tuple(sorted({*listed, hidden}))
    return DimensionRange(sizes[0], hidden, sizes)


# --- texts and prompts ------------------------------------------------------------------------------------------------

_SENTENCE_FILES = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_SENTENCE_FIELDS = frozenset(
    {
        "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs",
        "processing_kwargs", "query_length", "document_length", "query_expansion", "tokenizer_name_or_path",
        "model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs",
    }
)  # fmt: skip
_TEXT_ONLY = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
# How the model is loaded, not what it computes.
_HARMLESS_MODEL_ARGS = frozenset(
    {"attn_implementation", "dtype", "torch_dtype", "trust_remote_code", "low_cpu_mem_usage"}
)


def _read_text_settings(folder: Path, max_positions: int) -> dict[str, Any]:
    """max_tokens and do_lower_case, from the first sentence_*_config.json that is there."""
    path = next((folder / name for name in _SENTENCE_FILES if present(folder / name)), folder / _SENTENCE_FILES[0])
    values = JsonFile.read_optional(path)
    values.refuse_unknown(_SENTENCE_FIELDS, "this field is unknown, so vectors might differ")
    values.refuse("transformer_task", ["feature-extraction"], "supported is feature-extraction")
    values.refuse("modality_config", [_TEXT_ONLY], "supported is text through forward and last_hidden_state")
    values.refuse("module_output_name", ["token_embeddings"], "supported is token_embeddings")
    values.refuse("processing_kwargs", [{}], "arguments of the tokenizer's call are not supported")
    for name in ("query_length", "document_length", "query_expansion"):
        values.refuse(name, [], "lengths by task are not supported")
    values.refuse(
        "tokenizer_name_or_path", [], "a tokenizer from another folder is not supported; put it beside config.json"
    )
    for name in ("tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"):
        values.refuse(
            name, [{}, {"trust_remote_code": False}, {"trust_remote_code": True}], "these arguments are not supported"
        )
    for name in ("model_args", "model_kwargs"):
        arguments = values.get(name)
        if arguments is not None and not (isinstance(arguments, dict) and set(arguments) <= _HARMLESS_MODEL_ARGS):
            values.fail(name, arguments, f"supported are {', '.join(sorted(_HARMLESS_MODEL_ARGS))}")

    stated = None
    if values.get("max_seq_length") is not None:
        stated = values.integer("max_seq_length", 1, 1 << 30)
    tokenizer = JsonFile.read_optional(folder / "tokenizer_config.json")
    length = tokenizer.get("model_max_length")
    if stated is None and length is not None:
        # transformers writes int(1e30) for "no limit"; some files have it as 1e30.
        if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
            tokenizer.fail("model_max_length", length, "expected a positive integer")
        stated = int(min(length, max_positions))
    return {
        "max_tokens": min(stated if stated is not None else max_positions, max_positions),
        "do_lower_case": values.boolean("do_lower_case", False),
        "bert_normalizer": {
            flag: None if tokenizer.get(name) is None else tokenizer.boolean(name, False)
            for name, flag in _NORMALIZER_FLAGS.items()
            # Only strip_accents has a meaning for null: as lowercase says.
            if name in tokenizer.values and (tokenizer.get(name) is not None or name == "strip_accents")
        },
        # Without a sentence_*_config.json the number is the tokenizer's, often more than the model was trained on.
        "assumed": frozenset() if values.get("max_seq_length") is not None else frozenset({"max_tokens"}),
    }


# tokenizer_config.json's name of a flag → that of BertNormalizer in tokenizer.json.
_NORMALIZER_FLAGS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}

_SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")


def _read_sentence_settings(folder: Path, hidden: int, include_prompt: bool) -> dict[str, Any]:
    values = JsonFile.read_optional(folder / "config_sentence_transformers.json")
    values.refuse("model_type", ["SentenceTransformer"], "only dense sentence-transformers models are supported")
    similarity = values.string("similarity_fn_name") or "cosine"
    if similarity not in _SIMILARITIES:
        values.fail("similarity_fn_name", similarity, f"expected one of {', '.join(_SIMILARITIES)}")
    raw = values.get("prompts")
    if raw is None:
        raw = {}
    if not isinstance(raw, dict) or not all(text is None or isinstance(text, str) for text in raw.values()):
        values.fail("prompts", raw, "expected an object of strings")
    prompts = {name: text or "" for name, text in raw.items()}
    for name, text in prompts.items():
        if len(text) > MAX_PROMPT_CHARACTERS:
            values.fail(f"prompts.{name}", text, f"expected at most {MAX_PROMPT_CHARACTERS} characters")
        if not _is_unicode(name + text):
            values.fail(f"prompts.{name}", text, "expected text without lone surrogates")
    if not include_prompt:
        refuse_excluded_prompts(prompts, str(values.path))
    default = values.string("default_prompt_name")
    if default is not None and default not in prompts:
        values.fail("default_prompt_name", default, f"expected one of the prompts ({', '.join(prompts) or 'none'})")
    dimension = values.integer("truncate_dim", 1, 1 << 30) if values.get("truncate_dim") is not None else hidden
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": similarity,
        "default_dimension": min(dimension, hidden),
        "assumed": frozenset() if any(prompts.values()) else frozenset({"prompts"}),
    }


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_excluded_prompts(prompts: Mapping[str, str], source: str) -> None:
    """Raise CheckpointError if there is a prompt to leave out of the pooling (`include_prompt: false`)."""
    named = [name for name, text in prompts.items() if text]
    if named:
        raise CheckpointError(
            f"{source}: field 'prompts' has {', '.join(named)}, but the Pooling module says include_prompt: false; "
            "leaving the prompt's tokens out of the pooling is not supported"
        )
