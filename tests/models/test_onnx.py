"""The ONNX backend on small graphs made here: what a graph may take and give, and what is refused before it serves."""

import os
import re
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from embedserve.models import onnx as backend
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.config import ImageSettings, ModelConfig, read_config
from embedserve.models.errors import BackendError, BatchError, CheckpointError
from embedserve.models.onnx import OnnxBackend, find_graph
from embedserve.server.runner import Runner

CPU = torch.device("cpu")
LENGTHS = [4, 1, 9, 4]
WIDTH, VOCABULARY, POSITIONS = 96, 101, 60
PLAIN = ("input_ids", "attention_mask")

_random = np.random.default_rng(3)
WORDS = _random.standard_normal((VOCABULARY, WIDTH), dtype=np.float32)
PLACES = _random.standard_normal((POSITIONS, WIDTH), dtype=np.float32)
KINDS = _random.standard_normal((2, WIDTH), dtype=np.float32)


def write_graph(
    file: Path,
    inputs: tuple[str, ...] = PLAIN,
    outputs: tuple[str, ...] = ("last_hidden_state",),
    *,
    integers: int = TensorProto.INT64,
    floats: int = TensorProto.FLOAT,
    width: int = WIDTH,
    batch: str | int = "batch",
    masked: bool = True,
    external: bool = False,
) -> Path:
    """A model in miniature: a token's state is the sum of its embeddings, plus the mean of those of its text.

    Outputs with "token", "hidden" or "states" in their names are the states, the others their masked mean.
    """
    nodes = [
        helper.make_node("Gather", ["words", "input_ids"], ["e0"]),
        helper.make_node("Cast", ["attention_mask" if "attention_mask" in inputs else "input_ids"], ["m0"], to=1),
        helper.make_node("Unsqueeze", ["m0", "last"], ["m1"]),
        # 1 for every token where the mask is to be ignored.
        helper.make_node("Pow", ["m1", "one" if masked else "zero"], ["m"]),
    ]
    embedded = "e0"
    for table, name in (("kinds", "token_type_ids"), ("places", "position_ids")):
        if name in inputs:
            nodes.append(helper.make_node("Gather", [table, name], [f"g_{name}"]))
            nodes.append(helper.make_node("Add", [embedded, f"g_{name}"], [f"e_{name}"]))
            embedded = f"e_{name}"
    if any("past" in name for name in inputs):
        # Keys of the past stand before those of the text, which here are the embeddings: [batch, 1, seq, width].
        nodes.append(helper.make_node("Unsqueeze", [embedded, "first"], ["keys"]))
        nodes.append(helper.make_node("Concat", ["past_key_values.0.key", "keys"], ["all"], axis=2))
        nodes.append(helper.make_node("Squeeze", ["all", "first"], ["seen"]))
        embedded = "seen"
    nodes += [
        helper.make_node("Mul", [embedded, "m"], ["em"]),
        helper.make_node("ReduceSum", ["em", "first"], ["sum"], keepdims=1),
        helper.make_node("ReduceSum", ["m", "first"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["mean"]),
        helper.make_node("Add", [embedded, "mean"], ["states"]),
        helper.make_node("Mul", ["states", "m"], ["sm"]),
        helper.make_node("ReduceSum", ["sm", "first"], ["ssum"], keepdims=0),
        helper.make_node("Squeeze", ["count", "first"], ["c"]),
        helper.make_node("Div", ["ssum", "c"], ["pooled"]),
    ]
    shown = []
    for name in outputs:
        states = any(word in name for word in ("token", "hidden", "states"))
        nodes.append(helper.make_node("Cast", ["states" if states else "pooled"], [name], to=floats))
        shown.append(helper.make_tensor_value_info(name, floats, [batch, "seq", width] if states else [batch, width]))
    constants = {
        "words": WORDS[:, :width],
        "places": PLACES[:, :width],
        "kinds": KINDS[:, :width],
        "first": np.array([1]),
        "last": np.array([2]),
        "one": np.float32(1),
        "zero": np.float32(0),
    }
    given = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 1, "past", width])
        if name.startswith("past")
        else helper.make_tensor_value_info(name, integers, [batch, "seq"])
        for name in inputs
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        given,
        shown,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    save(graph, file, external=external)
    return file


def save(graph: onnx.GraphProto, file: Path, *, external: bool = False) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, str(file), save_as_external_data=external, location=f"{file.name}_data", size_threshold=1000)


