"""Models as one file for a closed network: a plain tar, its manifest first, every file with its SHA-256.

    embedserve-bundle.json      {"format": 1, "embedserve": <version>, "models": [<manifest>, …]}
    <model id>/embedserve.json  the model's manifest again, so that a folder unpacked with plain `tar` can be verified
    <model id>/<file>           …

The same files make the same bytes: names are sorted, times, owners and modes fixed. Weights do not compress, so nothing
is compressed. Imports torch only where a pickle has to be converted.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from embedserve.models import catalog
from embedserve.models.directory import is_checkpoint, model_folders, repository_of
from embedserve.models.errors import BundleError, CheckpointError
from embedserve.models.layout import has_graph, needed, pickles
from embedserve.models.manifest import (
    FORMAT,
    MANIFEST,
    FileSum,
    Manifest,
    copy,
    differences,
    files_in,
    is_model_id,
    parse_manifest,
    sum_of,
    version,
)
from embedserve.models.progress import Progress, size

BUNDLE_MANIFEST = "embedserve-bundle.json"

_MAX_MANIFEST_BYTES = 16 << 20


@contextmanager
def _files_explained() -> Iterator[None]:
    """An OSError as a BundleError that names the file."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{error.filename or 'a file'}: {error.strerror or error}; check its permissions and the room on the disk"
        ) from error


# --- pack -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """A model to pack: where each of its files is read from, and what is known of it."""

    folder: Path
    paths: dict[str, Path]
    known: Manifest


@_files_explained()
def pack(folder: Path, output: Path, *, model: str | None = None, force: bool = False) -> list[Manifest]:
    """Write a model's folder, or all models of a models directory, to the tar `output`. Returns their manifests.

    Packed is what the server reads, with the ONNX graphs that are there; pickles are packed as safetensors. A folder
    with a manifest must agree with it. model: the id of a single folder, where its place does not tell.
    The folder stays as it is; `output` appears when it is whole. Raises BundleError or CheckpointError.
    """
    if output.exists() and not force:
        raise BundleError(f"{output} is already there; take another name, or --force to replace it")
    if not output.parent.is_dir():
        raise BundleError(f"{output.parent}: no such folder for the bundle; make it first")
    found = _models_in(folder, model)
    with tempfile.TemporaryDirectory(prefix=".embedserve-pack-", dir=output.parent) as scratch:
        sources = [_source(id_, place, Path(scratch) / id_) for id_, place in sorted(found.items())]
        total = sum(path.stat().st_size for source in sources for path in source.paths.values())
        _require_space(output.parent, total, "the bundle")
        with Progress("reading", total) as progress:
            manifests = [_manifest_of(source, progress.advance) for source in sources]
        part = Path(scratch) / "bundle.tar"
        with Progress("packing", total) as progress:
            _write_tar(part, sources, manifests, progress.advance)
        part.replace(output)
    return manifests


def _models_in(folder: Path, model: str | None) -> dict[str, Path]:
    """Model id → folder."""
    if not folder.is_dir():
        raise BundleError(f"{folder}: no such folder; expected a model's folder or a directory of them")
    if model is not None and not is_model_id(model):
        raise BundleError(f"--model: {model!r} is no model's id; expected `<name>` or `<organisation>/<name>`")
    if is_checkpoint(folder):
        return {_known_id(model) if model else _id_of(folder, _name_by_place(folder.absolute())): folder}
    if model is not None:
        raise BundleError(f"--model names one folder, but {folder} has no config.json; give the model's own folder")
    found = {_id_of(place, name): place for name, place in model_folders(folder)}
    if not found:
        raise BundleError(f"{folder}: neither a model's folder nor a directory of them: there is no config.json")
    return found


def _known_id(name: str) -> str:
    entry = catalog.find(name)
    return entry.id if entry is not None else name


def _name_by_place(folder: Path) -> str:
    """`<organisation>/<name>` if the catalogue knows it, else the folder's name; any folder may stand above it."""
    both = f"{folder.parent.name}/{folder.name}"
    return both if catalog.find(both) is not None else folder.name


