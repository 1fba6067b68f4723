"""Reading safetensors: what is damaged, missing or double is named; what is read stands in memory of its own."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from embedserve.models.errors import CheckpointError
from embedserve.models.weights import Parameters, Weights

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.arange(3.0), "c": torch.arange(12.0).view(4, 3)}
CPU = torch.device("cpu")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in two shards; returns the folder."""
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    weight_map["c"] = weight_map["b"]
    for shard in set(weight_map.values()):
        save_file({name: TENSORS[name] for name in TENSORS if weight_map[name] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    with Weights(folder) as weights:
        return {name: weights.take(name, tuple(tensor.shape)).clone() for name, tensor in TENSORS.items()}


def edited(file: Path, edit: Callable[[dict[str, Any]], None], data: bytes | None = None) -> None:
    """Rewrite a safetensors file with another header, or other bytes of tensors."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    edit(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + (raw[8 + size :] if data is None else data))


def test_one_file_and_shards_give_the_same(file: Path, shards: Path) -> None:
    whole = read_all(file.parent)
    file.unlink()  # it came first; now the index counts
    for name, tensor in read_all(shards).items():
        assert torch.equal(tensor, TENSORS[name])
        assert torch.equal(whole[name], TENSORS[name])


# Files


@pytest.mark.parametrize("kept", [4, 8, 100, -1])
def test_a_file_that_was_cut_off_is_named(file: Path, kept: int) -> None:
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file .*copy the"):
        read_all(file.parent)


@pytest.mark.parametrize(
    "edit",
    [
        lambda header: header["c"].update(data_offsets=[36, 1 << 40]),
        lambda header: header["c"].update(shape=[1 << 30, 3]),
        lambda header: header["c"].update(shape=[1 << 40, 1 << 40]),
        lambda header: header["c"].update(data_offsets=[84, 36]),
        lambda header: header["b"].update(data_offsets=header["a"]["data_offsets"]),
        lambda header: header.pop("b"),
        lambda header: header["a"].update(dtype="F99"),
        lambda header: header.update(d=[]),
    ],
    ids=[
        "beyond the file", "larger than its bytes", "overflow", "backwards", "overlap", "a hole", "unknown dtype",
        "no tensor",
    ],
)  # fmt: skip
def test_a_header_that_lies_is_an_error_of_the_file(file: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    edited(file, edit)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file"):
        read_all(file.parent)


def test_a_header_larger_than_the_file_is_an_error_of_the_file(file: Path) -> None:
    file.write_bytes(struct.pack("<Q", 1 << 60) + file.read_bytes()[8:])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        read_all(file.parent)


def test_a_folder_instead_of_a_file_is_not_taken_for_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a regular file"):
        read_all(tmp_path)


# Shards


def test_a_missing_shard_is_named(shards: Path) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: this shard .*is missing"):
        read_all(shards)


def test_a_shard_that_was_cut_off_is_named(shards: Path) -> None:
    shard = shards / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors: not a readable"):
        read_all(shards)


def test_a_tensor_in_two_shards_is_named(shards: Path) -> None:
    save_file({name: TENSORS[name] for name in ("a", "b")}, shards / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'b' is also in model-00001-of-00002\.safetensors"):
        read_all(shards)


def test_a_tensor_that_the_index_names_twice_is_named(shards: Path) -> None:
    index = shards / "model.safetensors.index.json"
    entries = json.loads(index.read_text())["weight_map"] | {"a": "model-00001-of-00002.safetensors"}
    listed = ", ".join(f'"{name}": "{file}"' for name, file in [*entries.items(), ("a", entries["b"])])
    index.write_text(f'{{"weight_map": {{{listed}}}}}')
    with pytest.raises(CheckpointError, match=r"index\.json: names 'a' twice"):
        read_all(shards)


def test_a_shard_with_more_than_the_index_says_is_no_smaller_model(shards: Path) -> None:
    save_file({"a": TENSORS["a"], "stray": torch.ones(1)}, shards / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors: the model has no use for tensor 'stray'"):
        read_all(shards)


# Tensors


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn])
def test_a_tensor_of_another_dtype_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({**TENSORS, "b": TENSORS["b"].to(dtype)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor 'b' is stored as [A-Z0-9_]+; expected one of F32, F16, BF16"):
        read_all(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_dtype_of_checkpoints_becomes_the_models(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({name: tensor.to(dtype) for name, tensor in TENSORS.items()}, tmp_path / "model.safetensors")
    with Weights(tmp_path) as weights:
        parameters = Parameters(weights, CPU, torch.float32)
        stacked = parameters.stacked(["a", "c"], [2, 4], 3)
        bias = parameters.tensor("b", 3)
    assert stacked.dtype == bias.dtype == torch.float32
    assert torch.equal(stacked, torch.cat([TENSORS["a"], TENSORS["c"]]))
    assert torch.equal(bias, TENSORS["b"])


def test_a_block_that_leaves_a_tensor_out_fails(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no use for tensor 'b', 'c'"), Weights(file.parent) as weights:
        weights.take("a", (2, 3))


def test_an_error_within_the_block_is_not_hidden_by_what_is_left(file: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'a' has shape \[2, 3\]"), Weights(file.parent) as weights:
        weights.take("a", (3, 2))


@pytest.mark.parametrize("rows", [3, 40_000], ids=["small", "large"])
def test_a_file_that_is_overwritten_changes_no_loaded_weight(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(rows, 2)}, path)
    with Weights(tmp_path) as weights:
        loaded = Parameters(weights, CPU, torch.float32).tensor("a", rows, 2)
    with path.open("r+b") as opened:  # in place, as `cp` does
        opened.seek(0)
        opened.write(bytes(path.stat().st_size))
    assert torch.equal(loaded, torch.ones(rows, 2))
