"""Teams of threads: which threads and cores they have, and that it makes no difference to the vectors."""

import os
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedserve.models.catalog import locate
from embedserve.models.config import ModelConfig, read_config
from embedserve.server.runner import Runner
from embedserve.server.schedule import InTurn, SideBySide
from embedserve.server.teams import Layout, Measured, Team, best, layouts, make_teams, start
from embedserve.server.threads import available_cores

two_cores = pytest.mark.skipif(len(available_cores()) < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return read_config(locate("all-MiniLM-L6-v2", None))


def load(config: ModelConfig, threads: int) -> tuple[Team, Runner]:
    wide = Team("wide")
    return wide, wide.call(
        lambda: Runner.load(config.folder, config=config, device="cpu", threads=threads, pin=True)
    ).result()


def test_a_team_does_one_thing_after_another_in_a_thread_of_its_own() -> None:
    team = Team("one")
    gate, seen = threading.Event(), list[int]()
    first = team.call(gate.wait)
    for number in range(5):
        team.submit(lambda number=number: seen.append(number))  # type: ignore[misc]
    assert seen == []
    gate.set()
    assert first.result(10)
    assert team.call(lambda: threading.current_thread().name).result(10) == "one"
    assert seen == [0, 1, 2, 3, 4]
    with pytest.raises(ZeroDivisionError):
        team.call(lambda: 1 // 0).result(10)
    team.close()


def test_cores_are_shared_out_evenly() -> None:
    assert [str(layout) for layout in layouts(2)] == ["2 teams of 1 thread"]
    assert layouts(16) == [Layout(2, 8), Layout(4, 4), Layout(8, 2), Layout(16, 1)]
    assert layouts(6) == [Layout(2, 3), Layout(6, 1)]
    assert layouts(7) == [Layout(7, 1)]


def test_the_fewest_teams_that_are_about_as_fast_are_taken() -> None:
    def found(**rates: float) -> dict[Layout, dict[str, Measured]]:
        ways = {"one": Layout(1, 8), "two": Layout(2, 4), "eight": Layout(8, 1)}
        return {ways[name]: {"m": Measured(rate, 256)} for name, rate in rates.items()}

    assert best(found(one=100, two=120, eight=122)) == Layout(2, 4)
    assert best(found(one=100, two=120, eight=130)) == Layout(8, 1)
    assert best(found(one=100, two=102)) == Layout(1, 8)
    assert best(found(one=100)) == Layout(1, 8)


@two_cores
def test_narrow_teams_have_one_thread_each_and_the_wide_one_keeps_its_own(config: ModelConfig) -> None:
    cores = available_cores()[:2]
    wide, runner = load(config, 2)
    narrow = start(Layout(2, 1), cores, pinned=True)
    generator = np.random.default_rng(0)
    lengths = generator.integers(2, 120, 24, dtype=np.int32)
    ids = generator.integers(1000, 20_000, int(lengths.sum()), dtype=np.int32)
    dimensions = np.full(24, 384, np.int32)

    def run() -> tuple[int, set[int], npt.NDArray[np.float32]]:
        dense = runner.run(ids, lengths, dimensions).dense
        return torch.get_num_threads(), os.sched_getaffinity(0), dense

    # All at once, as they would run: whoever sets a number of threads sets it for itself alone.
    ran = [future.result(60) for future in [team.call(run) for team in (*narrow, wide, *narrow)]]
    assert [threads for threads, _, _ in ran] == [1, 1, 2, 1, 1]
    assert [ran[0][1], ran[1][1]] == [{cores[0]}, {cores[1]}]
    for _, _, dense in ran:
        np.testing.assert_allclose(dense, ran[2][2], atol=1e-6)
    for team in (*narrow, wide):
        team.close()
    assert available_cores()[:2] == cores, "the caller stays where it was"


@two_cores
def test_an_engine_on_a_cpu_has_teams_by_what_was_measured(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide, runner = load(config, 2)
    said: list[str] = []

    def teams(*rates: float) -> SideBySide | InTurn:
        left = list(rates)
        monkeypatch.setattr("embedserve.server.teams._Probe.is_quick", lambda *_: len(left) > 0)
        monkeypatch.setattr("embedserve.server.teams._Probe.measure", lambda *_: Measured(left.pop(0), 512))
        made = make_teams(
            {"m": runner},
            wide,
            models={"m": config},
            cores=available_cores(),
            max_batch_tokens=None,
            progress=said.append,
        )
        assert len(made.members) == (3 if isinstance(made.schedule, SideBySide) else 1)
        assert made.members[-1] is wide
        for team in made.members[:-1]:
            team.close()
        assert isinstance(made.schedule, SideBySide | InTurn)
        return made.schedule

    schedule = teams(10_000.0, 12_500.0)
    assert isinstance(schedule, SideBySide)
    assert schedule.paces["m"] == (10_000.0, 1.6), "a narrow team has half of 12,500"
    assert said == ["1 team of 2 threads: m 10,000 tokens/s", "2 teams of 1 thread (chosen): m 12,500 tokens/s"]
    assert teams(10_000.0, 10_100.0) == InTurn(1)
    assert teams(10_000.0) == InTurn(1), "a batch of one core would take too long"
    wide.close()


@two_cores
def test_a_bound_of_few_tokens_is_measured_as_any_other(config: ModelConfig) -> None:
    wide, runner = load(config, 2)
    said: list[str] = []
    made = make_teams(
        {"m": runner}, wide, models={"m": config}, cores=available_cores(), max_batch_tokens=16, progress=said.append
    )
    assert "1 team of 2 threads" in said[0]
    made.close()


@pytest.mark.parametrize("backend", ["onnx", "transformers"])
def test_what_others_have_written_runs_on_one_team(backend: str) -> None:
    info = SimpleNamespace(backend=backend, device="cpu", threads=8, max_batch_tokens=512, concurrency=1)
    runner: Any = SimpleNamespace(info=info)
    wide = Team("wide")
    made = make_teams({"m": runner}, wide, models={}, cores=range(8), max_batch_tokens=None, progress=print)
    assert (made.schedule, made.members) == (InTurn(1), [wide])
    made.close()


def test_one_thread_is_one_team(config: ModelConfig) -> None:
    wide, runner = load(config, 1)
    made = make_teams(
        {"m": runner}, wide, models={"m": config}, cores=available_cores(), max_batch_tokens=64, progress=print
    )
    assert made.schedule == InTurn(1)
    assert made.members == [wide]
    made.close()
