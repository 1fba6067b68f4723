"""Pickles to safetensors: every tensor as it was, nothing run, nothing half-written."""

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from embedserve.models import convert as conversion
from embedserve.models.convert import convert, convert_folder
from embedserve.models.errors import CheckpointError
from embedserve.models.layout import pickles
from embedserve.models.manifest import FileSum, Manifest, differences, sum_of
from embedserve.models.weights import Weights


def converted(folder: Path, content: object, **options: Any) -> dict[str, Tensor]:
    torch.save(content, folder / "pytorch_model.bin", **options)
    convert_folder(folder)
    return load_file(folder / "model.safetensors")


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype
        and found[name].shape == tensor.shape
        and bool(((found[name] == tensor) | (found[name] != found[name]) & (tensor != tensor)).all())
        for name, tensor in expected.items()
    )


KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_names_shapes_dtypes_and_values_stay(tmp_path: Path, zipped: bool) -> None:
    torch.manual_seed(1)
    tensors = {f"layer.{kind}": (torch.randn(3, 5) * 9).to(kind) for kind in KINDS}
    tensors |= {
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "odd": torch.tensor([float("nan"), -0.0, 1e-45]),
    }
    assert same(converted(tmp_path, tensors, _use_new_zipfile_serialization=zipped), tensors)


def test_tensors_that_share_memory_are_written_each_for_itself(tmp_path: Path) -> None:
    table = torch.randn(6, 4)
    tensors = {
        "embeddings": table,
        "decoder": table,
        "turned": table.t(),
        "part": table[2:4],
        "parameter": torch.nn.Parameter(table),
    }
    assert same(converted(tmp_path, tensors), tensors)


def test_shards_get_an_index_of_their_own(tmp_path: Path) -> None:
    parts = {"00001": {"a": torch.randn(2, 3), "b": torch.randn(3)}, "00002": {"c": torch.randn(4)}}
    weight_map = {}
    for number, tensors in parts.items():
        torch.save(tensors, tmp_path / f"pytorch_model-{number}-of-00002.bin")
        weight_map |= dict.fromkeys(tensors, f"pytorch_model-{number}-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_folder(tmp_path, remove=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 52}
    with Weights(tmp_path) as weights:
        for tensors in parts.values():
            for name, tensor in tensors.items():
                assert torch.equal(weights.take(name, tuple(tensor.shape)), tensor)
        weights.finish()


@pytest.mark.parametrize(("placed", "word"), [({"a": 1, "b": 1, "z": 1}, "missing"), ({"a": 1}, "not in the index")])
def test_a_shard_that_is_not_what_the_index_says_is_refused(tmp_path: Path, placed: dict[str, int], word: str) -> None:
    torch.save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    index = {"weight_map": dict.fromkeys(placed, "pytorch_model-1.bin")}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"pytorch_model-1.bin: tensor '[bz]' is {word}"):
        convert_folder(tmp_path)
    assert not list(tmp_path.glob("*.safetensors*"))


def test_the_heads_of_bge_m3_become_weight_and_bias(tmp_path: Path) -> None:
    heads = {"weight": torch.randn(4, 8).half(), "bias": torch.randn(4).half()}
    torch.save(heads, tmp_path / "colbert_linear.pt")
    torch.save(heads, tmp_path / "sparse_linear.pt")
    convert_folder(tmp_path)
    assert same(load_file(tmp_path / "colbert_linear.safetensors"), heads)
    assert same(load_file(tmp_path / "sparse_linear.safetensors"), heads)


def test_a_head_with_other_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"linear.weight": torch.ones(2, 2)}, tmp_path / "colbert_linear.pt")
    with pytest.raises(CheckpointError, match=r"colbert_linear\.pt: holds linear\.weight; expected weight and bias"):
        convert_folder(tmp_path)


