"""`pull` against a stand-in of the hub: what it asks for, what it makes of it, and what it says when it cannot."""

import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file
from tests.models.hub_stand_in import COMMIT, Hub, Repository

from embedserve.models import catalog, hub
from embedserve.models.errors import CheckpointError, HubError
from embedserve.models.hub import pull
from embedserve.models.layout import external_data
from embedserve.models.manifest import Manifest, differences
from embedserve.server.runner import Runner

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
OTHER = "f" * 40

JSON_FILES = {
    "config.json": b'{"model_type": "bert"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
}


@pytest.fixture
def stand_in() -> Iterator[Hub]:
    with Hub() as running:
        yield running


def saved(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def message(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protobuf message."""
    assert len(content) < 1 << 14
    return bytes([number << 3 | 2, len(content) & 127 | 128, len(content) >> 7]) + content


def graph(*locations: str) -> bytes:
    """An ONNX graph with a number field, an initializer of its own, and one in each of the files."""
    tensors = [message(8, b"inside") + message(9, b"\x00\x01\x02\x03")]
    for location in locations:
        entry = message(1, b"location") + message(2, location.encode())
        tensors.append(
            message(8, b"outside") + message(13, entry) + message(13, message(1, b"offset") + message(2, b"0"))
        )
    return b"\x08\x07" + message(7, b"".join(message(5, tensor) for tensor in tensors))


def test_a_model_of_the_catalogue_arrives_at_its_id_with_the_files_that_are_needed_and_no_others(
    stand_in: Hub, tmp_path: Path
) -> None:
    commit = catalog.find(MINILM).revision or COMMIT  # type: ignore[union-attr]
    wanted = {
        **JSON_FILES,
        "modules.json": json.dumps([{"path": "", "type": "T"}, {"path": "1_Pooling", "type": "P"}]).encode(),
        "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
        "config_sentence_transformers.json": b"{}",
        "sentence_bert_config.json": b'{"max_seq_length": 256}',
        "model.safetensors": b"weights" * 1000,
        "LICENSE": b"Apache",
    }
    unwanted = [
        "README.md",
        ".gitattributes",
        "pytorch_model.bin",
        "tf_model.h5",
        "rust_model.ot",
        "flax_model.msgpack",
        "model.fp16.safetensors",
        "vocab.txt",
        "modeling_custom.py",
        "train_script.py",
        "onnx/model.onnx",
        "onnx/model_qint8_avx512.onnx",
        "openvino/openvino_model.bin",
        "openvino/config.json",
    ]
    files = {**wanted, **dict.fromkeys(unwanted, b"not needed")}
    stand_in.repositories[MINILM] = Repository(files, {"main": OTHER, commit: commit})

    folder = pull("all-minilm-L6-V2", tmp_path, endpoint=stand_in.url)

    assert folder == tmp_path / MINILM == catalog.locate(MINILM, tmp_path)
    assert sorted(stand_in.names) == sorted(wanted)
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    assert sorted(found) == sorted([*wanted, "embedserve.json"])
    assert {name: found[name].read_bytes() for name in wanted} == wanted
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert (manifest.model, manifest.repository, manifest.revision) == (MINILM, MINILM, commit)
    assert manifest.licence == "Apache-2.0"
    assert differences(folder, manifest) == []


def test_what_was_pulled_gives_the_same_vectors(stand_in: Hub, tmp_path: Path, minilm: Path) -> None:
    files = {path.relative_to(minilm).as_posix(): path.read_bytes() for path in minilm.rglob("*") if not path.is_dir()}
    stand_in.repositories["acme/mini"] = Repository(files)
    folder = pull("acme/mini", tmp_path, endpoint=stand_in.url)
    ids, lengths, whole = (np.array(values, dtype=np.int32) for values in ([101, 7592, 2088, 102], [4], [384]))
    original, pulled = (
        Runner.load(place, device="cpu", threads=1).run(ids, lengths, whole) for place in (minilm, folder)
    )
    assert np.array_equal(original.dense, pulled.dense)


def test_a_model_outside_the_catalogue_gets_the_commit_that_main_is_now(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.repositories["acme/private"] = Repository({**JSON_FILES, "model.safetensors": b"w"}, licence="cc-by-4.0")
    manifest = Manifest.read(pull("acme/private", tmp_path, endpoint=stand_in.url))
    assert manifest is not None
    assert (manifest.revision, manifest.licence) == (COMMIT, "cc-by-4.0")


def test_of_shards_those_that_the_index_names(stand_in: Hub, tmp_path: Path) -> None:
    index = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}).encode()
    shards = {"model-1-of-2.safetensors": b"1", "model-2-of-2.safetensors": b"2"}
    files = {**JSON_FILES, **shards, "model.safetensors.index.json": index, "model-3-of-2.safetensors": b"3"}
    stand_in.repositories["acme/large"] = Repository(files)
    folder = pull("acme/large", tmp_path, endpoint=stand_in.url)
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(shards)


def test_a_shard_that_the_repository_lacks_is_told_before_any_weights_are_fetched(
    stand_in: Hub, tmp_path: Path
) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {**JSON_FILES, "model.safetensors.index.json": index, "model-1.safetensors": b"1"}
    stand_in.repositories["acme/large"] = Repository(files)
    with pytest.raises(CheckpointError, match=r"acme/large at .*: model.safetensors.index.json names .*model-2"):
        pull("acme/large", tmp_path, endpoint=stand_in.url)
    assert "model-1.safetensors" not in stand_in.names


def test_graphs_come_with_the_files_that_hold_their_tensors(stand_in: Hub, tmp_path: Path) -> None:
    files = {
        **JSON_FILES,
        "model.safetensors": b"w",
        "onnx/model.onnx": graph("model.onnx_data", "Constant_7_attr__value"),
        "onnx/model.onnx_data": b"data",
        "onnx/Constant_7_attr__value": b"constant",
        "onnx/model_fp16.onnx": graph(),
        "onnx/model_quantized.onnx": graph(),
        "onnx/model_O4.onnx": graph(),
        "onnx/tokenizer.json": b"{}",
        "model.onnx": graph(),
    }
    stand_in.repositories["acme/graph"] = Repository(files)
    folder = pull("acme/graph", tmp_path, onnx=True, endpoint=stand_in.url)
    assert sorted(path.name for path in (folder / "onnx").iterdir()) == [
        "Constant_7_attr__value",
        "model.onnx",
        "model.onnx_data",
        "model_fp16.onnx",
    ]
    assert not (folder / "model.onnx").exists()


def test_a_graph_s_files_are_those_that_onnx_wrote(tmp_path: Path) -> None:
    constant = numpy_helper.from_array(np.ones(300, dtype=np.float32), "inner")
    weight = numpy_helper.from_array(np.ones(300, dtype=np.float32), "weight")
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [300])
    branch = helper.make_graph([helper.make_node("Constant", [], ["z"], value=constant)], "b", [], [output])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=constant),
        helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", [], [output], [weight]))
    onnx.save(model, tmp_path / "inside.onnx")
    assert external_data(tmp_path / "inside.onnx") == set()
    for tensor in onnx.external_data_helper._get_all_tensors(model):
        where = f"{tensor.name}.{'' if tensor is model.graph.initializer[0] else 'of a node'}"
        onnx.external_data_helper.set_external_data(tensor, where)
    onnx.save(model, tmp_path / "outside.onnx")
    found = {path.name for path in tmp_path.iterdir()} - {"inside.onnx", "outside.onnx"}
    assert len(found) == 2
    assert external_data(tmp_path / "outside.onnx") == found


@pytest.mark.parametrize("location", ["../../../etc/passwd", "/etc/passwd", ".hidden", ""])
def test_a_graph_that_points_out_of_its_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "model.onnx").write_bytes(graph(location))
    with pytest.raises(CheckpointError, match="inside the folder"):
        external_data(tmp_path / "model.onnx")


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, graph("model.onnx_data")[:-5], b"<html>not found</html>"])
def test_a_file_that_is_no_graph_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a readable ONNX graph"):
        external_data(tmp_path / "model.onnx")


def test_graphs_added_to_a_model_that_is_there_are_all_that_is_fetched(stand_in: Hub, tmp_path: Path) -> None:
    files = {**JSON_FILES, "model.safetensors": b"w", "onnx/model.onnx": graph()}
    stand_in.repositories["acme/graph"] = Repository(files)
    pull("acme/graph", tmp_path, endpoint=stand_in.url)
    stand_in.asked.clear()
    folder = pull("acme/graph", tmp_path, onnx=True, endpoint=stand_in.url)
    assert stand_in.names == ["onnx/model.onnx"]
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert "onnx/model.onnx" in manifest.files
    assert differences(folder, manifest) == []


def pickled(**changes: bytes) -> dict[str, bytes]:
    """Files such as BAAI/bge-m3 has them: no safetensors, and two heads in half precision."""
    torch.manual_seed(3)
    heads = {"weight": torch.randn(4, 8).half(), "bias": torch.randn(4).half()}
    return {
        **JSON_FILES,
        "pytorch_model.bin": saved({"embeddings.LayerNorm.weight": torch.randn(8), "ids": torch.arange(5)}),
        "colbert_linear.pt": saved(heads),
        "sparse_linear.pt": saved({"weight": heads["weight"][:1], "bias": heads["bias"][:1]}),
        **changes,
    }


def test_pickles_are_converted_and_left_behind(stand_in: Hub, tmp_path: Path) -> None:
    files = pickled()
    stand_in.repositories["acme/m3"] = Repository(files)
    folder = pull("acme/m3", tmp_path, endpoint=stand_in.url)
    assert not [*folder.glob("*.bin"), *folder.glob("*.pt")]
    for source, target in [
        ("pytorch_model.bin", "model.safetensors"),
        ("colbert_linear.pt", "colbert_linear.safetensors"),
        ("sparse_linear.pt", "sparse_linear.safetensors"),
    ]:
        expected, found = torch.load(io.BytesIO(files[source]), weights_only=True), load_file(folder / target)
        assert {name: (t.dtype, t.tolist()) for name, t in found.items()} == {
            name: (t.dtype, t.tolist()) for name, t in expected.items()
        }
    manifest = Manifest.read(folder)
    assert manifest is not None
    assert (manifest.files["model.safetensors"].source or "").startswith("pytorch_model.bin ")
    stand_in.asked.clear()
    pull("acme/m3", tmp_path, endpoint=stand_in.url)
    assert stand_in.names == []


def test_a_converted_shard_that_was_lost_is_made_again(stand_in: Hub, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(4)}
    shards = {f"pytorch_model-{name}.bin": saved({name: tensor}) for name, tensor in tensors.items()}
    index = json.dumps({"weight_map": {name: f"pytorch_model-{name}.bin" for name in tensors}}).encode()
    stand_in.repositories["acme/shards"] = Repository({**JSON_FILES, **shards, "pytorch_model.bin.index.json": index})
    folder = pull("acme/shards", tmp_path, endpoint=stand_in.url)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not any(name.startswith("pytorch_model") for name in before)
    (folder / "model-a.safetensors").unlink()
    pull("acme/shards", tmp_path, endpoint=stand_in.url)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


class Creates:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_would_run_code_is_refused_and_nothing_ran(stand_in: Hub, tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    evil = saved({"weight": Creates(trap)})
    stand_in.repositories["acme/evil"] = Repository(pickled(**{"pytorch_model.bin": evil}))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: asks to load \w+\.mkdir,.*nothing in it was run"):
        pull("acme/evil", tmp_path / "models", endpoint=stand_in.url)
    assert not trap.exists()
    assert not (tmp_path / "models" / "acme" / "evil").exists()
    pickle.loads(pickle.dumps(Creates(trap)))  # noqa: S301 - the trap itself works
    assert trap.exists()


def test_a_pull_that_was_killed_goes_on_where_it_stopped(stand_in: Hub, tmp_path: Path) -> None:
    weights = np.random.default_rng(5).bytes(24 << 20)
    repository = Repository({**JSON_FILES, "model.safetensors": weights}, stall={"model.safetensors": 20 << 20})
    stand_in.repositories["acme/slow"] = repository
    code = f"""
from pathlib import Path
from embedserve.models.hub import pull
pull("acme/slow", Path({str(tmp_path)!r}), endpoint={stand_in.url!r})
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": ".typing", "HOME": str(tmp_path)})
    part = tmp_path / "acme" / ".slow.pull" / COMMIT / ".model.safetensors.part"
    until = time.monotonic() + 40
    while not (part.exists() and part.stat().st_size > 0):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    arrived = part.stat().st_size
    assert 0 < arrived < len(weights)
    assert not (tmp_path / "acme" / "slow").exists()

    repository.stall.clear()
    stand_in.asked.clear()
    folder = pull("acme/slow", tmp_path, endpoint=stand_in.url)
    assert stand_in.asked[0] == ("model.safetensors", f"bytes={arrived}-")
    assert "config.json" not in stand_in.names  # it had arrived
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_connection_that_drops_is_taken_up_again(stand_in: Hub, tmp_path: Path) -> None:
    weights = np.random.default_rng(6).bytes(24 << 20)
    stand_in.repositories["acme/drops"] = Repository(
        {**JSON_FILES, "model.safetensors": weights}, cut={"model.safetensors": 20 << 20}
    )
    folder = pull("acme/drops", tmp_path, endpoint=stand_in.url)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [ranged is not None for name, ranged in stand_in.asked if name == "model.safetensors"] == [False, True]


def test_a_server_that_sends_the_whole_file_again_is_understood(stand_in: Hub, tmp_path: Path) -> None:
    weights = np.random.default_rng(6).bytes(1 << 20)
    stand_in.repositories["acme/whole"] = Repository({**JSON_FILES, "model.safetensors": weights}, ranges=False)
    part = tmp_path / "acme" / ".whole.pull" / COMMIT / ".model.safetensors.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(weights[: 1 << 19])
    folder = pull("acme/whole", tmp_path, endpoint=stand_in.url)
    assert ("model.safetensors", f"bytes={1 << 19}-") in stand_in.asked
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_arrives_damaged_is_named_and_fetched_anew(stand_in: Hub, tmp_path: Path, name: str) -> None:
    files = {**JSON_FILES, "model.safetensors": b"weights"}
    damaged = bytes([files[name][0] ^ 1]) + files[name][1:]
    repository = Repository(files, arriving={name: damaged})
    stand_in.repositories["acme/damaged"] = repository
    with pytest.raises(HubError, match=f"{name} arrived damaged"):
        pull("acme/damaged", tmp_path, endpoint=stand_in.url)
    assert not (tmp_path / "acme" / "damaged").exists()
    repository.arriving.clear()
    stand_in.asked.clear()
    folder = pull("acme/damaged", tmp_path, endpoint=stand_in.url)
    assert (folder / name).read_bytes() == files[name]
    assert (name, None) in stand_in.asked


def plain() -> Mapping[str, bytes]:
    return {**JSON_FILES, "model.safetensors": b"w"}


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("acme/nothing", {}, "has no such model"),
        ("acme/plain", {"revision": "v9"}, "no revision 'v9'"),
        ("acme/gated", {}, r"gated: accept its terms on http://127.0.0.1:\d+/acme/gated, then set HF_TOKEN"),
        ("plain", {}, "not in the catalogue"),
        ("../../etc", {}, "not in the catalogue"),
        ("acme/no-weights", {}, "no weights in a form the server reads"),
        ("acme/no-tokenizer", {}, "no tokenizer.json"),
        ("acme/plain", {"onnx": True}, "no ONNX graph"),
    ],
)
def test_what_cannot_be_had_is_told_and_leaves_no_model(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, options: dict[str, Any], words: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    stand_in.repositories |= {
        "acme/plain": Repository(plain()),
        "acme/gated": Repository(plain(), gated=True),
        "acme/no-weights": Repository({**JSON_FILES, "model.gguf": b"w"}),
        "acme/no-tokenizer": Repository({"config.json": b"{}", "vocab.txt": b"a", "model.safetensors": b"w"}),
    }
    with pytest.raises((HubError, CheckpointError), match=words):
        pull(model, tmp_path, endpoint=stand_in.url, **options)
    assert "model.safetensors" not in stand_in.names
    assert not (tmp_path / model).exists()


def test_a_gated_model_is_had_with_the_token_of_the_environment(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    stand_in.repositories["acme/gated"] = Repository(plain(), gated=True)
    assert (pull("acme/gated", tmp_path, endpoint=stand_in.url) / "model.safetensors").is_file()


def test_a_hub_that_is_down_and_no_hub_at_all(tmp_path: Path) -> None:
    with Hub() as stand_in:
        stand_in.broken = 503
        with pytest.raises(HubError, match="answered with status 503; pull again later"):
            pull("acme/plain", tmp_path, endpoint=stand_in.url)
    with pytest.raises(HubError, match=r"cannot be had from .*check the network"):
        pull("acme/plain", tmp_path, endpoint=stand_in.url)


def test_a_disk_that_is_too_small_is_told_before_the_weights_are_asked_for(
    stand_in: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.repositories["acme/plain"] = Repository({**JSON_FILES, "model.safetensors": b"w" * 100_000})
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 90_000}))
    with pytest.raises(HubError, match=r"needs 100\.\d kB more, but only 90\.0 kB are free"):
        pull("acme/plain", tmp_path, endpoint=stand_in.url)
    assert "model.safetensors" not in stand_in.names