def batch() -> tuple[PackedBatch, list[np.ndarray]]:
    """A batch, and its texts in the batch's order."""
    # Not 0, the padding.
    texts = [_random.integers(1, VOCABULARY, length, dtype=np.int32) for length in LENGTHS]
    rows = PackedRows.pack(np.concatenate(texts), np.array(LENGTHS, dtype=np.int32))
    return PackedBatch.on_cpu(rows), [texts[index] for index in rows.order]


def states_of(text: np.ndarray, *, types: bool = False, first_place: int | None = None) -> np.ndarray:
    """What the graph gives for one text alone."""
    embedded = WORDS[text] + (KINDS[0] if types else 0)
    if first_place is not None:
        embedded = embedded + PLACES[first_place : first_place + len(text)]
    return embedded + embedded.mean(axis=0)


def largest_difference(found: torch.Tensor, expected: list[np.ndarray]) -> float:
    return float(np.abs(found.float().numpy() - np.concatenate(expected)).max())


@pytest.fixture
def config(checkpoint: Callable[..., Path]) -> ModelConfig:
    return read_config(checkpoint())


def load(config: ModelConfig, dtype: torch.dtype = torch.float32) -> OnnxBackend:
    return OnnxBackend(config, CPU, dtype)


def graph_of(config: ModelConfig, **changes: Any) -> Path:
    return write_graph(config.folder / "onnx" / "model.onnx", **changes)


# --- what a graph takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("integers", [TensorProto.INT64, TensorProto.INT32], ids=["int64", "int32"])
@pytest.mark.parametrize(
    "more", [(), ("token_type_ids",), ("position_ids",), ("token_type_ids", "position_ids")], ids=str
)
def test_inputs_are_taken_from_the_graph(config: ModelConfig, more: tuple[str, ...], integers: int) -> None:
    graph_of(config, inputs=(*PLAIN, *more), integers=integers)
    packed, texts = batch()
    expected = [
        states_of(text, types="token_type_ids" in more, first_place=0 if "position_ids" in more else None)
        for text in texts
    ]
    found = load(config).hidden_states(packed)
    assert found.shape == (sum(LENGTHS), WIDTH)
    assert largest_difference(found, expected) < 1e-5


def test_positions_begin_where_the_architecture_has_them(config: ModelConfig) -> None:
    graph_of(config, inputs=(*PLAIN, "position_ids"))
    shifted = replace(config, architecture=replace(config.architecture, position_offset=2))
    packed, texts = batch()
    expected = [states_of(text, first_place=2) for text in texts]
    assert largest_difference(load(shifted).hidden_states(packed), expected) < 1e-5


def test_a_decoder_made_for_generation_gets_an_empty_past(config: ModelConfig) -> None:
    graph_of(config, inputs=(*PLAIN, "past_key_values.0.key"))
    packed, texts = batch()
    assert largest_difference(load(config).hidden_states(packed), [states_of(text) for text in texts]) < 1e-5


def test_an_input_that_is_not_known_is_refused(config: ModelConfig) -> None:
    file = graph_of(config, inputs=(*PLAIN, "use_cache_branch"))
    with pytest.raises(CheckpointError, match="input 'use_cache_branch' is unknown; known are input_ids") as caught:
        load(config)
    assert str(file) in str(caught.value)


def test_a_graph_that_does_not_look_at_its_mask_is_refused(config: ModelConfig) -> None:
    graph_of(config, masked=False)
    with pytest.raises(CheckpointError, match=r"model\.onnx: a text of 2 tokens gets other states beside a longer one"):
        load(config)


def test_a_graph_of_fixed_size_is_refused(config: ModelConfig) -> None:
    graph_of(config, batch=1)
    with pytest.raises(CheckpointError, match=r"does not run with input_ids \[2, 5\].*expected one whose axes"):
        load(config)


# --- what a graph gives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "outputs",
    [("sentence_embedding", "token_embeddings"), ("pooler_output", "last_hidden_state"), ("some_states",)],
    ids=str,
)
def test_token_states_are_preferred_so_that_pooling_is_the_models_own(
    config: ModelConfig, outputs: tuple[str, ...]
) -> None:
    graph_of(config, outputs=outputs)
    packed, texts = batch()
    loaded = load(config)
    assert not loaded.pools
    assert largest_difference(loaded.hidden_states(packed), [states_of(text) for text in texts]) < 1e-5


