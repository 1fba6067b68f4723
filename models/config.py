"""A checkpoint folder's files → one frozen ModelConfig. Every quirk of a foreign format ends here.

Read are, where present: modules.json and each module's folder, config.json, sentence_bert_config.json,
tokenizer_config.json (its model_max_length and flags of BERT's normaliser), config_sentence_transformers.json. The
meaning is the one that sentence-transformers 6.2 gives them. Whatever changes vectors is applied or refused by name,
never passed over.

Imports no torch: front ends read the same configuration as engines.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn

from embedserve.models.errors import CheckpointError

Pooling = Literal["cls", "mean", "max", "last"]

# Larger than any configuration of a model, smaller than a weight file that got a wrong name.
_MAX_JSON_BYTES = 8 << 20


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
class ModelConfig:
    """What a checkpoint asks for. Sizes are in components, lengths in tokens including the special ones.

    folder: as given. weights_folder: where config.json, the tokenizer's files and the weights are (the same, or a
        subfolder that modules.json names).
    pooling, normalize: how token states become a vector.
    max_tokens: texts are cut to this length; never more than max_positions.
    do_lower_case: the front end's tokenizer lowers the text (prompt included) before its own normaliser. Nothing
        else is done to a text: sentence-transformers 6 does not strip it.
    bert_normalizer: flags of BERT's normaliser (lowercase, strip_accents, handle_chinese_chars) that
        tokenizer_config.json states; in transformers they count more than what tokenizer.json says.
    prompts: prefixes by name, put before the text as they stand. default_prompt_name: the one that
        sentence-transformers puts before every text for which none is asked; a server follows it or says so.
    include_prompt: false where the prompt's tokens stay out of the pooling; only ever false without prompts.
    matryoshka: sizes that vectors may be cut to, None where the model was not trained for it.
    default_dimension: vectors have this size unless the request says otherwise.
    stored_dtype: as config.json names it, or None.
    assumed: names of fields on which the files are silent, so that the value is a convention and the catalogue may
        know better.
    """

    folder: Path
    weights_folder: Path
    family: str
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    vocab_size: int
    max_positions: int
    type_vocab_size: int
    layer_norm_eps: float
    activation: str
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
    assumed: frozenset[str] = frozenset()

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
    if (weights_folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{weights_folder / 'adapter_config.json'}: adapters are not supported; merge it into the model "
            "(merge_and_unload of peft) and serve the result"
        )
    architecture = _read_bert(_Json.read(weights_folder / "config.json"))
    text = _read_text_settings(weights_folder, architecture["max_positions"])
    settings = _read_sentence_settings(folder, architecture["hidden_size"], modules.include_prompt)
    if modules.pooled_size not in (None, architecture["hidden_size"]):
        raise CheckpointError(
            f"{modules.pooling_file}: the pooling expects {modules.pooled_size} components, but "
            f"{weights_folder / 'config.json'} has hidden_size {architecture['hidden_size']}; "
            "the files do not belong together"
        )
    assumed = modules.assumed | text.pop("assumed") | settings.pop("assumed")
    return ModelConfig(
        folder=folder,
        weights_folder=weights_folder,
        pooling=modules.pooling,
        normalize=modules.normalize,
        include_prompt=modules.include_prompt,
        assumed=assumed,
        **architecture,
        **text,
        **settings,
    )


class _Json:
    """One JSON object of a checkpoint: typed access, errors that name file and field."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        self.values = values

    @classmethod
    def read(cls, path: Path) -> _Json:
        values = _load_json(path)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {_kind(values)}; copy the file again")
        return cls(path, values)

    @classmethod
    def read_optional(cls, path: Path) -> _Json:
        return cls.read(path) if path.exists() else cls(path, {})

    def fail(self, name: str, found: object, expected: str) -> NoReturn:
        raise CheckpointError(f"{self.path}: field {name!r} is {_shown(found)}; {expected}")

    def get(self, name: str) -> Any:
        """The value, None also where it is absent."""
        return self.values.get(name)

    def integer(self, name: str, lowest: int, highest: int, default: int | None = None) -> int:
        value = self.values.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.path}: field {name!r} is missing; expected an integer")
        if not _is_integer(value) or not lowest <= value <= highest:
            self.fail(name, value, f"expected an integer from {lowest} to {highest}")
        return int(value)

    def boolean(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, value, "expected true or false")
        return value

    def string(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self.fail(name, value, "expected a string")
        return value

    def refuse(self, name: str, neutral: Sequence[object], remedy: str) -> None:
        """Fail unless the field is absent, null, or one of the values that change nothing."""
        value = self.values.get(name)
        # By type too: 0 == False in Python, and a wrong type is a mistake elsewhere.
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            self.fail(name, value, remedy)

    def refuse_unknown(self, known: frozenset[str], remedy: str) -> None:
        if unknown := sorted(set(self.values) - known):
            self.fail(unknown[0], self.values[unknown[0]], remedy)


def _load_json(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: the file is missing; copy the whole checkpoint folder") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if len(raw) > _MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB, which no configuration is; copy it again"
        )
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from error


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), repr(value)[:40])


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


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
    if not path.exists():
        return _Modules(transformer=folder, assumed=frozenset({"pooling", "normalize"}))
    entries = _load_json(path)
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise CheckpointError(f"{path}: expected a list of objects, found {_kind(entries)}; copy the file again")
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
        normalize = _Json.read_optional(steps[2][1] / "config.json")
        for name in ("module_input_name", "module_output_name"):
            normalize.refuse(name, ["sentence_embedding"], "only the sentence embedding can be normalised")
        modules.normalize = True
    return modules


