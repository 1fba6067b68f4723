"""CUDA graphs of small batches: which bucket a batch goes to, and that a bucket changes none of its states."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.catalog import locate
from embedserve.server.graphs import BUCKETS, Bucket, bucket_for
from embedserve.server.runner import Runner

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def folder() -> Path:
    return locate("all-MiniLM-L6-v2", None)


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return Runner.load(folder, device="cpu", threads=1)


@pytest.mark.parametrize(
    ("tokens", "rows", "bucket"),
    [
        (1, 1, Bucket(16, 2)),
        (16, 2, Bucket(16, 2)),
        # The second row would be that of the padding.
        (15, 2, Bucket(32, 4)),
        (17, 1, Bucket(32, 2)),
        (17, 2, Bucket(32, 4)),
        (128, 1, Bucket(128, 2)),
        # Texts so short that a larger bucket has to give the rows.
        (16, 12, Bucket(128, 16)),
        (512, 64, Bucket(512, 64)),
        (511, 64, None),
        (513, 1, None),
    ],
)
def test_a_batch_goes_to_the_first_bucket_that_has_room(tokens: int, rows: int, bucket: Bucket | None) -> None:
    assert bucket_for(BUCKETS, tokens, rows) == bucket


def test_buckets_grow_by_at_most_a_factor_of_two() -> None:
    for smaller, larger in pairwise(BUCKETS):
        assert smaller.tokens <= larger.tokens <= 2 * smaller.tokens
        assert smaller.tokens < larger.tokens or smaller.rows < larger.rows
    assert bucket_for({}, 1, 1) is None


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30))
@example([16])
@example([1] * 15)
@example([4, 4, 4, 4])
def test_a_bucket_changes_no_states(runner: Runner, lengths: list[int]) -> None:
    ids = np.random.default_rng(0).integers(1000, 20_000, sum(lengths), dtype=np.int32)
    rows = PackedRows.pack(ids, np.array(lengths, np.int32))
    bucket = bucket_for(BUCKETS, len(ids), len(lengths))
    if bucket is None:
        return
    own, filled = states_of(runner, rows), states_of(runner, rows.in_bucket(bucket.tokens, bucket.rows))
    assert filled.shape == (bucket.tokens, 384)
    assert (filled[: len(ids)] - own).abs().max() < 1e-4


@torch.inference_mode()
def states_of(runner: Runner, rows: PackedRows) -> Tensor:
    return runner._backend.hidden_states(PackedBatch.on_cpu(rows))


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=gpu) for dtype in ("float16", "bfloat16")])
def test_all_buckets_are_captured_and_change_no_vectors(folder: Path, runner: Runner, dtype: str) -> None:
    on_gpu, said = Runner.load(folder, device="cuda", dtype=dtype), list[str]()
    on_gpu.warm_up(said.append, max_batch_tokens=1024)
    assert tuple(on_gpu._graphs) == BUCKETS, said
    chance = np.random.default_rng(1)
    # Buckets by turns, so that each finds the others' remains in the memory that they share.
    for tokens in (1, 500, 16, 40, 512, 200, 33, 128, 15, 300):
        lengths = np.diff([0, *sorted({*chance.integers(1, tokens + 1, 3).tolist(), tokens})]).astype(np.int32)
        ids, full = chance.integers(0, 30_000, tokens, dtype=np.int32), np.full(len(lengths), 384, np.int32)
        found = on_gpu.run(ids, lengths, full)
        bucket = bucket_for(BUCKETS, tokens, len(lengths))
        assert bucket is not None
        assert found.computed_tokens == bucket.tokens
        captured, on_gpu._graphs = on_gpu._graphs, {}
        eager = on_gpu.run(ids, lengths, full)
        on_gpu._graphs = captured
        assert eager.computed_tokens == tokens
        assert (found.dense * eager.dense).sum(1).min() > 0.9999
        assert (found.dense * runner.run(ids, lengths, full).dense).sum(1).min() > 0.999
