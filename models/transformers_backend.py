"""The transformers backend: every encoder that transformers has a class of its own for, padded, run as it stands there.

Slower than a packed family, and for the many architectures that have none. Code that comes with a checkpoint is never
run, and what would silently give other vectors is refused: weights that do not fill the model, weights that it has no
use for, and checkpoints that were made for code of their own under the name of an architecture that transformers has.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from embedserve.models.batch import PackedBatch
from embedserve.models.config import ModelConfig
from embedserve.models.errors import CheckpointError
from embedserve.models.json_file import JsonFile
from embedserve.models.weights import Weights

# Trained along with an encoder, and no part of its token states: poolers, and the heads of language models.
_UNUSED = re.compile(
    r"(.+\.)?(pooler\..+|position_ids)"
    r"|(cls|head|lm_head|generator_lm_head|predictions|vocab_transform|vocab_layer_norm|vocab_projector"
    r"|(discriminator|generator|lm|mask)_predictions)\..+"
    r"|decoder\.(weight|bias)"
)
# A checkpoint need not bring what is not used.
_DISPENSABLE = re.compile(r"(.+\.)?pooler\..+")

# Architectures that lived as code in their checkpoints before transformers took them over: those whose documentation
# there names the original repository, so that it computes the same without its code. The repository's config.json may
# still speak the old code's language, which transformers passes over in silence: then these fields must say what the
# new code does anyway.
_ADOPTED: dict[str, dict[str, tuple[object, ...]]] = {
    "eurobert": {},
    "nomic_bert": {
        "activation_function": ("swiglu",),
        "causal": (False,),
        "layer_norm_epsilon": (1e-12,),
        "mlp_fc1_bias": (False,),
        "mlp_fc2_bias": (False,),
        "n_embd": (768,),
        "n_head": (12,),
        "n_inner": (3072,),
        "n_layer": (12,),
        "parallel_block": (False,),
        "prenorm": (False,),
        "qkv_proj_bias": (False,),
        "rotary_emb_base": (1000, 1000.0),
        "rotary_emb_fraction": (1.0, 1),
        "rotary_emb_interleaved": (False,),
        "rotary_emb_scale_base": (),
        "rotary_scaling_factor": (),
        "use_rms_norm": (False,),
    },
}


class TransformersBackend:
    """Runs a model of transformers on batches padded on the right; see `Backend`.

    Models with causal attention take them as well: what stands behind a token does not reach it.
    """

    name = "transformers"
    cost: Literal["packed", "padded"] = "padded"
    pools = False

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        folder = config.weights_folder
        transformers = _import_transformers()
        _refuse_remote_code(config, transformers)
        # For its errors: a pickle, a missing shard, a damaged file.
        with Weights(folder, ignored=(".*",)):
            pass
        self._pad_id = config.pad_token_id
        self._device = device
        self.dtype = dtype
        model = _load(transformers, folder, dtype)
        _check_positions(model, config)
        self._model = model.to(device)
        _check_states(self._model, config)

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        """See `Backend`."""
        rows, positions = batch.layout.rows.long(), batch.layout.positions.long()
        shape = (len(batch.layout.cu_seqlens) - 1, batch.layout.max_seqlen)
        ids = torch.full(shape, self._pad_id, dtype=torch.int64, device=self._device)
        ids[rows, positions] = batch.ids.long()
        mask = torch.zeros(shape, dtype=torch.int64, device=self._device)
        mask[rows, positions] = 1
        # Nothing else: token types are 0 and positions count up where a model is not told, and that is what texts need.
        states: Tensor = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        return states[rows, positions]

    def images(self, pixels: Tensor) -> Tensor:
        """Never called: models for images are refused when they are loaded."""
        raise NotImplementedError


def _import_transformers() -> Any:
    """The package: imported here and nowhere else, without network and without its own output."""
    # Read at import. Everything is loaded from a folder anyway; this holds also where a file is missing there.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    transformers = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _refuse_remote_code(config: ModelConfig, transformers: Any) -> None:
    if config.family in ("jina_bert", "jina_clip"):
        raise CheckpointError(
            f"{config.weights_folder / 'config.json'}: transformers has no class for this architecture "
            f"({config.family}) without running the checkpoint's code, and would run it as another with wrong vectors; "
            "use --backend native"
        )
    values = JsonFile.read(config.weights_folder / "config.json")
    kind = values.string("model_type") or ""
    own_code = [name for name in values.child("auto_map").values if name.startswith(("AutoConfig", "AutoModel"))]
    known = kind in transformers.CONFIG_MAPPING and transformers.CONFIG_MAPPING[kind] in transformers.MODEL_MAPPING
    if not known:
        missing = f"transformers {transformers.__version__} has no such architecture"
        if own_code:
            values.fail(
                "model_type",
                kind,
                f"{missing}; the checkpoint brings code of its own for it (field 'auto_map'), which is never run. Look "
                "for a version of the model that transformers runs by itself, or take another model",
            )
        values.fail("model_type", kind, f"{missing}; a newer version may have it, or take another model")
    if not own_code:
        return
    if kind not in _ADOPTED:
        values.fail(
            "auto_map",
            values.get("auto_map"),
            f"the checkpoint was made for this code of its own, which is never run, and the {kind} of transformers may "
            "give other vectors; if its author says that they are the same, remove the field",
        )
    for name, same in _ADOPTED[kind].items():
        expected = json.dumps(same[0] if same else None)
        values.refuse(name, same, f"the {kind} of transformers passes over this field and computes with {expected}")


def _load(transformers: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model on the CPU. Raises CheckpointError unless its weights and the checkpoint's are the same ones."""
    local = {"local_files_only": True, "trust_remote_code": False}
    try:
        settings = transformers.AutoConfig.from_pretrained(folder, **local)
        # Decoders would keep keys and values for a next token that never comes; ModernBERT in transformers 4 would
        # compile itself on a GPU, which needs a C compiler.
        for switch in ("use_cache", "reference_compile"):
            if hasattr(settings, switch):
                setattr(settings, switch, False)
        if settings.is_encoder_decoder:
            raise CheckpointError(
                f"{folder / 'config.json'}: {settings.model_type} is an encoder with a decoder, which is not supported"
            )
        kind = transformers.MODEL_MAPPING[type(settings)]
        kind = kind[0] if isinstance(kind, tuple) else kind
        model, report = transformers.AutoModel.from_pretrained(
            folder,
            config=settings,
            dtype=dtype,
            attn_implementation="sdpa" if kind._supports_sdpa else "eager",
            use_safetensors=True,
            # For a list of them instead of an exception with a page of advice.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **local,
        )
    except CheckpointError:
        raise
    # The library raises whatever its parts raise; what all of it means here is that the folder cannot be loaded.
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load it: {_first_line(error)}") from error
    _check_loaded(folder, type(model).__name__, report)
    return model.eval()