class Creates:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_pickle_that_would_run_code_is_refused_and_nothing_ran(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "trap"
    with pytest.raises(CheckpointError, match=r"asks to load \w+\.mkdir,.*nothing in it was run"):
        converted(tmp_path, {"a": torch.ones(1), "b": Creates(trap)}, _use_new_zipfile_serialization=zipped)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.ones(1)], "holds a list; expected a dict of tensors"),
        ({"model": {"a": torch.ones(1)}}, "entry 'model' is a dict"),
        ({"a": torch.ones(1), "epoch": 3}, "entry 'epoch' is a int"),
        ({3: torch.ones(1)}, "entry 3 is a Tensor"),
        ({}, "holds nothing; expected a dict of tensors"),
        ({"a": torch.ones(2, 2).to_sparse()}, "tensor 'a' is sparse, which safetensors cannot hold"),
        ({"a": torch.ones(2, device="meta")}, "tensor 'a' is on the device meta, which safetensors cannot hold"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, "tensor 'a' has the dtype complex128, which safetensors"),
    ],
)
def test_what_is_no_dict_of_tensors_is_refused(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        converted(tmp_path, content)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a": torch.zeros(1).expand(10**11)}, "tensor 'a' of shape [100000000000] would take 400,000,000,000 bytes"),
        (dict.fromkeys(map(str, range(99)), torch.zeros(500)), "its 99 tensors would take 198,000 bytes"),
    ],
    ids=["one", "all"],
)
def test_a_small_file_cannot_ask_for_much_room(tmp_path: Path, tensors: dict[str, Tensor], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)):
        converted(tmp_path, tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_without_torch_s_frame_is_refused_in_our_own_words(tmp_path: Path, protocol: int) -> None:
    content = {"a": Creates(tmp_path / "trap")}
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(CheckpointError, match="nothing in it was run") as caught:
        convert_folder(tmp_path)
    assert "weights_only" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a regular file"):
        convert_folder(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 100, 1500])
def test_a_truncated_pickle_is_refused(tmp_path: Path, kept: int) -> None:
    torch.save({"a": torch.randn(500)}, tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "pytorch_model.bin").read_bytes()
    (tmp_path / "pytorch_model.bin").write_bytes(whole[:kept])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not readable as tensors"):
        convert_folder(tmp_path)


def test_what_the_disk_gives_back_otherwise_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaging(tensors: dict[str, Tensor], path: Path, **options: Any) -> None:
        save_file({name: tensor + 1 for name, tensor in tensors.items()}, path, **options)

    monkeypatch.setattr(conversion, "save_file", damaging)
    with pytest.raises(CheckpointError, match="tensor 'a' reads back other than it was written"):
        converted(tmp_path, {"a": torch.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_model.bin"]


def test_the_pickle_stays_unless_it_is_to_go_and_the_manifest_follows(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "pytorch_model.bin")
    Manifest("acme/own", {"pytorch_model.bin": sum_of(tmp_path / "pytorch_model.bin")}).write(tmp_path)
    convert_folder(tmp_path)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    assert sorted(manifest.files) == ["model.safetensors", "pytorch_model.bin"]
    assert differences(tmp_path, manifest) == []
    (tmp_path / "model.safetensors").unlink()
    convert_folder(tmp_path, remove=True)
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    assert sorted(manifest.files) == ["model.safetensors"]
    assert differences(tmp_path, manifest) == []


def test_a_folder_elsewhere_can_take_the_result(tmp_path: Path) -> None:
    (tmp_path / "source" / "0_Transformer").mkdir(parents=True)
    torch.save({"a": torch.ones(3)}, tmp_path / "source" / "0_Transformer" / "pytorch_model.bin")
    convert(tmp_path / "source", ["0_Transformer/pytorch_model.bin"], tmp_path / "target")
    assert (tmp_path / "target" / "0_Transformer" / "model.safetensors").is_file()
    assert not (tmp_path / "source" / "0_Transformer" / "model.safetensors").exists()


def test_where_safetensors_are_there_already_nothing_is_to_do() -> None:
    assert pickles(["pytorch_model.bin", "model.safetensors", "colbert_linear.pt", "colbert_linear.safetensors"]) == []
    assert pickles(["pytorch_model.bin", "pytorch_model.bin.index.json"]) == ["pytorch_model.bin"]
    assert pickles(["2_Dense/pytorch_model.bin", "model.safetensors", "training_args.bin", "other.pt"]) == [
        "2_Dense/pytorch_model.bin"
    ]


def test_the_error_for_a_pickle_has_the_command(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"`embedserve convert {tmp_path}`"):
        Weights(tmp_path)


def test_a_manifest_with_a_sum_that_is_none_is_refused(tmp_path: Path) -> None:
    Manifest("acme/own", {"a": FileSum(1, "not a sum")}).write(tmp_path)
    with pytest.raises(Exception, match=r"field 'files\.a\.sha256': expected 64 hexadecimal digits"):
        Manifest.read(tmp_path)
