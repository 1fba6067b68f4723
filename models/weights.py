"""safetensors → parameters, strictly: a tensor that is missing, misshapen or left over is an error.

`Weights` hands tensors out, `Parameters` brings them to a device and dtype, in little more host memory than they take.
Never a pickle: a `.bin` checkpoint can run code when it is read, so it is refused with the way out.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from embedserve.models.errors import CheckpointError
from embedserve.models.files import open_file, present
from embedserve.models.layout import PICKLE, PICKLE_INDEX, WEIGHTS, WEIGHTS_INDEX, shards_of

# As safetensors names them.
_FLOATS = ("F32", "F16", "BF16", "F64")
# Bytes from which on the C library, too, asks the kernel for memory, as long as nothing was given back.
_LARGE = 128 << 10

# TensorFlow's names, still found in old checkpoints.
_OLD_NAMES = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}


class Weights:
    """The tensors of one checkpoint, handed out by name; a context manager within which they are taken.

    Take every tensor of the graph with `take`; at the end of the block, `finish` raises for what nobody took.
    """

    def __init__(
        self,
        folder: Path,
        *,
        file: str | None = None,
        prefixes: Iterable[str] = ("",),
        ignored: Iterable[str] = (),
    ) -> None:
        """Read the heads of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

        file: read this file of the folder instead.
        prefixes are tried in order: the first that some tensor begins with is stripped from all names.
        ignored are regular expressions of whole names (after stripping) that the graph does not use.
        Raises CheckpointError if there is no such file, only a pickle, or a file is damaged.
        """
        self.folder = folder
        self._ignored = tuple(re.compile(pattern) for pattern in ignored)
        self._source: dict[str, Path] = {}
        files = _files(folder) if file is None else {folder / file: None}
        for path, expected in files.items():
            self._list(path, expected)
        self._prefix = next((p for p in prefixes if p and any(name.startswith(p) for name in self._source)), "")
        self._left = set(self._source)

    def __enter__(self) -> Weights:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Call `finish`, unless an error is on its way already."""
        if error is None:
            self.finish()

    def _list(self, file: Path, expected: set[str] | None) -> None:
        with _opened(file) as handle:
            names = set(handle.keys())
        if expected is not None and (missing := sorted(expected - names)):
            raise CheckpointError(
                f"{file}: tensor {missing[0]!r} is missing though {WEIGHTS_INDEX} places it here; copy the checkpoint "
                "again"
            )
        for name in names:
            if name in self._source:
                raise CheckpointError(
                    f"{file}: tensor {name!r} is also in {self._source[name].name}; "
                    "remove the file that does not belong to the checkpoint"
                )
            self._source[name] = file

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of this name (without prefix)."""
        return self._prefix + name in self._source

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return tensor `name` (without prefix) in its stored dtype, on the CPU: a view of the mapped file.

        Raises CheckpointError if it is absent, has another shape, or is not of a floating dtype.
        """
        stored = self._stored_name(name)
        file = self._source[stored]
        # A mapping of its own for each tensor: what was read of a mapping stays in memory until all of it goes, so with
        # one for the whole file the weights would be there twice by the time the last of them is copied.
        with _opened(file) as handle:
            found = handle.get_slice(stored)
            if tuple(found.get_shape()) != shape:
                raise CheckpointError(
                    f"{file}: tensor {stored!r} has shape {found.get_shape()}, but config.json asks for "
                    f"{list(shape)}; the two do not belong to one checkpoint"
                )
            if found.get_dtype() not in _FLOATS:
                raise CheckpointError(
                    f"{file}: tensor {stored!r} is stored as {found.get_dtype()}; expected one of "
                    f"{', '.join(_FLOATS)}: quantised checkpoints are not supported, use the original one"
                )
            tensor: Tensor = handle.get_tensor(stored)
        self._left.discard(stored)
        return tensor

    def _stored_name(self, name: str) -> str:
        candidates = [self._prefix + name]
        for new, old in _OLD_NAMES.items():
            if name.endswith(new):
                candidates.append(self._prefix + name.removesuffix(new) + old)
        for candidate in candidates:
            if candidate in self._source:
                return candidate
        raise CheckpointError(
            f"{self.folder}: no tensor {' or '.join(map(repr, candidates))} in the checkpoint; it is incomplete, or "
            "its config.json names another architecture than the weights have"
        )

    def finish(self) -> None:
        """Raise CheckpointError if a tensor was not taken and is not on the list of ignored ones."""
        unknown = sorted(
            name
            for name in self._left
            if not any(pattern.fullmatch(name.removeprefix(self._prefix)) for pattern in self._ignored)
        )
        if unknown:
            more = f" and {len(unknown) - 3} more" if len(unknown) > 3 else ""
            raise CheckpointError(
                f"{self._source[unknown[0]]}: the model has no use for tensor {', '.join(map(repr, unknown[:3]))}"
                f"{more}; the weights belong to another architecture than config.json says, and dropping them would "
                "give wrong vectors"
            )