def _id_of(folder: Path, name: str) -> str:
    """The id of a model's folder: its manifest's, or what its place says. Raises BundleError."""
    if (manifest := Manifest.read(folder)) is not None:
        return manifest.model
    repository, _ = _hub_origin(folder)
    if not is_model_id(repository or name):
        raise BundleError(f"{folder}: its name is no model's id; give one with --model")
    return _known_id(repository or name)


def _hub_origin(folder: Path) -> tuple[str, str] | tuple[None, None]:
    """(repository, revision) of a folder in the hub's cache layout."""
    repository = repository_of(folder.absolute().parent.parent.name)
    if folder.absolute().parent.name != "snapshots" or repository is None:
        return None, None
    return repository, folder.absolute().name


def _source(model: str, folder: Path, scratch: Path) -> _Source:
    """Choose a model's files, and convert its pickles into `scratch`."""
    names = list(files_in(folder))
    known = Manifest.read(folder)
    if known is None:
        entry = catalog.find(model)
        repository, revision = _hub_origin(folder)
        known = Manifest(model, {}, repository, revision, entry.licence if entry is not None else None)
    try:
        chosen = needed(names, lambda name: _real(folder, name), onnx=has_graph(names))
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if missing := sorted(set(known.files) - set(names)):
        raise BundleError(f"{folder / missing[0]} is missing, though {MANIFEST} lists it; get the model again")
    paths = {name: _real(folder, name) for name in {*chosen, *known.files}}
    sources = {}
    if pickles(paths):
        from embedserve.models.convert import convert  # torch

        for conversion in convert(folder, paths, scratch):
            pickle = paths.pop(conversion.source)
            paths[conversion.target] = scratch / conversion.target
            sources[conversion.target] = FileSum(0, "", f"{conversion.source} {sum_of(pickle).sha256}")
    return _Source(folder, paths, replace(known, model=model, files={**known.files, **sources}, embedserve=version()))


def _real(folder: Path, name: str) -> Path:
    """Where a file's content lies. A link may lead to the folder itself, or to the blobs of the hub's cache."""
    path = (folder / name).resolve()
    allowed = [folder.resolve()]
    if _hub_origin(folder)[0] is not None:
        allowed.append((folder.absolute().parent.parent / "blobs").resolve())
    if not any(path.is_relative_to(place) for place in allowed):
        raise BundleError(f"{folder / name}: a link out of the folder, to {path}; put the file itself there")
    if not path.is_file():
        raise BundleError(f"{folder / name}: not a file that can be read; remove it or put the file there")
    return path


def _manifest_of(source: _Source, advance: Callable[[int], None]) -> Manifest:
    files = {}
    for name, path in sorted(source.paths.items()):
        found, expected = sum_of(path, advance), source.known.files.get(name)
        if expected is not None and expected.sha256 not in ("", found.sha256):
            raise BundleError(
                f"{source.folder / name} is not what {MANIFEST} says; `embedserve verify {source.folder}` tells all "
                "differences"
            )
        files[name] = replace(found, source=expected.source if expected is not None else None)
    return replace(source.known, files=files)


def _write_tar(
    path: Path, sources: Sequence[_Source], manifests: Sequence[Manifest], advance: Callable[[int], None]
) -> None:
    head = {"format": FORMAT, "embedserve": version(), "models": [manifest.to_json() for manifest in manifests]}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        _add_bytes(tar, BUNDLE_MANIFEST, json.dumps(head, indent=1, ensure_ascii=False).encode() + b"\n")
        for source, manifest in zip(sources, manifests, strict=True):
            _add_bytes(tar, f"{manifest.model}/{MANIFEST}", manifest.encode())
            for name, expected in sorted(manifest.files.items()):
                with source.paths[name].open("rb") as file:
                    summed = _Summing(file, advance)
                    tar.addfile(_member(f"{manifest.model}/{name}", expected.size), cast(BinaryIO, summed))
                if summed.hexdigest() != expected.sha256:
                    raise BundleError(f"{source.folder / name} changed while it was packed; pack it again")


class _Summing:
    """A file that sums what is read from it."""

    def __init__(self, file: BinaryIO, advance: Callable[[int], None]) -> None:
        self._file, self._advance, self._digest = file, advance, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._digest.update(data)
        self._advance(len(data))
        return data

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _member(name: str, length: int) -> tarfile.TarInfo:
    """The same header each time: tarfile's own is a file of mode 644, of user and time 0."""
    info = tarfile.TarInfo(name)
    info.size = length
    return info


