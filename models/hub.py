"""`embedserve pull`: a model from the Hugging Face hub into a folder that the server reads.

Meant for a machine with access; the server itself never calls this. The order of a pull:

    ask what the revision is and what files it has      one request; a branch becomes a commit
    choose the files that the server needs              layout.needed
    fetch each, going on where an earlier pull stopped  into a hidden folder beside the place
    compare sizes and SHA-256 with what the hub states  a damaged file is removed and named
    convert pickles to safetensors                      convert
    write embedserve.json, move everything into place
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, cast

from embedserve.models import catalog
from embedserve.models.errors import CheckpointError, HubError
from embedserve.models.layout import is_plain, needed, pickles
from embedserve.models.manifest import CHUNK, MANIFEST, FileSum, Manifest, files_in, is_model_id, sum_of
from embedserve.models.progress import size

_SECONDS = 30  # for the answer to a question; a download's own patience is HF_HUB_DOWNLOAD_TIMEOUT


@dataclass(frozen=True)
class _RemoteFile:
    """What the hub states of a file: its SHA-256 where it lies in large-file storage, else git's SHA-1 of it."""

    size: int
    sha256: str | None
    git_sha1: str | None

    def agrees_with(self, path: Path) -> bool:
        """Whether a file is the stated one. Some mirrors state neither sum; then its size has to do."""
        found = path.stat().st_size
        if found != self.size or self.sha256 is not None:
            return found == self.size and sum_of(path).sha256 == self.sha256
        if self.git_sha1 is None:
            return True
        digest = hashlib.sha1(b"blob %d\0" % found, usedforsecurity=False)
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest() == self.git_sha1


