"""A models directory: every model's folder in it, whether it was put there by hand or by the hub's client. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from embedserve.models import catalog
from embedserve.models.errors import CheckpointError, ModelNotFoundError
from embedserve.models.files import present

# A repository's folder in the hub's cache.
_REPOSITORY = re.compile(r"models--(.+?)--(.+)")


def model_folders(models_dir: Path) -> Iterator[tuple[str, Path]]:
    """(name, folder) of each model in DIR/<name>, DIR/<organisation>/<name> and the hub's cache, sorted by place.

    The name is what the place says. A folder that cannot be read is among them, since it may hold a model: whoever
    reads it meets the error. Raises OSError if the directory itself cannot be read.
    """
    for place in _visible_folders(models_dir):
        if repository := repository_of(place.name):
            try:
                yield repository, catalog.locate(repository, models_dir)
            except ModelNotFoundError:
                continue  # a cache entry without a snapshot
            except (CheckpointError, OSError):
                yield repository, place / "snapshots"
        elif _may_be_checkpoint(place):
            yield place.name, place
        else:
            try:
                inside = _visible_folders(place)
            except OSError:
                yield place.name, place
                continue
            yield from ((f"{place.name}/{inner.name}", inner) for inner in inside if _may_be_checkpoint(inner))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has what a model's folder begins with. Raises CheckpointError if it cannot be read."""
    return present(folder / "modules.json") or present(folder / "config.json")


def repository_of(name: str) -> str | None:
    """`<organisation>/<name>` of a folder `models--<organisation>--<name>` in the hub's cache; None for other names."""
    found = _REPOSITORY.fullmatch(name)
    return f"{found[1]}/{found[2]}" if found else None


def _may_be_checkpoint(folder: Path) -> bool:
    try:
        return is_checkpoint(folder)
    except CheckpointError:
        return True


def _visible_folders(place: Path) -> list[Path]:
    return sorted(inner for inner in place.iterdir() if inner.is_dir() and not inner.name.startswith("."))
