"""The kernel table, on the CPU and small: that each operation runs, and that the limits are counted right."""

import json
import sys
from pathlib import Path

import pytest
import torch

from embedserve.benchmarks import kernels
from embedserve.benchmarks.engine import Rate
from embedserve.benchmarks.kernels import Sizes, cases, rows_of


def test_a_run_ends_in_a_line_for_each_operation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kernels.jsonl"
    options = ["--device", "cpu", "--dtypes", "float32", "--shapes", "minilm", "--tokens", "16"]
    monkeypatch.setattr(sys, "argv", ["kernels", *options, "--seconds", "0", "--output", str(file)])
    monkeypatch.setattr(kernels, "copy_rate", lambda *_, **__: 1e10)
    monkeypatch.setattr(kernels, "matrix_rate", lambda *_, **__: Rate(1e9, "torch.mm"))
    assert kernels.main() == 0
    lines = {line["operation"]: line for line in map(json.loads, file.read_text().splitlines())}
    assert set(lines) == {
        "attention", "pool mean", "embed", "layer_norm", "add_layer_norm", "bias gelu", "linear gelu", "linear qkv"
    }  # fmt: skip
    qkv = lines["linear qkv"]
    assert qkv["flops"] == 2 * 16 * 384 * 3 * 384
    assert qkv["bound"] == "arithmetic"
    assert qkv["share"]["torch"] == pytest.approx(qkv["limit_us"] / qkv["us"]["torch"]["median"], rel=1e-2, abs=1e-4)
    norm = lines["add_layer_norm"]
    assert (norm["bytes"], norm["bound"]) == (3 * 16 * 384 * 4, "memory")
    assert all(value < 1e-5 for line in lines.values() for value in line["difference"].values())
    assert "add_layer_norm" in capsys.readouterr().out


@pytest.mark.parametrize("shape", ["jina-v2-base", "qwen3-0.6b"])
def test_every_case_of_a_family_runs(shape: str) -> None:
    with torch.inference_mode():
        for case in cases(Sizes.of(shape), 16, torch.device("cpu"), torch.float32):
            assert next(iter(case.runs)) == "torch"
            assert case.bytes > 0
            for run in case.runs.values():
                run()


def test_batches_of_equal_rows_and_of_one_long_row_among_short_ones() -> None:
    assert list(rows_of(16, 512)) == [("1 x 16", [16])]
    made = dict(rows_of(16384, 8192))
    assert list(made) == ["1024 x 16", "128 x 128", "32 x 512", "2 x 8192", "8192, 4096 x 2"]
    assert {sum(lengths) for lengths in made.values()} == {16384}


def test_an_implementation_that_fails_is_named_and_the_others_are_measured() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    case = kernels.Case("norm", "", {"torch": lambda: torch.ones(2), "triton": broken}, 8)
    times, failed = kernels.measure(case, torch.device("cpu"), 0)
    assert failed == {"triton": "no such kernel"}
    assert set(times) == {"torch"}


def test_tensors_that_calls_write_to_are_restored() -> None:
    x = torch.ones(3)
    case = kernels.Case("add", "", {"torch": lambda: x.add_(1), "triton": lambda: x.add_(1)}, 8, written=(x,))
    kernels.measure(case, torch.device("cpu"), 0)
    assert x.tolist() == [1, 1, 1]
    assert kernels.differences(case, {"torch", "triton"}) == {"triton": 0.0}