@pytest.mark.parametrize("outputs", [("sentence_embedding",), ("text_embeds", "other"), ("vector",)], ids=str)
def test_a_graph_that_pools_gives_a_vector_a_text(config: ModelConfig, outputs: tuple[str, ...]) -> None:
    graph_of(config, outputs=outputs)
    packed, texts = batch()
    loaded = load(config)
    assert loaded.pools
    expected = [states_of(text).mean(axis=0, keepdims=True) for text in texts]
    assert largest_difference(loaded.hidden_states(packed), expected) < 1e-5


@pytest.mark.parametrize(
    "outputs", [("pooler_output",), ("logits",), ("dense_vecs", "sparse_vecs", "colbert_states")], ids=str
)
def test_an_output_is_never_guessed(config: ModelConfig, outputs: tuple[str, ...]) -> None:
    graph_of(config, outputs=outputs)
    with pytest.raises(CheckpointError, match=f"the outputs are {', '.join(outputs)}; expected one of last_hidden"):
        load(config)


def test_a_graph_of_another_model_is_refused(config: ModelConfig) -> None:
    graph_of(config, width=64)
    with pytest.raises(CheckpointError, match=r"model\.onnx: output 'last_hidden_state' has the shape \[2, 5, 64\]"):
        load(config)


def test_an_output_whose_name_promises_other_axes_is_refused(config: ModelConfig) -> None:
    file = graph_of(config, outputs=("vector",))
    model = onnx.load(str(file))
    model.graph.node[-1].output[0] = model.graph.output[0].name = "last_hidden_state"
    onnx.save_model(model, str(file))
    with pytest.raises(CheckpointError, match=r"'last_hidden_state' has the shape \[2, 96\].* it is \[2, 5, 96\]"):
        load(config)


def test_float16_states_come_as_they_are_and_never_where_float32_was_asked(config: ModelConfig) -> None:
    graph_of(config, floats=TensorProto.FLOAT16)
    packed, texts = batch()
    loaded = load(config, torch.float16)
    states = loaded.hidden_states(packed)
    assert loaded.dtype == states.dtype == torch.float16
    assert largest_difference(states, [states_of(text) for text in texts]) < 1e-2
    with pytest.raises(CheckpointError, match="is float16, but float32 was asked"):
        load(config)


@pytest.mark.parametrize("outputs", [("last_hidden_state",), ("sentence_embedding",)], ids=str)
def test_through_the_runner_a_text_is_its_own_mean_of_unit_length(
    config: ModelConfig, outputs: tuple[str, ...]
) -> None:
    graph_of(config, outputs=outputs)
    runner = Runner.load(config.folder, device="cpu", backend="onnx", threads=1)
    texts = [_random.integers(1, VOCABULARY, length, dtype=np.int32) for length in LENGTHS]
    found = runner.run(
        np.concatenate(texts), np.array(LENGTHS, dtype=np.int32), np.full(len(LENGTHS), WIDTH, dtype=np.int32)
    )
    expected = np.stack([states_of(text).mean(axis=0) for text in texts])
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert (runner.info.backend, runner.info.cost) == ("onnx", "padded")
    assert found.finite.all()
    assert np.abs(found.arrays["dense"] - expected).max() < 1e-6


# --- images -----------------------------------------------------------------------------------------------------------


def write_tower(file: Path) -> np.ndarray:
    """A graph whose vector is the mean colour of an image through a matrix, which is returned."""
    matrix = _random.standard_normal((3, WIDTH), dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["pixel_values"], ["colour"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["colour", "matrix"], ["image_embeds"]),
    ]
    given = helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", 3, 8, 8])
    shown = helper.make_tensor_value_info("image_embeds", TensorProto.FLOAT, ["batch", WIDTH])
    save(helper.make_graph(nodes, "g", [given], [shown], [numpy_helper.from_array(matrix, "matrix")]), file)
    return matrix