def _add_bytes(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    tar.addfile(_member(name, len(content)), io.BytesIO(content))


# --- verify and unpack ------------------------------------------------------------------------------------------------


@_files_explained()
def verify(path: Path) -> dict[str, list[str]]:
    """Recompute all sums of a model folder, a models directory or a bundle.

    Returns, by model id, a line for each file that is missing, changed or unexpected; faults of a bundle as a whole
    stand under the empty id. Raises BundleError if there is nothing to compare with.
    """
    if path.is_file():
        with _Bundle(path) as bundle, Progress("verifying", bundle.size) as progress:
            faults: dict[str, list[str]] = {manifest.model: [] for manifest in bundle.manifests}
            for model, fault in bundle.read(None, progress.advance):
                faults.setdefault(model, []).append(fault)
        return faults
    if not path.is_dir():
        raise BundleError(f"{path}: no such folder or bundle")
    found = {place: Manifest.read(place) for place in _manifest_folders(path)}
    if not found:
        raise BundleError(
            f"{path}: no {MANIFEST} in it or below it, so there is nothing to compare with; `embedserve pull` and "
            "`embedserve unpack` write it"
        )
    manifests = {place: manifest for place, manifest in found.items() if manifest is not None}
    with Progress("verifying", sum(manifest.size for manifest in manifests.values())) as progress:
        return {manifest.model: differences(place, manifest, progress.advance) for place, manifest in manifests.items()}


def _manifest_folders(path: Path) -> list[Path]:
    patterns = (MANIFEST, f"*/{MANIFEST}", f"*/*/{MANIFEST}")
    return [file.parent for pattern in patterns for file in sorted(path.glob(pattern))]


@_files_explained()
def unpack(path: Path, target: Path) -> list[Manifest]:
    """Put the models of a bundle below `target`, each at its id. Returns their manifests.

    Every file is checked on the way, and no model appears before all are whole. Only plain files that the manifest
    lists, of the size it says, are ever written. Raises BundleError.
    """
    with _Bundle(path) as bundle:
        for manifest in bundle.manifests:
            _require_free(target / manifest.model)
        with _folder(target):
            _require_space(target, bundle.size, "the models")
            with tempfile.TemporaryDirectory(prefix=".embedserve-unpack-", dir=target) as scratch:
                with Progress("unpacking", bundle.size) as progress:
                    for model, fault in bundle.read(Path(scratch), progress.advance):
                        where = f"{model}: " if model else ""
                        raise BundleError(f"{path}: {where}{fault}; nothing was unpacked, get the bundle again")
                for manifest in bundle.manifests:
                    place = target / manifest.model
                    place.parent.mkdir(parents=True, exist_ok=True)
                    (Path(scratch) / manifest.model).rename(place)
        return bundle.manifests


def _require_free(place: Path) -> None:
    """Raise BundleError if there is something at a model's place, or what is no folder on the way to it."""
    if os.path.lexists(place):
        raise BundleError(f"{place} is already there; remove it, or unpack elsewhere")
    for parent in place.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                what = "a link that leads nowhere" if parent.is_symlink() and not parent.exists() else "a file"
                raise BundleError(f"{parent} is {what}, where a folder has to be; remove it, or unpack elsewhere")
            return


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make a folder and those above it. If what is done with it fails, those that were made go again, if empty."""
    made = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        raise


class _Bundle:
    """An opened bundle: its manifests, and one passage through its files. A context manager."""

    def __init__(self, path: Path) -> None:
        """Open the tar and read its manifest. Raises BundleError."""
        self.path = path
        try:
            self._tar = tarfile.open(path, "r:")  # noqa: SIM115 - closed in __exit__
        except (tarfile.TarError, OSError, ValueError) as error:
            raise BundleError(f"{path}: not a bundle, or a damaged one ({error}); get it again") from error
        try:
            self.manifests = self._manifests()
        except BaseException:
            self._tar.close()
            raise
        self.size = sum(manifest.size for manifest in self.manifests)

    def __enter__(self) -> _Bundle:
        return self

    def __exit__(self, *_: object) -> None:
        self._tar.close()

    def _manifests(self) -> list[Manifest]:
        info = self._next()
        if info is None or info.name != BUNDLE_MANIFEST or not _is_plain_file(info):
            raise BundleError(
                f"{self.path}: not a bundle of embedserve: its first file is not {BUNDLE_MANIFEST}; "
                "`embedserve pack` makes bundles"
            )
        if info.size > _MAX_MANIFEST_BYTES:
            raise BundleError(f"{self.path}: {BUNDLE_MANIFEST} claims {size(info.size)}; get the bundle again")
        where = f"{self.path}: {BUNDLE_MANIFEST}"
        try:
            raw = self._open(info).read()
        except tarfile.TarError as error:
            raise BundleError(f"{where}: not a manifest ({error}); get the bundle again") from error
        content: Any = parse_manifest(raw, where)
        models = content.get("models") if isinstance(content, dict) else None
        if not isinstance(models, list) or not models:
            raise BundleError(f"{where}: field 'models': expected a list with a model at least; get the bundle again")
        manifests = [Manifest.from_json(model, where) for model in models]
        ids = sorted(manifest.model for manifest in manifests)
        for id_ in ids:
            if ids.count(id_) > 1 or any(other.startswith(f"{id_}/") for other in ids):
                raise BundleError(f"{where}: the model {id_!r} is in it twice; get the bundle again")
        return manifests

    def read(self, target: Path | None, advance: Callable[[int], None]) -> Iterator[tuple[str, str]]:
        """Go through all files, write them below `target` if given, and yield (model id, fault) for what is wrong."""
        left = {
            f"{manifest.model}/{name}": (manifest.model, name, expected)
            for manifest in self.manifests
            for name, expected in [(MANIFEST, _sum_of_bytes(manifest.encode())), *manifest.files.items()]
        }
        try:
            while (info := self._next()) is not None:
                if info.name not in left:
                    yield "", f"unexpected  {_printable(info.name)}"
                    continue
                if not _is_plain_file(info):
                    yield "", f"hostile     {_printable(info.name)}: a link or device; expected a plain file"
                    continue
                model, name, expected = left[info.name]
                if info.size != expected.size:
                    del left[info.name]
                    yield model, f"changed     {name}: {info.size} bytes, expected {expected.size}"
                    continue
                found = self._copy(info, target, advance)
                del left[info.name]
                if found.sha256 != expected.sha256:
                    yield model, f"changed     {name}: SHA-256 {found.sha256}, expected {expected.sha256}"
            if (rest := self.path.stat().st_size - self._tar.offset) > tarfile.RECORDSIZE:
                yield "", f"unexpected  {rest} bytes behind the end of the archive"
        except (BundleError, tarfile.TarError) as error:
            yield "", f"damaged     the archive is truncated or damaged ({error})"
        for model, name, _ in left.values():
            yield model, f"missing     {name}"

    def _copy(self, info: tarfile.TarInfo, target: Path | None, advance: Callable[[int], None]) -> FileSum:
        with self._open(info) as source:
            if target is None:
                return copy(source, None, info.size, advance)
            place = target / info.name
            place.parent.mkdir(parents=True, exist_ok=True)
            with place.open("xb") as file:
                return copy(source, file, info.size, advance)

    def _open(self, info: tarfile.TarInfo) -> BinaryIO:
        file = self._tar.extractfile(info)
        assert file is not None  # only plain files get here
        return cast(BinaryIO, file)

    def _next(self) -> tarfile.TarInfo | None:
        try:
            return self._tar.next()
        except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
            raise BundleError(f"{self.path}: a damaged header: {error}") from error


def _is_plain_file(info: tarfile.TarInfo) -> bool:
    # isreg() would let sparse files through, whose claimed size is not the one in the archive.
    return info.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and info.sparse is None


def _sum_of_bytes(content: bytes) -> FileSum:
    return copy(io.BytesIO(content), None, len(content), lambda _: None)


def _printable(name: str) -> str:
    # A hostile archive chose it, and must not write to the terminal.
    return name if name.isprintable() else ascii(name)


def _require_space(place: Path, wanted: int, what: str) -> None:
    free = shutil.disk_usage(place).free
    if wanted > free:
        raise BundleError(f"{place}: {what} need {size(wanted)}, but only {size(free)} are free there")
