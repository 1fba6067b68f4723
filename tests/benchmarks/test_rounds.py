"""How the time of a comparison is shared, on a clock that moves when the party works."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from embedserve.benchmarks import rounds
from embedserve.benchmarks.load import Round, Sample
from embedserve.benchmarks.parties import Party, Scenario, Texts
from embedserve.benchmarks.progress import Progress
from embedserve.benchmarks.texts import common_words


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Steady(Party):
    """Takes a scenario's pause as the seconds of a round."""

    name = "steady"
    facts: dict[str, object] = {}  # noqa: RUF012

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def vectors(self, texts: list[str], within: float) -> np.ndarray:
        return np.ones((len(texts), 2), np.float32)

    def prepare(self, scenario: Scenario, texts: Texts, within: float) -> None:
        pass

    def run(self, scenario: Scenario, texts: Texts, within: float) -> Round:
        self._clock.now += scenario.pause
        return Round([Sample(0.0, 0.0, scenario.pause, 200, 1, 5)], scenario.pause, 0.0)


@pytest.mark.parametrize(
    ("limit", "slow", "quick"),
    [
        (1000, 5, 5),
        # Half of it is 50 seconds, in which there are two rounds of 20; quick ones leave enough for a third.
        (100, 3, 5),
        # There is none to be left: two of 20, and the quick ones have the rest.
        (50, 2, 2),
    ],
)
def test_slow_rounds_are_three_where_the_others_leave_the_time(
    limit: float, slow: int, quick: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(rounds, "time", clock)
    costs_nothing = {"texts_per_second": 1, "p50_ms": 1.0, "cpu_us_a_request": 1.0}
    monkeypatch.setattr(rounds.Run, "_client_limit", lambda *_: costs_nothing)
    output = tmp_path / "out"
    options = argparse.Namespace(rounds=5, limit=limit, output=output, encoding_format="base64")
    todo = [Scenario(name, "one", 1, 1, requests=1, pause=each) for name, each in (("slow", 20.0), ("quick", 5.0))]
    with Progress(0) as progress:
        run = rounds.Run(options, common_words(), {}, progress)
        run.measure([Steady(clock)], todo)
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert {line["scenario"]: line["rounds"] for line in lines} == {"slow": slow, "quick": quick}
    assert clock.now <= limit