def _read_module(path: Path, entry: dict[str, Any]) -> tuple[str, Path]:
    """(class name, folder) of one entry."""
    values = _Json(path, entry)
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
    values = _Json.read(path)
    values.refuse_unknown(_POOLING_FIELDS, "this field of a Pooling module is unknown, so vectors might differ")
    size = "embedding_dimension" if "embedding_dimension" in values.values else "word_embedding_dimension"
    modules.pooling_file = path
    modules.pooled_size = values.integer(size, 1, _LIMITS["hidden_size"])
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


# --- config.json ------------------------------------------------------------------------------------------------------

# Far above every encoder there is: beyond it lies a broken file, not a larger model.
_LIMITS = {
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 10,
    "intermediate_size": 1 << 18,
    "vocab_size": 1 << 24,
    "max_position_embeddings": 1 << 22,
    "type_vocab_size": 1 << 10,
}

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}

_JINA = (
    "this is a JinaBERT checkpoint under the name bert, which plain BERT would run with wrong vectors; not supported"
)


def _read_bert(values: _Json) -> dict[str, Any]:
    """The fields of ModelConfig that config.json of a BERT decides. Raises for every other architecture."""
    _refuse_other_architectures(values)
    size = {name: values.integer(name, 1, highest) for name, highest in _LIMITS.items() if name != "type_vocab_size"}
    if size["hidden_size"] % size["num_attention_heads"]:
        values.fail(
            "hidden_size",
            size["hidden_size"],
            f"expected a multiple of num_attention_heads ({size['num_attention_heads']})",
        )
    activation = values.string("hidden_act") or "gelu"
    if activation not in _ACTIVATIONS:
        values.fail("hidden_act", activation, f"supported are {', '.join(_ACTIVATIONS)}")
    eps = values.values.get("layer_norm_eps", 1e-12)
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not math.isfinite(eps) or not 0 < eps < 1:
        values.fail("layer_norm_eps", eps, "expected a number above 0 and below 1")
    stored_dtype = values.string("dtype") or values.string("torch_dtype")
    return {
        "family": "bert",
        "hidden_size": size["hidden_size"],
        "num_layers": size["num_hidden_layers"],
        "num_heads": size["num_attention_heads"],
        "intermediate_size": size["intermediate_size"],
        "vocab_size": size["vocab_size"],
        "max_positions": size["max_position_embeddings"],
        "type_vocab_size": values.integer("type_vocab_size", 1, _LIMITS["type_vocab_size"], default=2),
        "layer_norm_eps": float(eps),
        "activation": _ACTIVATIONS[activation],
        "pad_token_id": 0
        if values.get("pad_token_id") is None
        else values.integer("pad_token_id", 0, size["vocab_size"] - 1),
        "matryoshka": _read_matryoshka(values, size["hidden_size"]),
        "stored_dtype": stored_dtype,
    }


def _refuse_other_architectures(values: _Json) -> None:
    model_type = values.string("model_type")
    if model_type != "bert":
        values.fail("model_type", model_type, "this architecture is not supported; supported is bert")
    position = values.get("position_embedding_type")
    if position == "alibi":
        values.fail("position_embedding_type", position, _JINA)
    values.refuse("position_embedding_type", ["absolute"], "supported is absolute")
    architectures = values.get("architectures")
    if architectures is not None:
        if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
            values.fail("architectures", architectures, "expected a list of class names")
        for name in architectures:
            if "jina" in name.lower():
                values.fail("architectures", architectures, _JINA)
            if not name.startswith("Bert"):
                values.fail("architectures", architectures, "expected BertModel or another Bert class of transformers")
    auto_map = values.get("auto_map")
    if auto_map:
        jina = "jina" in json.dumps(auto_map).lower()
        code = "code from checkpoints is never run, and plain BERT would compute something else"
        values.fail("auto_map", auto_map, _JINA if jina else code)
    for name in ("feed_forward_type", "emb_pooler", "alibi_starting_size"):
        values.refuse(name, [], _JINA)
    for name in ("is_decoder", "add_cross_attention", "is_causal", "is_encoder_decoder"):
        if values.boolean(name, False):
            values.fail(name, True, "expected false: only encoders that attend in both directions are supported")
    values.refuse("pruned_heads", [{}, []], "pruned heads are not supported; use the unpruned model")
    values.refuse("quantization_config", [], "quantised checkpoints are not supported; use the original one")


def _read_matryoshka(values: _Json, hidden: int) -> DimensionRange | None:
    """`is_matryoshka` and `matryoshka_dimensions`, the fields that vLLM and model authors agreed on."""
    listed = values.get("matryoshka_dimensions")
    if listed is not None and not (
        isinstance(listed, list) and all(_is_integer(size) and 1 <= size <= hidden for size in listed)
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
    path = next((folder / name for name in _SENTENCE_FILES if (folder / name).exists()), folder / _SENTENCE_FILES[0])
    values = _Json.read_optional(path)
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
    tokenizer = _Json.read_optional(folder / "tokenizer_config.json")
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
    values = _Json.read_optional(folder / "config_sentence_transformers.json")
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


def refuse_excluded_prompts(prompts: Mapping[str, str], source: str) -> None:
    """Raise CheckpointError if there is a prompt to leave out of the pooling (`include_prompt: false`)."""
    named = [name for name, text in prompts.items() if text]
    if named:
        raise CheckpointError(
            f"{source}: field 'prompts' has {', '.join(named)}, but the Pooling module says include_prompt: false; "
            "leaving the prompt's tokens out of the pooling is not supported"
        )
