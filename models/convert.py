"""Pickled weights → safetensors, without running what a pickle asks for.

The server reads safetensors only: reading a pickle can run code. Here `torch.load(weights_only=True)` reads it, which
builds tensors and refuses everything else; what was written is compared with what was read, byte by byte.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedserve.models.errors import CheckpointError
from embedserve.models.files import open_file, present
from embedserve.models.layout import PICKLE_INDEX, WEIGHTS_INDEX, pickles, shards_of
from embedserve.models.manifest import files_in, record

# A layer that is used several times has its tensors in the file once, and is written as often as it has names.
_MOST_TIED = 8

_DTYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
    | {torch.bool, torch.complex64}
)


@dataclass(frozen=True)
class Conversion:
    """One written file, and the pickle (or index of pickles) that it replaces; names relative to the folder."""

    source: str
    target: str


def convert(folder: Path, names: Iterable[str], target: Path | None = None) -> list[Conversion]:
    """Convert what `pickles` finds among `names`, files of the folder, to safetensors in `target` (the same folder).

    pytorch_model.bin becomes model.safetensors; shards and their index likewise; colbert_linear.pt and sparse_linear.pt
    become colbert_linear.safetensors and sparse_linear.safetensors with the tensors weight and bias. Names, shapes and
    dtypes stay; tensors that share memory are written each for itself. The pickles stay where they are.
    Raises CheckpointError, naming the file; of a file that failed nothing is left.
    """
    target = folder if target is None else target
    done: list[Conversion] = []
    for name in pickles(names):
        if name.endswith(PICKLE_INDEX):
            done += _convert_shards(folder, name, target)
        else:
            written = re.sub(r"(pytorch_model)?(\.bin|\.pt)$", lambda m: f"{'model' if m[1] else ''}.safetensors", name)
            tensors = read_pickle(folder / name)
            if name.endswith(".pt") and set(tensors) != {"weight", "bias"}:
                raise CheckpointError(f"{folder / name}: holds {', '.join(sorted(tensors))}; expected weight and bias")
            _write(tensors, target / written)
            done.append(Conversion(name, written))
    return done


def convert_folder(folder: Path, *, remove: bool = False) -> list[Conversion]:
    """Convert the pickles of a folder in place, and keep its manifest right. remove: the pickles go afterwards.

    Raises CheckpointError or BundleError.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; expected a model's folder")
    done = convert(folder, files_in(folder))
    removed = [conversion.source for conversion in done] if remove else []
    for name in removed:
        (folder / name).unlink()
    record(folder, [conversion.target for conversion in done], removed=removed)
    return done


def _convert_shards(folder: Path, index: str, target: Path) -> list[Conversion]:
    weight_map = shards_of(folder / index)
    prefix = index.removesuffix(PICKLE_INDEX)
    new_names: dict[str, str] = {}
    total = 0
    for shard in sorted(set(weight_map.values())):
        if not present(folder / prefix / shard):
            raise CheckpointError(f"{folder / prefix / shard}: this shard of the weights is missing; get it again")
        new_names[shard] = f"{shard.removesuffix('.bin').replace('pytorch_model', 'model', 1)}.safetensors"
        tensors = read_pickle(folder / prefix / shard)
        expected = {name for name, place in weight_map.items() if place == shard}
        if set(tensors) != expected:
            odd = min(set(tensors) ^ expected)
            raise CheckpointError(
                f"{folder / prefix / shard}: tensor {odd!r} is {'missing' if odd in expected else 'not in the index'}; "
                "the files do not belong together, get the checkpoint again"
            )
        total += sum(tensor.nbytes for tensor in tensors.values())
        _write(tensors, target / prefix / new_names[shard])
    content = {
        "metadata": {"total_size": total},
        "weight_map": {name: new_names[shard] for name, shard in sorted(weight_map.items())},
    }
    # Last: with the index there, the checkpoint counts as converted.
    part = target / prefix / f".{WEIGHTS_INDEX}.part"
    part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    part.replace(target / prefix / WEIGHTS_INDEX)
    done = [Conversion(prefix + shard, prefix + name) for shard, name in new_names.items()]
    return [*done, Conversion(index, prefix + WEIGHTS_INDEX)]