def test_a_folder_of_another_origin_is_not_touched(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.repositories["acme/plain"] = Repository(
        plain(), {"main": COMMIT, COMMIT: COMMIT, "old": OTHER, OTHER: OTHER}
    )
    own = tmp_path / "acme" / "plain"
    own.mkdir(parents=True)
    (own / "config.json").write_text("mine")
    with pytest.raises(HubError, match=r"is already there, without embedserve\.json"):
        pull("acme/plain", tmp_path, endpoint=stand_in.url)
    assert (own / "config.json").read_text() == "mine"
    pull("acme/plain", tmp_path / "second", revision="old", endpoint=stand_in.url)
    with pytest.raises(HubError, match=f"is already there, at revision {OTHER}; wanted is {COMMIT}"):
        pull("acme/plain", tmp_path / "second", endpoint=stand_in.url)


def test_names_that_lead_out_of_the_folder_are_never_asked_for(stand_in: Hub, tmp_path: Path) -> None:
    modules = json.dumps([{"path": "../../elsewhere", "type": "T"}, {"path": "/etc", "type": "T"}]).encode()
    hostile = {**plain(), "modules.json": modules, "../../elsewhere/config.json": b"{}", "/etc/config.json": b"{}"}
    stand_in.repositories["acme/hostile"] = Repository(hostile)
    pull("acme/hostile", tmp_path / "models", endpoint=stand_in.url)
    assert not [name for name in stand_in.names if name.startswith(("/", "."))]
    assert [path.name for path in tmp_path.iterdir()] == ["models"]


def test_two_pulls_of_one_model_do_not_mix(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.repositories["acme/plain"] = Repository(plain())
    staging = tmp_path / "acme" / ".plain.pull"
    staging.mkdir(parents=True)
    with hub._alone(staging), pytest.raises(HubError, match="another pull of this model is at work"):
        pull("acme/plain", tmp_path, endpoint=stand_in.url)


def test_without_the_package_the_error_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install_command: Callable[[str], str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=re.escape(install_command("pull"))):
        pull(MINILM, tmp_path)


def test_each_step_is_told(stand_in: Hub, tmp_path: Path) -> None:
    stand_in.repositories["acme/plain"] = Repository(plain())
    lines: list[str] = []
    tell: Callable[[str], None] = lines.append
    folder = pull("acme/plain", tmp_path, endpoint=stand_in.url, tell=tell)
    assert lines[0] == f"acme/plain at {COMMIT}, from {stand_in.url}"
    assert "  model.safetensors  1 B" in lines
    assert lines[-1].startswith(f"{folder}: 5 files, ")
