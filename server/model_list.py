"""What `embedserve models` prints: the catalogue and the other models of a directory, as a table to read or as JSON."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedserve.models import catalog
from embedserve.models.catalog import BACKENDS, CATALOG, CatalogEntry
from embedserve.models.config import DimensionRange, read_config
from embedserve.models.directory import model_folders
from embedserve.models.errors import ModelError, ModelNotFoundError
from embedserve.server.config import ConfigError

__all__ = ["describe", "sizes_object", "table"]

_HEAD = ("MODEL", "DIMENSIONS", "MAX TOKENS", "LANGUAGES", "TAKES", "GIVES", "PROMPTS", "LICENCE", "BACKENDS", "FILES")


def describe(models_dir: Path | None) -> list[dict[str, Any]]:
    """Every model of the catalogue with all that is known of it, then the others that `models_dir` holds.

    `in_catalogue` tells them apart; what only the catalogue could say is None for the others. `folder` is None where a
    model's files are not here, or cannot be read. `fault` says why they cannot be served, as far as their settings
    tell. Raises ConfigError if the directory cannot be read.
    """
    known = [_known(entry, models_dir) for entry in CATALOG]
    here = {model["folder"] for model in known}
    others = [model for model in _others(models_dir) if model["folder"] not in here]
    return [*known, *(dict.fromkeys(known[0]) | model for model in others)]


def table(models_dir: Path | None) -> str:
    """A line a model, and below them what has to be said in words."""
    models = describe(models_dir)
    rows = [_HEAD, *map(_row, models)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    if len(models) > len(CATALOG):
        lines[len(CATALOG) + 1 : len(CATALOG) + 1] = ["", "Not in the catalogue:"]
    notes = [
        "Dimensions such as 32-1024: vectors may be cut to any of these sizes. "
        "Folders of other models are served too: `embedserve serve --model FOLDER`.",
        *(f"{model['id']}: unverified: {model['unverified']}" for model in models if model["unverified"]),
        *(f"{model['id']}: cannot be served: {model['fault']}" for model in models if model["fault"]),
    ]
    return "\n".join([*lines, "", *map(_wrapped, notes)])


def _wrapped(note: str) -> str:
    # Paths stay whole.
    return textwrap.fill(note, 120, break_long_words=False, break_on_hyphens=False)


def sizes_object(sizes: DimensionRange | None) -> dict[str, Any] | None:
    """The sizes that vectors may be cut to, as JSON; `listed` is None where all between the two are allowed."""
    if sizes is None:
        return None
    listed = None if sizes.listed is None else list(sizes.listed)
    return {"minimum": sizes.minimum, "maximum": sizes.maximum, "listed": listed}


def _found(entry: CatalogEntry, models_dir: Path | None) -> tuple[Path | None, str | None]:
    """(folder, fault) of a model of the catalogue."""
    folder = None
    try:
        folder = catalog.locate(entry.id, models_dir)
        catalog.configure(folder, entry.id)
    except ModelNotFoundError:
        return None, None
    except (ModelError, OSError) as error:
        return folder, _words(error)
    return folder, None


def _known(entry: CatalogEntry, models_dir: Path | None) -> dict[str, Any]:
    folder, fault = _found(entry, models_dir)
    return {
        "id": entry.id,
        "in_catalogue": True,
        "name": entry.name,
        "description": entry.description,
        "aliases": list(dict.fromkeys([entry.basename, *entry.aliases])),
        "family": entry.family,
        "backends": list(entry.backends),
        "dimensions": entry.dimensions,
        "matryoshka": sizes_object(entry.matryoshka),
        "max_tokens": entry.max_tokens,
        "pooling": entry.pooling,
        "languages": list(entry.languages),
        "modalities": list(entry.modalities),
        "outputs": list(entry.outputs),
        "prompts": dict(entry.prompts),
        "instruction": entry.instruction,
        "licence": entry.licence,
        "owned_by": entry.owned_by,
        "parameters": entry.parameters,
        "stored_dtype": entry.stored_dtype,
        "repository": entry.repository or entry.id,
        "revision": entry.revision,
        "unverified": entry.unverified,
        "folder": None if folder is None else str(folder),
        "fault": fault,
    }


def _others(models_dir: Path | None) -> Iterator[dict[str, Any]]:
    """The models of a directory that the catalogue does not have. Raises ConfigError."""
    try:
        folders = [] if models_dir is None else list(model_folders(models_dir))
    except OSError as error:
        raise ConfigError(
            f"--models-dir: {models_dir} cannot be read ({error.strerror}); check its permissions"
        ) from None
    for name, folder in folders:
        if catalog.find(name) is None:
            yield _other(name, folder)


def _other(name: str, folder: Path) -> dict[str, Any]:
    """What a folder's own files say."""
    fields = {"id": name, "in_catalogue": False, "folder": str(folder)}
    try:
        config = read_config(folder)
    except (ModelError, OSError) as error:
        return fields | {"fault": _words(error)}
    return fields | {
        "family": config.family,
        "backends": list(BACKENDS[config.family]),
        "dimensions": config.dimension,
        "matryoshka": sizes_object(config.matryoshka),
        "max_tokens": config.max_tokens,
        "pooling": config.pooling,
        "modalities": list(config.modalities),
        "outputs": list(config.outputs),
        "prompts": dict(config.prompts),
        "instruction": config.instruction,
        "stored_dtype": config.stored_dtype,
    }


def _words(error: Exception) -> str:
    return " ".join(str(error).split())


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    sizes = model["matryoshka"]
    prompts = [name for name, prompt in (model["prompts"] or {}).items() if prompt]
    return (
        model["id"],
        f"{sizes['minimum']}-{sizes['maximum']}" if sizes else str(model["dimensions"] or "-"),
        str(model["max_tokens"] or "-"),
        ", ".join(model["languages"] or "-"),
        ", ".join(model["modalities"] or "-"),
        ", ".join(model["outputs"] or "-"),
        ", ".join([*prompts, *(["instruction"] if model["instruction"] else [])]) or "-",
        model["licence"] or "-",
        ", ".join(model["backends"] or "-"),
        model["folder"] or ("cannot be read" if model["fault"] else "not here"),
    )
