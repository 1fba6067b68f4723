"""bfloat16 and int8 on the CPU: opt-in, told with what they cost, refused where the hardware has them not."""

from pathlib import Path

import numpy as np
import pytest
import torch

from embedserve.kernels import int8
from embedserve.models.catalog import locate
from embedserve.server import device, precision
from embedserve.server.runner import DeviceError, Runner

LOWEST_COSINE = {"int8": 0.99, "bfloat16": 0.999}


@pytest.fixture(scope="module")
def folder() -> Path:
    return locate("all-MiniLM-L6-v2", None)


@pytest.fixture(scope="module")
def exact(folder: Path) -> Runner:
    return Runner.load(folder, device="cpu", threads=2)


@pytest.fixture(scope="module", params=["int8", "bfloat16"])
def reduced(request: pytest.FixtureRequest, folder: Path) -> tuple[Runner, list[str]]:
    lines: list[str] = []
    try:
        runner = Runner.load(folder, device="cpu", dtype=request.param, threads=2, progress=lines.append)
    except DeviceError as error:
        pytest.skip(str(error))
    return runner, lines


def texts(*lengths: int) -> list[np.ndarray]:
    chance = np.random.default_rng(5)
    return [chance.integers(1000, 30_000, length, dtype=np.int32) for length in lengths]


def embed(runner: Runner, batch: list[np.ndarray]) -> np.ndarray:
    lengths = np.array([len(text) for text in batch], np.int32)
    return runner.run(np.concatenate(batch), lengths, np.full(len(batch), 384, np.int32)).dense


def test_vectors_are_near_those_of_float32(reduced: tuple[Runner, list[str]], exact: Runner) -> None:
    runner, _ = reduced
    batch = texts(1, 3, 16, 16, 17, 90, 200, 256)
    cosines = (embed(runner, batch) * embed(exact, batch)).sum(axis=1)
    assert cosines.min() >= LOWEST_COSINE[runner.info.dtype]


def test_a_text_does_not_depend_on_its_neighbours(reduced: tuple[Runner, list[str]]) -> None:
    runner, _ = reduced
    batch = texts(5, 16, 16, 40, 120)
    together = embed(runner, batch)
    alone = np.concatenate([embed(runner, [text]) for text in batch])
    # What remains is the order of sums between products, and now and then a level that it moves an element to.
    assert (together * alone).sum(axis=1).min() >= 0.9995


def test_what_it_costs_and_gains_is_told_when_it_is_loaded(reduced: tuple[Runner, list[str]]) -> None:
    runner, lines = reduced
    told = [line for line in lines if line.startswith(f"{runner.info.dtype}: cosine to float32 0.99")]
    assert len(told) == 1
    assert told[0].endswith("times its rate")


def test_the_line_has_the_lowest_cosine_the_median_and_the_ratio() -> None:
    one = precision.Probe(np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32), seconds=2.0)
    other = precision.Probe(np.array([[1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32), seconds=1.0)
    said = "int8: cosine to float32 0.8000 at the lowest, 1.0000 in the middle of 3 texts of random tokens; 2.0 times"
    assert precision.compare("int8", other, one).startswith(said)


def test_a_cpu_without_the_arithmetic_refuses_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_vnni_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    with pytest.raises(DeviceError, match="int8 on the CPU: the CPU has no VNNI"):
        Runner.load(folder, device="cpu", dtype="int8")
    with pytest.raises(DeviceError, match=r"bfloat16 on the CPU: .* has no arithmetic for it"):
        Runner.load(folder, device="cpu", dtype="bfloat16")


def test_other_backends_have_no_int8(folder: Path) -> None:
    if (reason := int8.why_not()) is not None:
        pytest.skip(reason)
    with pytest.raises(DeviceError, match="the transformers backend has but float32 there"):
        Runner.load(folder, device="cpu", dtype="int8", backend="transformers")


def test_a_gpu_has_no_int8(exact: Runner) -> None:
    config = exact._config
    with pytest.raises(DeviceError, match="int8 is for the CPU"):
        device.pick_dtype("int8", torch.device("cuda", 0), config, print)