def read_pickle(path: Path) -> Mapping[str, Tensor]:
    """Read a pickled dict of tensors without running anything in it.

    Raises CheckpointError, also for tensors that would take far more room than the file: a few bytes can claim any
    shape, with strides of 0.
    """
    with open_file(path) as file:  # or a device in its place would be read for ever
        size = os.fstat(file.fileno()).st_size
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks to report files that are no checkpoints
            # Only torch's zip format can be mapped; before torch 1.6 a checkpoint was a bare pickle.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # an interpreter of foreign bytes: there is no end to what it may raise
        if global_ := re.search(r"GLOBAL (\S+)", str(error)):
            raise CheckpointError(
                f"{path}: asks to load {global_[1].rstrip('.')}, which no weights need and which could run code; "
                "nothing in it was run. Take the model from a source you trust, or one with model.safetensors"
            ) from error
        # Not torch's words: they advise to run what is in the file.
        raise CheckpointError(
            f"{path}: not readable as tensors: it is damaged, or a pickle of other things, which could run code; "
            "nothing in it was run. Get the file again, or take a model with model.safetensors"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
    if not content:
        raise CheckpointError(f"{path}: holds nothing; expected a dict of tensors. Get the file again")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: entry {name!r} is a {type(value).__name__}; expected a dict of tensors alone, as "
                "`torch.save(model.state_dict(), …)` writes it"
            )
        if obstacle := _obstacle(value):
            raise CheckpointError(
                f"{path}: tensor {name!r} {obstacle}, which safetensors cannot hold; take the original checkpoint"
            )
        if value.nbytes > size:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(value.shape)} would take {value.nbytes:,} bytes, but the file "
                f"has {size:,}; take the original checkpoint"
            )
    total = sum(value.nbytes for value in content.values())
    if total > _MOST_TIED * size:
        raise CheckpointError(
            f"{path}: its {len(content)} tensors would take {total:,} bytes, but the file has {size:,}; expected at "
            f"most {_MOST_TIED} times as much, with tensors that share memory. Take the original checkpoint"
        )
    return content


def _obstacle(tensor: Tensor) -> str | None:
    """What keeps a tensor out of safetensors."""
    if tensor.is_quantized:
        return "is quantised"
    if tensor.layout is not torch.strided:
        return "is sparse"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}"
    if tensor.dtype not in _DTYPES:
        return f"has the dtype {str(tensor.dtype).removeprefix('torch.')}"
    return None


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file, compare it with the tensors, and only then give it its name."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        # Tied tensors are written twice: which of the names a model's code looks up is not known here.
        stored[name] = (
            tensor.detach().clone(memory_format=torch.contiguous_format)
            if storage in seen
            else tensor.detach().contiguous()
        )
        seen.add(storage)
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, part, metadata={"format": "pt"})
        _compare(stored, part)
        part.replace(path)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: cannot be written ({error})") from error
    finally:
        part.unlink(missing_ok=True)


def _compare(tensors: Mapping[str, Tensor], path: Path) -> None:
    with safe_open(path, framework="pt", device="cpu") as written:
        if set(written.keys()) != set(tensors):
            raise CheckpointError(f"{path}: the file just written has other tensors than were to go into it")
        for name, tensor in tensors.items():
            found = written.get_tensor(name)
            if found.dtype != tensor.dtype or found.shape != tensor.shape or not _same_bytes(found, tensor):
                raise CheckpointError(f"{path}: tensor {name!r} reads back other than it was written; check the disk")


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    # As bytes, since a NaN does not equal itself.
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