def _check_loaded(folder: Path, kind: str, report: dict[str, Any]) -> None:
    """Raise CheckpointError unless every tensor of the checkpoint has its place in the model, and the other way round.

    transformers fills what is missing with random numbers and says so in a warning.
    """
    mismatched = _listed(
        # transformers 4 has but the name.
        f"{entry} has another shape than config.json asks for"
        if isinstance(entry, str)
        else f"{entry[0]} is {list(entry[1])} where config.json asks for {list(entry[2])}"
        for entry in report["mismatched_keys"]
    )
    if mismatched:
        raise CheckpointError(f"{folder}: {mismatched}; the two do not belong to one checkpoint")
    other = "the weights are of another architecture than config.json says, and running them would give wrong vectors"
    missing = _listed(name for name in report["missing_keys"] if not _DISPENSABLE.fullmatch(name))
    if missing:
        raise CheckpointError(f"{folder}: the checkpoint has no {missing}, which {kind} of transformers needs; {other}")
    unexpected = _listed(name for name in report["unexpected_keys"] if not _UNUSED.fullmatch(name))
    if unexpected:
        raise CheckpointError(f"{folder}: {kind} of transformers has no use for {unexpected}; {other}")


def _listed(names: Iterable[str]) -> str:
    """The first three and how many more; empty if there are none."""
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_positions(model: Any, config: ModelConfig) -> None:
    """Raise CheckpointError if a text may be longer than its table of positions: on a GPU that ends the process."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # As in RoBERTa, positions begin behind the row of the padding.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            usable = module.num_embeddings - first
            if config.max_tokens > usable:
                raise CheckpointError(
                    f"{config.weights_folder}: texts may have {config.max_tokens} tokens, but the table {name!r} has "
                    f"positions for {usable}; set max_seq_length in sentence_bert_config.json to {usable} or less"
                )


@torch.inference_mode()
def _check_states(model: Any, config: ModelConfig) -> None:
    """Raise CheckpointError unless a short text gives token states of the promised width."""
    kind = type(model).__name__
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    # Models for other things than texts fail each in its own way.
    except (AttributeError, TypeError, ValueError, KeyError, AssertionError) as error:
        raise CheckpointError(
            f"{config.weights_folder}: {kind} of transformers gives no states for token ids alone "
            f"({_first_line(error)}); expected an encoder of texts"
        ) from error
    if states.shape != (1, 2, config.hidden_size):
        raise CheckpointError(
            f"{config.weights_folder}: {kind} of transformers gives states of {states.shape[-1]} components, but "
            f"config.json promises {config.hidden_size}; the files do not belong together"
        )


def _first_line(error: Exception) -> str:
    """What an error says, without the advice that follows."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that ends so announces the next.
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else (lines or [type(error).__name__])[0]
    return said[:300]
