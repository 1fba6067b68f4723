"""What `embedserve models` prints of the catalogue: a table to read, or all fields as JSON."""

import textwrap
from pathlib import Path
from typing import Any

from embedserve.models import catalog
from embedserve.models.catalog import CATALOG, CatalogEntry
from embedserve.models.config import DimensionRange
from embedserve.models.errors import ModelError

__all__ = ["describe", "sizes_object", "table"]

_HEAD = ("MODEL", "DIMENSIONS", "MAX TOKENS", "LANGUAGES", "TAKES", "GIVES", "PROMPTS", "LICENCE", "BACKENDS", "FILES")


def describe(models_dir: Path | None) -> list[dict[str, Any]]:
    """Every model of the catalogue with all that is known of it; `folder` is None where its files are not here."""
    return [_fields(entry, _folder(entry, models_dir)) for entry in CATALOG]


def table(models_dir: Path | None) -> str:
    """A line a model, and below them what has to be said in words."""
    rows = [_HEAD, *(_row(entry, _folder(entry, models_dir)) for entry in CATALOG)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    remarks = [f"{entry.id}: unverified: {entry.unverified}" for entry in CATALOG if entry.unverified]
    notes = [
        "Dimensions such as 32-1024: vectors may be cut to any of these sizes. "
        "Folders of other models are served too: `embedserve serve --model FOLDER`.",
        *remarks,
    ]
    return "\n".join([*lines, "", *(textwrap.fill(note, 120) for note in notes)])


def sizes_object(sizes: DimensionRange | None) -> dict[str, Any] | None:
    """The sizes that vectors may be cut to, as JSON; `listed` is None where all between the two are allowed."""
    if sizes is None:
        return None
    listed = None if sizes.listed is None else list(sizes.listed)
    return {"minimum": sizes.minimum, "maximum": sizes.maximum, "listed": listed}


def _folder(entry: CatalogEntry, models_dir: Path | None) -> Path | None:
    try:
        return catalog.locate(entry.id, models_dir)
    except ModelError:
        return None


def _fields(entry: CatalogEntry, folder: Path | None) -> dict[str, Any]:
    return {
        "id": entry.id,
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
    }


def _row(entry: CatalogEntry, folder: Path | None) -> tuple[str, ...]:
    sizes = entry.matryoshka
    prompts = [name for name, prompt in entry.prompts.items() if prompt]
    return (
        entry.id,
        str(entry.dimensions) if sizes is None else f"{sizes.minimum}-{sizes.maximum}",
        str(entry.max_tokens),
        ", ".join(entry.languages),
        ", ".join(entry.modalities),
        ", ".join(entry.outputs),
        ", ".join([*prompts, *(["instruction"] if entry.instruction else [])]) or "-",
        entry.licence,
        ", ".join(entry.backends),
        "not here" if folder is None else str(folder),
    )
