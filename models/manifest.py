"""embedserve.json: what a model folder should hold, so that it can be checked after every journey. Imports no torch.

`embedserve pull`, `pack` and `convert` write it, `verify` compares. It guards against damage, not against somebody who
changes files and manifest together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from embedserve.models.errors import BundleError
from embedserve.models.layout import is_plain

MANIFEST = "embedserve.json"
FORMAT = 1
CHUNK = 1 << 20

_MAX_BYTES = 16 << 20


@dataclass(frozen=True)
class FileSum:
    """What a file should be: its size in bytes and its SHA-256 in hexadecimal digits.

    source: of a converted file, the name and SHA-256 of the pickle it was made from.
    """

    size: int
    sha256: str
    source: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A model's origin and files, by name relative to its folder.

    model: the id it is served under. repository, revision: where on the hub it came from, as far as that is known.
    embedserve: the version that wrote it.
    """

    model: str
    files: Mapping[str, FileSum] = field(default_factory=dict)
    repository: str | None = None
    revision: str | None = None
    licence: str | None = None
    embedserve: str | None = field(default_factory=lambda: version())

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files.values())

    def to_json(self) -> dict[str, Any]:
        """As an object for a JSON file."""
        files = {
            name: {key: value for key, value in vars(file).items() if value is not None}
            for name, file in sorted(self.files.items())
        }
        return {
            "format": FORMAT,
            "embedserve": self.embedserve,
            "model": self.model,
            "repository": self.repository,
            "revision": self.revision,
            "licence": self.licence,
            "files": files,
        }

    def encode(self) -> bytes:
        """The bytes of embedserve.json."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode() + b"\n"

    def write(self, folder: Path) -> None:
        """Put embedserve.json into a folder, replacing an older one at once."""
        part = folder / f".{MANIFEST}.part"
        part.write_bytes(self.encode())
        part.replace(folder / MANIFEST)

    @classmethod
    def from_json(cls, content: Any, where: str) -> Manifest:
        """Check and take over what JSON holds. Raises BundleError, naming `where` and the field."""

        def refuse(name: str, expected: str) -> BundleError:
            return BundleError(f"{where}: field {name!r}: expected {expected}; get the file again")

        if not isinstance(content, dict):
            raise BundleError(f"{where}: expected a JSON object; get the file again")
        if content.get("format") != FORMAT:
            raise BundleError(
                f"{where}: format {content.get('format')!r}, this version reads format {FORMAT}; "
                "use the version of embedserve that wrote it"
            )
        if not isinstance(content.get("model"), str) or not is_model_id(content["model"]):
            raise refuse("model", "`<name>` or `<organisation>/<name>`")
        for name in ("repository", "revision", "licence", "embedserve"):
            if not isinstance(content.get(name), str | None):
                raise refuse(name, "a text or null")
        if not isinstance(content.get("files"), dict) or not content["files"]:
            raise refuse("files", "an object with a file at least")
        files = {}
        for name, entry in content["files"].items():
            if not is_plain(name) or name == MANIFEST:
                raise refuse("files", f"names of files inside the folder, not {name!r}")
            if both := next((parent for parent in _parents(name) if parent in content["files"]), None):
                raise refuse("files", f"each name to be a file or a folder, but {both!r} is both, for {name!r}")
            try:
                file = FileSum(**entry)
            except TypeError:
                raise refuse(f"files.{name}", "size and sha256") from None
            if isinstance(file.size, bool) or not isinstance(file.size, int) or file.size < 0:
                raise refuse(f"files.{name}.size", "a number of bytes")
            if not isinstance(file.sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", file.sha256):
                raise refuse(f"files.{name}.sha256", "64 hexadecimal digits")
            if not isinstance(file.source, str | None):
                raise refuse(f"files.{name}.source", "a text")
            files[name] = file
        return cls(
            content["model"],
            files,
            content.get("repository"),
            content.get("revision"),
            content.get("licence"),
            content.get("embedserve"),
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest of a folder, None where there is none. Raises BundleError."""
        path = folder / MANIFEST
        try:
            with path.open("rb") as file:
                raw = file.read(_MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BundleError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
        return cls.from_json(parse_manifest(raw, str(path)), str(path))


def _parents(name: str) -> list[str]:
    return [parent.as_posix() for parent in PurePosixPath(name).parents][:-1]


def parse_manifest(raw: bytes, where: str) -> Any:
    """JSON of a manifest's size. Raises BundleError."""
    try:
        if len(raw) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES >> 20} MiB")
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not a manifest ({error}); get the file again") from error


def is_model_id(name: str) -> bool:
    """Whether a name is `<name>` or `<organisation>/<name>`, as `catalog.locate` takes them."""
    return is_plain(name) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None


def version() -> str | None:
    """The installed version of embedserve; None where it runs from its source tree."""
    try:
        return metadata.version("embedserve")
    except metadata.PackageNotFoundError:
        return None


def copy(source: BinaryIO, target: BinaryIO | None, limit: int, advance: Callable[[int], None]) -> FileSum:
    """Read up to `limit` bytes, write them to `target` if there is one, and return their sum."""
    digest, size = hashlib.sha256(), 0
    while size < limit and (chunk := source.read(min(CHUNK, limit - size))):
        digest.update(chunk)
        if target is not None:
            target.write(chunk)
        size += len(chunk)
        advance(len(chunk))
    return FileSum(size, digest.hexdigest())


def sum_of(path: Path, advance: Callable[[int], None] = lambda _: None) -> FileSum:
    """The sum of a file as it is."""
    with path.open("rb") as file:
        return copy(file, None, 1 << 62, advance)


def files_in(folder: Path) -> Iterator[str]:
    """The names of all files below a folder, links among them, except the manifest and what is hidden."""
    for place, folders, files in os.walk(folder):
        relative = Path(place).relative_to(folder)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and (relative / name).as_posix() != MANIFEST:
                yield (relative / name).as_posix()


def differences(folder: Path, manifest: Manifest, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """Compare a folder with its manifest: a line for each file that is missing, changed or unexpected."""
    lines = []
    for name, expected in sorted(manifest.files.items()):
        path = folder / name
        if not path.is_file():
            lines.append(f"missing     {name}")
            continue
        found = sum_of(path, advance)
        if found.size != expected.size:
            lines.append(f"changed     {name}: {found.size} bytes, expected {expected.size}")
        elif found.sha256 != expected.sha256:
            lines.append(f"changed     {name}: SHA-256 {found.sha256}, expected {expected.sha256}")
    return lines + [f"unexpected  {name}" for name in files_in(folder) if name not in manifest.files]


def record(folder: Path, names: list[str], *, removed: list[str] | None = None) -> None:
    """Enter files that a command has just made, or removed, into the folder's manifest, if it has one."""
    manifest = Manifest.read(folder)
    if manifest is not None:
        files = {name: file for name, file in manifest.files.items() if name not in (removed or [])}
        replace(manifest, files={**files, **{name: sum_of(folder / name) for name in names}}).write(folder)
