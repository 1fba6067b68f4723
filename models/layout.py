"""Which files of a checkpoint the server needs, in a folder and on the hub alike. Imports no torch.

A repository holds the same weights up to six times over (safetensors, pickle, TensorFlow, Flax, OpenVINO, ONNX in eight
precisions), so what is wanted is named, not what is unwanted.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from embedserve.models.config import HEADS
from embedserve.models.errors import CheckpointError
from embedserve.models.files import open_file, read_file
from embedserve.models.json_file import load_json

_CONFIGURATION = re.compile(
    r"config\.json|modules\.json|config_sentence_transformers\.json|sentence_\w[\w-]*_config\.json"
    r"|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|preprocessor_config\.json"
)
# Most licences ask that their text goes along.
_LICENCE = re.compile(r"(LICEN[CS]E|NOTICE)(\.txt|\.md)?", re.IGNORECASE)

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = f"{WEIGHTS}.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = f"{PICKLE}.index.json"
# An index has about 100 bytes a tensor.
_MAX_INDEX_BYTES = 64 << 20

# By folder, the first that has any counts. jina-clip has a graph for each tower.
_GRAPHS = {
    folder: [
        f"{folder}{name}{precision}.onnx"
        for name in ("model", "text_model", "vision_model")
        for precision in ("", "_fp16")
    ]
    for folder in ("onnx/", "")
}


def needed(names: Collection[str], fetch: Callable[[str], Path], *, onnx: bool) -> list[str]:
    """Choose from the names of all files (relative, with slashes) those that the server reads, sorted.

    fetch gives the path of a file whose content decides on others: module lists, indexes of shards, graphs.
    A pickle is chosen only where the same weights are not there as safetensors; it has to be converted (see `convert`).
    onnx: also the ONNX graphs in float32 and float16, with their external data. Raises CheckpointError if the files do
    not make a model.
    """
    names = frozenset(names)
    chosen: set[str] = set()
    weights: set[str] = set()
    for folder in _module_folders(names, fetch):
        inside = [name for name in names if str(PurePosixPath(name).parent) == (folder or ".")]
        chosen.update(name for name in inside if _CONFIGURATION.fullmatch(PurePosixPath(name).name))
        weights.update(_weights(names, folder, fetch))
    if not weights:
        raise CheckpointError(
            "no weights in a form the server reads: expected model.safetensors, or pytorch_model.bin to convert, "
            "whole or in shards with their index"
        )
    if not any(PurePosixPath(name).name == "tokenizer.json" for name in chosen):
        raise CheckpointError(
            "no tokenizer.json, the only form of a tokenizer that the server reads; "
            "`AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` makes one of most others"
        )
    for forms in HEADS.values():
        weights.update([name for name in forms if name in names][:1])
    if onnx:
        weights.update(_graphs(names, fetch))
    return sorted(chosen | weights | {name for name in names if _LICENCE.fullmatch(name)})


def _module_folders(names: Collection[str], fetch: Callable[[str], Path]) -> list[str]:
    """The folder itself, as "", and the ones that modules.json names."""
    folders = [""]
    if "modules.json" in names:
        entries = load_json(fetch("modules.json"))
        paths = [entry.get("path") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        folders += [path.strip("/") for path in paths if isinstance(path, str)]
    return list(dict.fromkeys(folders))


def _weights(names: Collection[str], folder: str, fetch: Callable[[str], Path]) -> set[str]:
    """The weights in one folder, in the first form that is there; several with a shard missing is an error."""
    prefix = f"{folder}/" if folder else ""
    for single in (WEIGHTS, PICKLE):
        if prefix + single in names:
            return {prefix + single}
        index = f"{prefix}{single}.index.json"
        if index in names:
            shards = {prefix + shard for shard in shards_of(fetch(index)).values()}
            if missing := sorted(shards - set(names)):
                raise CheckpointError(f"{index} names the shard {missing[0]}, which is not there")
            return {index, *shards}
    return set()


def pickles(names: Iterable[str]) -> list[str]:
    """Among the names of a checkpoint's files, the pickles to convert and their indexes: those without safetensors."""
    names = frozenset(names)
    found = []
    for name in sorted(names):
        folder, slash, file = name.rpartition("/")
        prefix = folder + slash
        if file == PICKLE or (file == PICKLE_INDEX and prefix + PICKLE not in names):
            if not {prefix + WEIGHTS, prefix + WEIGHTS_INDEX} & names:
                found.append(name)
        elif any(name == pickle and converted not in names for converted, pickle in HEADS.values()):
            found.append(name)
    return found


