"""The engine's sweep, on a tiny random model; no figure is asserted, only what it is counted from."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedserve.benchmarks import bench, engine, shapes
from embedserve.benchmarks.engine import Cell, cells, matrix_rate, pieces
from embedserve.kernels import dispatch, int8
from embedserve.models.config import ModelConfig, read_config
from embedserve.server.config import ConfigError

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 3000,
}


def tiny(name: str) -> shapes.Shape:
    shape = shapes.SHAPES[name]
    changes: dict[str, Any] = {**TINY}
    if name == "qwen3-0.6b":
        changes |= {"head_dim": 16, "num_key_value_heads": 1}
    return replace(shape, config=shape.config | changes)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    return bench.run(parser.parse_args(["engine", "--seconds", "0.05", *arguments]))


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_every_shape_is_swept(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, name, tiny(name))
    output = tmp_path / "out"
    what = ["--shape", name, "--device", "cpu", "--lengths", "5", "17", "--batches", "1", "full"]
    what += ["--max-batch-tokens", "64", "-o", str(output)]
    assert run(*what) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    # 12 texts of 5 tokens fit into 64, and 3 of 17.
    assert [(line["length"], line["texts"]) for line in lines] == [(5, 1), (5, 12), (17, 1), (17, 3)]
    for line in lines:
        assert line["calls"] >= 1
        assert line["tokens_per_second"] > 0
        assert line["share_of_matrix_rate"] > 0
        assert line["p99_ms"] >= line["p50_ms"] > 0
        assert (line["weights"], line["machine"]["max_batch_tokens"]) == ("random", 64)
    assert lines[3]["tokens"] == 51
    assert lines[3]["batches_a_call"] == 1
    # The file has them all: nothing is left to do.
    before = output.read_text()
    assert run("--resume", *what) == 0
    assert output.read_text() == before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_limit_is_the_fastest_product_of_all(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == "int8" and (why := int8.why_not()):
        pytest.skip(why)
    found = engine._products(torch.device("cpu"), getattr(torch, dtype), 8)
    # The one that the engine multiplies with is among them: no share passes 100 % for want of it.
    assert dispatch.choose(torch.device("cpu"), getattr(torch, dtype)).linear.__name__ in found
    assert ("torch.mm" in found) == (dtype != "int8")
    assert {tuple(call().shape) for call in found.values()} == {(8, 8)}
    assert all(call().isfinite().all() for call in found.values())

    # In seconds: of the products of 1024, then of those of 2048, eight times the arithmetic.
    taken = iter([4.0, 2.0, 32.0, 20.0])
    monkeypatch.setattr(engine, "_products", lambda *_: {"slow": None, "fast": None})
    monkeypatch.setattr(engine, "_fastest", lambda *_: next(taken))
    assert matrix_rate("cpu", dtype) == (2 * 1024**3 / 2.0, "fast")


def test_cells_leave_out_what_the_model_does_not_take() -> None:
    found = cells([16, 512], [1, "full", 2], bound=32, longest=256, mix=True)
    assert found == [Cell(16, 1), Cell(16, 2), Cell(0, 256)]


def test_a_mix_has_the_same_lengths_again_within_its_bounds() -> None:
    lengths = Cell(0, 256).lengths(512)
    assert np.array_equal(lengths, Cell(0, 256).lengths(512))
    assert 4 <= lengths.min() < 64 < lengths.max() <= 512


def test_pieces_are_whole_texts_within_the_bound() -> None:
    lengths = np.array([30, 30, 30, 100, 5], np.int32)
    found = [(rows.start, rows.stop, tokens.start, tokens.stop) for rows, tokens in pieces(lengths, 64)]
    # A text beyond the bound is alone.
    assert found == [(0, 2, 0, 60), (2, 3, 60, 90), (3, 4, 90, 190), (4, 5, 190, 195)]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelConfig]:
    found = {}
    for name, shape in shapes.SHAPES.items():
        folder = tmp_path_factory.mktemp("shapes") / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(shape.config))
        found[name] = read_config(folder)
    return found


@pytest.mark.parametrize(
    ("name", "length", "million_flops"),
    [
        # By hand: layers · (2 · weights of a layer + 4 · length · width of the queries, half of it where causal).
        ("bge-large", 32, 24 * (2 * 12 * 1024**2 + 4 * 32 * 1024) / 1e6),
        ("bge-m3", 8192, 24 * (2 * 12 * 1024**2 + 4 * 8192 * 1024) / 1e6),
        ("bge-base", 512, 12 * (2 * 12 * 768**2 + 4 * 512 * 768) / 1e6),
        ("jina-v2-base", 128, 12 * (2 * (4 * 768**2 + 3 * 768 * 3072) + 4 * 128 * 768) / 1e6),
        ("qwen3-0.6b", 512, 28 * (2 * (2 * 1024 * 3072 + 3 * 1024 * 3072) + 2 * 512 * 2048) / 1e6),
        ("minilm", 128, 6 * (2 * 12 * 384**2 + 4 * 128 * 384) / 1e6),
    ],
)
def test_arithmetic_of_a_token(name: str, length: int, million_flops: float, configs: dict[str, ModelConfig]) -> None:
    found = shapes.flops_per_token(configs[name], length)
    assert found is not None
    assert found / 1e6 == pytest.approx(million_flops)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("minilm", 22.6), ("bge-base", 108.9), ("bge-large", 334.0), ("bge-m3", 566.7), ("qwen3-0.6b", 595.7)],
)
def test_shapes_have_the_published_number_of_parameters(name: str, millions: float) -> None:
    assert shapes.parameters(shapes.SHAPES[name].config) / 1e6 == pytest.approx(millions, rel=0.01)


def test_a_shape_is_compared_with_sentence_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "minilm", tiny("minilm"))
    output = tmp_path / "out"
    what = ["--against", "sentence-transformers", "--kinds", "short", "one", "--rounds", "1", "--batch-sizes", "8"]
    assert run("--shape", "minilm", "--device", "cpu", "--max-batch-tokens", "256", *what, "-o", str(output)) == 0
    short, one = (json.loads(line) for line in output.read_text().splitlines())
    assert short["lowest_cosine"] == pytest.approx(1.0, abs=1e-4)
    assert set(short["tokens_per_second"]) == set(one["milliseconds"] | {"engine": 0}) - {
        "sentence-transformers, 1 a batch"
    } | {"sentence-transformers, 8 a batch"}


def test_library_that_takes_the_model_for_another_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without code from the hub it reads JinaBERT as BERT.
    monkeypatch.setitem(shapes.SHAPES, "jina-v2-base", tiny("jina-v2-base"))
    with pytest.raises(ConfigError, match="does not do the same work"):
        run("--shape", "jina-v2-base", "--device", "cpu", "--against", "sentence-transformers", "-o", "-")


def test_lengths_that_are_all_beyond_the_model_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SHAPES, "minilm", tiny("minilm"))
    with pytest.raises(ConfigError, match=r"--lengths: .* takes \d+ tokens, and all of them are longer"):
        run("--shape", "minilm", "--device", "cpu", "--lengths", "100000", "--max-batch-tokens", "64", "-o", "-")