def test_a_clip_models_two_graphs_serve_texts_and_images(config: ModelConfig) -> None:
    write_graph(config.folder / "onnx" / "text_model.onnx", outputs=("text_embeds",))
    matrix = write_tower(config.folder / "onnx" / "vision_model.onnx")
    settings = ImageSettings(size=8, tokens=4, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    loaded = load(replace(config, images=settings))
    pixels = _random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
    colours = (pixels / 255 - np.array(settings.mean)) / np.array(settings.std)
    expected = colours.mean(axis=(1, 2)) @ matrix
    assert loaded.pools
    assert largest_difference(loaded.images(torch.from_numpy(pixels)), [expected]) < 1e-4


def test_a_clip_model_without_its_image_graph_is_refused(config: ModelConfig) -> None:
    write_graph(config.folder / "onnx" / "text_model.onnx", outputs=("text_embeds",))
    settings = ImageSettings(size=8, tokens=4, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(CheckpointError, match=r"no vision_model\.onnx in"):
        load(replace(config, images=settings))


def test_a_text_model_takes_no_images(config: ModelConfig) -> None:
    graph_of(config)
    with pytest.raises(BatchError, match="texts alone"):
        load(config).images(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


# --- files ------------------------------------------------------------------------------------------------------------


def test_where_graphs_are_looked_for(config: ModelConfig) -> None:
    with pytest.raises(CheckpointError, match=r"no model\.onnx or text_model\.onnx in .*embedserve export MODEL"):
        find_graph(config, torch.float32)
    files = [config.folder / "model.onnx", config.folder / "onnx" / "model.onnx"]
    for file in files:  # the older layout, then the one that wins over it
        write_graph(file)
        assert find_graph(config, torch.float32) == file


def test_the_float16_file_is_for_float16_alone(config: ModelConfig) -> None:
    half = write_graph(config.folder / "onnx" / "model_fp16.onnx")
    with pytest.raises(CheckpointError, match=r"no model\.onnx"):
        find_graph(config, torch.float32)
    assert find_graph(config, torch.float16) == half


def test_without_a_float16_file_the_float32_one_runs_and_says_so(config: ModelConfig) -> None:
    graph_of(config)
    assert load(config, torch.float16).dtype == torch.float32


@pytest.mark.parametrize("damage", ["truncated", "not a graph", "no data"])
def test_a_damaged_file_is_named(config: ModelConfig, damage: str) -> None:
    file = graph_of(config, external=True)
    load(config)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "not a graph":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    else:
        (file.parent / "model.onnx_data").unlink()
    with pytest.raises(CheckpointError, match="cannot load the graph") as caught:
        load(config)
    assert str(file) in str(caught.value)


# --- ONNX Runtime itself ----------------------------------------------------------------------------------------------


def test_a_missing_package_comes_with_the_command(
    monkeypatch: pytest.MonkeyPatch, install_command: Callable[[str], str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=re.escape(install_command("onnx"))):
        backend.load_runtime(CPU)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def version(name: str) -> str:
        if name not in names:
            raise metadata.PackageNotFoundError(name)
        return "1.31.1"

    monkeypatch.setattr(metadata, "version", version)


def test_cuda_is_never_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    pretend_installed(monkeypatch, "onnxruntime")
    with pytest.raises(
        BackendError, match=r'cuda:0: this ONNX Runtime has no CUDA provider.* `pip install "onnxruntime-gpu>='
    ):
        backend.load_runtime(torch.device("cuda:0"))


def test_the_cpu_build_over_the_gpu_build_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    pretend_installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(
        BackendError, match="the one without CUDA won; run `pip uninstall -y onnxruntime onnxruntime-gpu`, then"
    ):
        backend.load_runtime(torch.device("cuda:0"))


def test_what_uninstalling_one_of_two_builds_leaves_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(BackendError, match="the package is empty; run `pip uninstall"):
        backend.load_runtime(CPU)


class Options:
    """Remembers what a session would be told."""

    def __init__(self) -> None:
        self.intra_op_num_threads = 0
        self.entries: dict[str, str] = {}

    def add_session_config_entry(self, key: str, value: str) -> None:
        self.entries[key.removeprefix("session.")] = value


def test_threads_of_a_pinned_caller_get_the_other_cores() -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("a single core: nothing to share out")
    free, pinned = Options(), Options()
    backend._share_cores(free, len(cores))
    os.sched_setaffinity(0, cores[:1])
    try:
        backend._share_cores(pinned, len(cores))
    finally:
        os.sched_setaffinity(0, cores)
    assert free.intra_op_num_threads == pinned.intra_op_num_threads == len(cores)
    assert free.entries == {"intra_op.allow_spinning": "0"}
    assert pinned.entries == {
        "intra_op_thread_affinities": ";".join(str(core + 1) for core in cores[1:]),
        "force_spinning_stop": "1",
        "intra_op.allow_spinning": "1",
    }