def shards_of(index: Path) -> dict[str, str]:
    """Read an index of shards: tensor name → plain file name. Raises CheckpointError."""
    try:
        weight_map = json.loads(read_file(index, _MAX_INDEX_BYTES), object_pairs_hook=_unique)["weight_map"]
    except _TwiceError as error:
        raise CheckpointError(f"{index}: names {error.name!r} twice; copy the file again") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{index}: not a JSON object with a field 'weight_map'; copy the file again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: field 'weight_map' must map each tensor to a file name; copy the file again")
    for file in weight_map.values():
        if not isinstance(file, str) or not is_plain(file) or "/" in file:
            raise CheckpointError(
                f"{index}: field 'weight_map' names {file!r}; expected the plain name of a file in the folder"
            )
    return weight_map


class _TwiceError(Exception):
    """A JSON object has two fields of one name."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json.loads alone would keep the last of two fields with one name, and not say so."""
    names: dict[str, Any] = {}
    for name, value in pairs:
        if name in names:
            raise _TwiceError(name)
        names[name] = value
    return names


def is_plain(name: str) -> bool:
    """Whether a name is a relative path that stays below its folder, on every system, and shows nothing hidden.

    No "..", no absolute path, no backslash or drive, no control characters, no part that begins with a dot.
    """
    parts = name.split("/")
    return (
        len(name) <= 1024
        and name.isprintable()
        and not any(character in name for character in '\\:*?"<>|')
        and all(part and not part.startswith(".") and len(part.encode()) <= 255 for part in parts)
    )


# --- ONNX -------------------------------------------------------------------------------------------------------------


def has_graph(names: Collection[str]) -> bool:
    """Whether one of the graphs is there that `needed` would choose."""
    return any(graph in names for candidates in _GRAPHS.values() for graph in candidates)


def _graphs(names: Collection[str], fetch: Callable[[str], Path]) -> set[str]:
    """The graphs of the folder onnx/, or else of the root, and the files that hold their tensors."""
    for prefix, candidates in _GRAPHS.items():
        if graphs := [graph for graph in candidates if graph in names]:
            data = {prefix + location for graph in graphs for location in external_data(fetch(graph))}
            if missing := sorted(data - set(names)):
                raise CheckpointError(f"{graphs[0]} keeps tensors in {missing[0]}, which is not there")
            return {*graphs, *data}
    raise CheckpointError(
        "no ONNX graph: expected onnx/model.onnx or model.onnx; `embedserve export MODEL --to onnx` makes one"
    )


# Field numbers of onnx.proto, by message: which lead towards a tensor's external data.
_LEADS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}


def external_data(graph: Path) -> set[str]:
    """The files, relative to the graph's folder, in which an ONNX graph keeps tensors. Raises CheckpointError.

    Exporters name them as they like (model.onnx_data, Constant_7_attr__value), so only the graph tells. Its protobuf is
    walked here, since pulling must not need the package onnx; tensors inside are skipped, never read.
    """
    found: set[str] = set()
    try:
        with open_file(graph) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _walk(data, 0, len(data), "model", found)
    except (OSError, ValueError, IndexError, RecursionError) as error:
        raise CheckpointError(f"{graph}: not a readable ONNX graph ({error}); get the file again") from error
    if unsafe := sorted(name for name in found if not is_plain(name)):
        raise CheckpointError(f"{graph}: keeps tensors in {unsafe[0]!r}; expected a file inside the folder")
    return found


def _walk(data: mmap.mmap, start: int, end: int, message: str, found: set[str]) -> None:
    for number, begin, stop in _fields(data, start, end):
        lead = _LEADS[message].get(number)
        if lead == "entry":
            pair = {field: data[a:b] for field, a, b in _fields(data, begin, stop)}
            if pair.get(1) == b"location":
                found.add(pair.get(2, b"").decode("utf-8"))
        elif lead is not None:
            _walk(data, begin, stop, lead, found)


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, begin, end) of each length-delimited field of a protobuf message."""
    while at < end:
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 1:
            at += 8
        elif kind == 5:
            at += 4
        elif kind == 2:
            length, at = _varint(data, at)
            if at + length > end:
                raise ValueError("a field ends behind its message")
            yield key >> 3, at, at + length
            at += length
        else:
            raise ValueError(f"no protobuf: wire type {kind}")


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no protobuf: a number of more than ten bytes")