class Parameters:
    """The tensors of a checkpoint as a model holds them: on its device, in its dtype, in memory of their own.

    Never a view of the file, which somebody may overwrite while the server runs. One tensor after the other, so that of
    what is converted or goes to another device only one is in host memory besides.
    """

    def __init__(self, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self._weights, self._device, self._dtype = weights, device, dtype

    def tensor(self, name: str, *shape: int) -> Tensor:
        """Return tensor `name` of this shape. Raises as `Weights.take`."""
        return self._empty(shape).copy_(self._weights.take(name, shape))

    def stacked(self, names: Sequence[str], rows: Sequence[int], *inner: int) -> Tensor:
        """Return tensors [rows[i], *inner] one below the other, [sum of rows, *inner]: one product instead of several.

        Raises as `Weights.take`.
        """
        whole = self._empty((sum(rows), *inner))
        # Into place, where torch.cat would need all parts beside the whole.
        for name, part, count in zip(names, torch.split(whole, list(rows)), rows, strict=True):
            part.copy_(self._weights.take(name, (count, *inner)))
        return whole

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        size = math.prod(shape) * self._dtype.itemsize
        if self._device.type != "cpu" or size < _LARGE:
            return torch.empty(shape, device=self._device, dtype=self._dtype)
        # Straight from the kernel, and back to it at the end. oneDNN copies most weights into a layout of its own, and
        # the C library would keep the places of the originals, between those copies: 26 % more for bge-base.
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(memory, dtype=self._dtype).view(shape)


def _opened(file: Path) -> Any:
    """The safetensors file, mapped; a context manager. Its tensors outlive it."""
    # For its errors: the library says of a file that may not be read that there is none, and waits for a pipe.
    open_file(file).close()
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: not a readable safetensors file ({error}); copy the checkpoint again"
        ) from error


def _files(folder: Path) -> Mapping[Path, set[str] | None]:
    """The safetensors files of a checkpoint, each with the tensors that the index promises in it."""
    if present(folder / WEIGHTS):
        return {folder / WEIGHTS: None}
    index = folder / WEIGHTS_INDEX
    if present(index):
        return _shards(index)
    pickles = [name for name in (PICKLE, PICKLE_INDEX) if present(folder / name)]
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}: a pickle can run code when it is read, so only safetensors are loaded; convert it "
            f"with `embedserve convert {folder}`, which runs nothing in it"
        )
    raise CheckpointError(
        f"{folder}: neither {WEIGHTS} nor {WEIGHTS_INDEX} is there; copy the checkpoint's weights too"
    )


def _shards(index: Path) -> Mapping[Path, set[str] | None]:
    promised: dict[str, set[str]] = {}
    for tensor, file in shards_of(index).items():
        promised.setdefault(file, set()).add(tensor)
    shards: dict[Path, set[str] | None] = {}
    for file, tensors in sorted(promised.items()):
        if not file.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: field 'weight_map' names {file!r}; expected the plain name of a .safetensors file"
            )
        if not present(index.parent / file):
            raise CheckpointError(
                f"{index.parent / file}: this shard of the weights is missing; copy the checkpoint again"
            )
        shards[index.parent / file] = tensors
    return shards