def pull(
    model: str,
    models_dir: Path,
    *,
    revision: str | None = None,
    onnx: bool = False,
    endpoint: str | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> Path:
    """Fetch a model into models_dir/<its id>, and return that folder.

    model: a name of the catalogue, which pins the revision, or any `<organisation>/<name>` of the hub (main).
    revision: a commit, tag or branch instead. onnx: the ONNX graphs too. endpoint: the hub's URL; by default what
    HF_ENDPOINT says, or huggingface.co. tell: called with a line about each step.
    What is there already, of the same revision, is not fetched again. Raises HubError, CheckpointError or BundleError.
    """
    entry = catalog.find(model)
    repository = (entry.repository or entry.id) if entry is not None else model.strip()
    id_ = entry.id if entry is not None else repository
    if not is_model_id(repository) or "/" not in repository:
        raise HubError(
            f"model {model!r}: not in the catalogue (`embedserve models` lists it) and not `<organisation>/<name>`, as "
            "the hub names models"
        )
    hub = _Hub(repository, revision or (entry.revision if entry is not None else None), endpoint)
    place = models_dir / id_
    manifest = Manifest(id_, {}, repository, hub.commit, entry.licence if entry is not None else hub.licence)
    if place.exists():
        manifest = _manifest_of(place, hub.commit)
    tell(f"{repository} at {hub.commit}, from {hub.endpoint}")
    staging = place.with_name(f".{place.name}.pull")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        with _alone(staging):
            # By commit: what an earlier pull of another one left behind must not get in between.
            _pull_into(place, staging / hub.commit, hub, manifest, onnx, tell)
            shutil.rmtree(staging)
    except OSError as error:
        raise HubError(f"{place}: cannot be written ({error.strerror or error})") from error
    return place


def _manifest_of(place: Path, commit: str) -> Manifest:
    """The manifest of a folder that is there already, for more files of the same commit. Raises HubError."""
    manifest = Manifest.read(place)
    if manifest is None or manifest.revision != commit:
        what = f"at revision {manifest.revision}" if manifest is not None else f"without {MANIFEST}"
        raise HubError(f"{place} is already there, {what}; wanted is {commit}: remove the folder, or pull to elsewhere")
    return manifest


def _pull_into(
    place: Path, parts: Path, hub: _Hub, manifest: Manifest, onnx: bool, tell: Callable[[str], None]
) -> None:
    """Fetch into `parts` what `place` lacks, and bring it there."""
    parts.mkdir(exist_ok=True)
    there = {
        name: file
        for name, file in manifest.files.items()
        if (place / name).is_file() and (place / name).stat().st_size == file.size
    }
    if any(file.source is not None and name not in there for name, file in manifest.files.items()):
        # Shards are converted together with their index, so all of them again.
        there = {name: file for name, file in there.items() if file.source is None}
    converted = {file.source.partition(" ")[0] for file in there.values() if file.source is not None}

    def fetch(name: str) -> Path:
        return place / name if name in there else _fetch(hub, name, parts, tell)

    try:
        chosen = needed(hub.files, fetch, onnx=onnx)
    except CheckpointError as error:
        raise CheckpointError(f"{hub.repository} at {hub.commit}: {error}") from error
    wanted = [name for name in chosen if name not in there and name not in converted]
    if not wanted:
        tell(f"nothing to do: {place} has all of it")
        return
    _require_space(hub, wanted, parts)
    for name in wanted:
        fetch(name)
    new = _convert(wanted, parts, tell)
    manifest = replace(manifest, files={**there, **new})
    for name in [*files_in(parts)]:
        if name not in new:  # a pickle that was converted, or fetched by an earlier pull with other options
            (parts / name).unlink()
    for folder, _, _ in os.walk(parts, topdown=False):
        if not os.listdir(folder):
            os.rmdir(folder)
    if place.exists():
        for name in new:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (parts / name).replace(place / name)
        manifest.write(place)
    else:
        manifest.write(parts)
        parts.rename(place)
    tell(f"{place}: {len(manifest.files)} files, {size(manifest.size)}")


def _convert(names: Sequence[str], parts: Path, tell: Callable[[str], None]) -> dict[str, FileSum]:
    """Convert the pickles among fetched files; the sums of all files that are to stay, by name."""
    sources: dict[str, str | None] = dict.fromkeys(names)
    if found := pickles(names):
        from embedserve.models.convert import convert  # torch

        for conversion in convert(parts, names):
            tell(f"{conversion.source} → {conversion.target}")
            del sources[conversion.source]
            sources[conversion.target] = f"{conversion.source} {sum_of(parts / conversion.source).sha256}"
        assert not set(found) & set(sources)
    return {name: replace(sum_of(parts / name), source=source) for name, source in sorted(sources.items())}


def _fetch(hub: _Hub, name: str, parts: Path, tell: Callable[[str], None]) -> Path:
    """Fetch a file unless an earlier pull has, going on where that stopped. Raises HubError."""
    path, remote = parts / name, hub.files[name]
    if path.is_file():
        return path
    part = path.with_name(f".{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    with part.open("ab") as file:
        if file.tell() > remote.size:
            file.truncate(0)
        _require_space(hub, [name], parts)
        tell(f"  {name}  {size(remote.size)}" + (f", from {size(file.tell())} on" if file.tell() else ""))
        hub.download(name, file)
    if not remote.agrees_with(part):
        part.unlink()
        raise HubError(
            f"{hub.repository}: {name} arrived damaged: its SHA is not the one that the hub states; it was removed, "
            "pull again"
        )
    part.rename(path)
    return path


def _require_space(hub: _Hub, names: Sequence[str], parts: Path) -> None:
    """Raise HubError if what is still to come does not fit; a pickle needs its room twice, for its new form."""
    present = sum(
        path.stat().st_size
        for name in names
        for path in (parts / name, (parts / name).with_name(f".{Path(name).name}.part"))
        if path.is_file()
    )
    twice = [name for name in names if name.endswith((".bin", ".pt"))]
    missing = sum(hub.files[name].size for name in [*names, *twice]) - present
    free = shutil.disk_usage(parts).free
    if missing > free:
        raise HubError(
            f"{parts.parent.parent}: {hub.repository} needs {size(missing)} more, but only {size(free)} are free there"
        )


@contextmanager
def _alone(staging: Path) -> Iterator[None]:
    """Hold a lock on the folder. Raises HubError if another process does."""
    with (staging / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise HubError(f"{staging}: another pull of this model is at work; wait for it to end") from None
        yield


class _CutOffError(HubError):
    """The network failed: what arrived until then can be gone on with."""


class _Hub:
    """One revision of one repository: its commit, its files, and how to fetch them."""

    def __init__(self, repository: str, revision: str | None, endpoint: str | None) -> None:
        """Ask the hub. Raises HubError."""
        # Read when the library is imported. Nobody is to learn what a closed network takes in.
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        try:
            import huggingface_hub
            from huggingface_hub import constants
        except ImportError:
            raise HubError(
                'pulling needs the package huggingface_hub: pip install "huggingface_hub>=0.36,<3" (in a checkout of '
                'embedserve, pip install ".[pull]"); or fetch the folder by other means and put it at '
                "DIR/<organisation>/<name>"
            ) from None
        self.repository = repository
        self.endpoint = endpoint or constants.ENDPOINT
        with self._explained(repository, revision):
            info = huggingface_hub.HfApi(endpoint=self.endpoint).model_info(
                repository, revision=revision, files_metadata=True, timeout=_SECONDS
            )
        if info.sha is None or not re.fullmatch(r"[0-9a-f]{40}", info.sha):
            raise HubError(f"{self.endpoint} states no commit for {repository}; is it a model hub?")
        self.commit = info.sha
        self.licence: str | None = getattr(info.card_data, "license", None)
        self.files: dict[str, _RemoteFile] = {}
        for file in info.siblings or []:
            if file.size is not None and is_plain(file.rfilename) and file.rfilename != MANIFEST:
                sha256 = file.lfs["sha256"] if file.lfs is not None else None
                self.files[file.rfilename] = _RemoteFile(file.size, sha256, file.blob_id)

    def download(self, name: str, file: BinaryIO) -> None:
        """Append what a file still lacks. Raises HubError; what arrived until then stays in the file."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        # Not hf_hub_download: since huggingface_hub 2 it begins an interrupted file anew, which on a slow line means
        # never to have 16 GB. Bytes as they are: a compressed answer cannot be gone on with in the middle.
        headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
        url, expected = (
            hf_hub_url(self.repository, name, revision=self.commit, endpoint=self.endpoint),
            self.files[name],
        )
        while True:
            start = file.tell()
            try:
                with self._explained(f"{self.repository}: {name}", self.commit):
                    http_get(
                        url,
                        file,
                        resume_size=start,
                        headers=headers,
                        expected_size=expected.size,
                        displayed_filename=name,
                    )
                return
            except _CutOffError:
                # huggingface_hub 1 goes on by itself; before, it gave up when an answer ended early.
                if not start < file.tell() < expected.size:
                    raise

    @contextmanager
    def _explained(self, what: str, revision: str | None) -> Iterator[None]:
        """Errors of the library and of the network as a HubError that says what to do."""
        from huggingface_hub import errors

        # The library's HTTP client is requests, httpx or httpx2, by its version; this is the client's own base class.
        transport = cast(tuple[type[Exception], ...], errors.HfHubHTTPError.__bases__)
        try:
            yield
        except errors.GatedRepoError as error:
            raise HubError(
                f"{what} is gated: accept its terms on {self.endpoint}/{self.repository}, then set HF_TOKEN to a token "
                "of that account"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise HubError(f"{what}: there is no revision {revision!r} of it on {self.endpoint}") from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(
                f"{what}: {self.endpoint} has no such model, or shows it only to those who may see it; check the name, "
                "or set HF_TOKEN"
            ) from error
        except errors.HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else "no"
            remedy = "set HF_TOKEN to a token that may read it" if status in (401, 403) else "pull again later"
            raise HubError(f"{what}: {self.endpoint} answered with status {status}; {remedy}") from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise HubError(f"{what}: the disk is full; make room and pull again, it goes on") from error
            raise self._unreachable(what, error) from error
        except transport as error:
            raise self._unreachable(what, error) from error

    def _unreachable(self, what: str, error: Exception) -> _CutOffError:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return _CutOffError(
            f"{what} cannot be had from {self.endpoint} ({reason}); check the network and HTTPS_PROXY, set HF_ENDPOINT "
            "for a mirror, and pull again: it goes on where it stopped"
        )
