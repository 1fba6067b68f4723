"""How many tokens a batch may have: what decides, and that a measurement finds it. Clock and memory are the tests'."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedserve.models.batch import Ints
from embedserve.server import bounds
from embedserve.server.bounds import Sample, Texts, choose, measure

CPU = torch.device("cpu")


def samples(seconds: list[float], *, bytes_a_token: int = 0, constant: int = 0) -> dict[int, Sample]:
    """Of batches of 256, 512, … tokens, that take so long and so many bytes."""
    sizes = [256 << step for step in range(len(seconds))]
    return {
        size: Sample(size, took, constant + bytes_a_token * size) for size, took in zip(sizes, seconds, strict=True)
    }


@pytest.mark.parametrize(
    ("seconds", "tokens", "reason"),
    [
        # A cost for each token and nothing else: the smallest has the best rate.
        ([0.001, 0.002, 0.004, 0.008], 256, "do not raise the rate"),
        # A cost for each batch, too: the best rate comes late, 3 % less before.
        ([0.0020, 0.0030, 0.0050, 0.0099], 1024, "do not raise the rate"),
        # The rate still grows where a batch begins to take too long.
        ([0.010, 0.015, 0.019, 0.023], 1024, "run for more than 20 ms"),
        ([0.010, 0.012, 0.015], 1024, "run for more than 20 ms"),
        # Even the smallest takes too long.
        ([0.5], 256, "run for more than 20 ms"),
        # Nothing stopped it but the end of the table.
        ([0.0010, 0.0011, 0.0012], 1024, "were not tried"),
    ],
)
def test_the_least_of_time_and_rate_decides(seconds: list[float], tokens: int, reason: str) -> None:
    bound = choose(samples(seconds), longest_s=0.020, memory=None)
    assert bound.tokens == tokens
    assert reason in bound.reason


def test_memory_decides_where_it_is_least() -> None:
    # 1 MiB and 1 KiB a token: of 2 MiB, 1024 tokens take all.
    taken = samples([0.0010, 0.0011, 0.0012, 0.0013], bytes_a_token=1 << 10, constant=1 << 20)
    bound = choose(taken, longest_s=0.020, memory=2 << 20)
    assert (bound.tokens, bound.reason) == (1024, "larger ones do not fit into the device's memory")
    bound = choose(taken, longest_s=0.020, memory=4 << 20)
    assert (bound.tokens, bound.reason) == (2048, "twice as many do not fit into the device's memory")
    assert "were not tried" in choose(taken, longest_s=0.020, memory=8 << 20).reason
    # One batch is enough to know.
    bound = choose(samples([0.0010], bytes_a_token=1 << 10), longest_s=0.020, memory=300 << 10)
    assert (bound.tokens, bound.reason) == (256, "twice as many do not fit into the device's memory")


@given(st.integers(1, 1 << 14), st.integers(1, 512), st.sampled_from(["packed", "padded"]))
def test_the_texts_of_the_measurement_are_within_the_bound(bound: int, max_tokens: int, cost: str) -> None:
    ids, lengths = Texts(cost, max_tokens, 100).within(bound)  # type: ignore[arg-type]
    assert max(1, bound - 128) <= len(ids) == lengths.sum() <= bound
    assert 1 <= lengths.min() <= lengths.max() <= max_tokens
    assert 0 <= ids.min() <= ids.max() < 100


def test_rows_that_are_padded_are_measured_with_rows_of_one_length() -> None:
    _, lengths = Texts("padded", 512, 100).within(4096)
    assert set(lengths[:-1].tolist()) == {128}


def test_what_takes_far_too_long_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sizes = [0.0], []

    def embed(ids: Ints, lengths: Ints) -> None:
        sizes.append(len(ids))
        clock[0] += 2.0

    monkeypatch.setattr(bounds.time, "perf_counter", lambda: clock[0])
    assert measure(embed, Texts("packed", 256, 100), CPU).tokens == bounds.SMALLEST
    assert len(sizes) == 3


def test_a_measurement_stops_where_batches_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, sizes = [0.0], []

    def embed(ids: Ints, lengths: Ints) -> None:
        sizes.append(len(ids))
        clock[0] += 0.004 + len(ids) * 20e-6

    monkeypatch.setattr(bounds.time, "perf_counter", lambda: clock[0])
    bound = measure(embed, Texts("packed", 256, 100), CPU)
    # 4096 tokens would take 86 ms, 8192 too long: the rate has grown up to there, by less than 3 % from 2048 on.
    assert (bound.tokens, bound.reason) == (4096, "larger ones run for more than 100 ms")
    assert max(sizes) <= 4096
    assert bound.rate == pytest.approx(np.max(sizes) / (0.004 + np.max(sizes) * 20e-6))
