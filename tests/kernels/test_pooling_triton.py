"""Pooling in one pass, against its formula in float64: interpreted, and on a GPU."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.kernels.triton_calls import INTERPRETER, PLACES, interpreter

from embedserve.kernels import pooling
from embedserve.kernels.pooling import POOLINGS

Floats = npt.NDArray[np.float32]
Pooled = Callable[..., tuple[torch.Tensor, torch.Tensor]]

# More than 128 tokens, and rows that end at, before and behind the ends of chunks of 64.
LENGTHS = [[1], [5, 123], [1, 64, 65, 0, 130, 0, 63]]


def pool(
    device: str,
    states: Floats,
    dtype: torch.dtype,
    lengths: list[int],
    mode: str,
    dimensions: list[int] | None,
    normalize: bool,
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """What the process runs."""
    from embedserve.kernels.pooling_triton import pool_and_finish

    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    cut = None if dimensions is None else torch.tensor(dimensions, dtype=torch.int32, device=device)
    given = torch.from_numpy(states).to(device, dtype)
    vectors, finite = pool_and_finish(given, cu_seqlens, mode, cut, normalize=normalize)
    assert vectors.dtype == torch.float32
    return vectors.cpu().numpy(), finite.cpu().numpy()


@pytest.fixture(scope="module", params=PLACES)
def pooled(request: pytest.FixtureRequest) -> Iterator[Pooled]:
    """pool, in either place."""
    with interpreter() if request.param == INTERPRETER else nullcontext() as process:

        def run(
            states: torch.Tensor,
            lengths: list[int],
            mode: str,
            dimensions: list[int] | None = None,
            *,
            normalize: bool = True,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            given: tuple[Any, ...] = states.float().numpy(), states.dtype, lengths, mode, dimensions, normalize
            if process is None:
                vectors, finite = pool(request.param, *given)
            else:
                vectors, finite = process.submit(pool, "cpu", *given).result(100)
            return torch.from_numpy(vectors), torch.from_numpy(finite)

        yield run


def exact(
    states: torch.Tensor, lengths: list[int], mode: str, dimensions: list[int] | None, normalize: bool
) -> torch.Tensor:
    """The formula, row by row, in float64; zeros for an empty row."""
    reduce = {
        "cls": lambda row: row[0],
        "last": lambda row: row[-1],
        "mean": lambda row: row.mean(0),
        "max": lambda row: row.max(0).values,
    }[mode]
    vectors = torch.zeros(len(lengths), states.shape[1], dtype=torch.float64)
    for index, row in enumerate(torch.split(states.double(), lengths)):
        if len(row):
            end = None if dimensions is None else dimensions[index]
            vectors[index, :end] = reduce(row)[:end]
    return torch.nn.functional.normalize(vectors) if normalize else vectors


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_kernels_are_their_formula(pooled: Pooled, mode: str, lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = torch.randn(sum(lengths), 312).to(dtype)
    dimensions = [(7 * row) % 312 + 1 for row in range(len(lengths))]
    for cut, normalize in ((None, True), (dimensions, True), (dimensions, False)):
        vectors, finite = pooled(states, lengths, mode, cut, normalize=normalize)
        assert (vectors.double() - exact(states, lengths, mode, cut, normalize)).abs().max() < 1e-6
        assert finite.all()


@pytest.mark.parametrize("hidden", [1, 7, 384, 1024, 4096])
def test_states_may_have_any_width(pooled: Pooled, hidden: int) -> None:
    lengths = [130, 3]
    states = torch.randn(sum(lengths), hidden)
    vectors, _ = pooled(states, lengths, "mean")
    assert (vectors.double() - exact(states, lengths, "mean", None, True)).abs().max() < 1e-6


def test_a_thousand_rows_of_one_token(pooled: Pooled) -> None:
    states = torch.randn(1000, 8)
    assert torch.equal(pooled(states, [1] * 1000, "cls", normalize=False)[0], states)


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("lengths", [[1, 1, 1], [70, 1, 70]], ids=["one kernel", "two kernels"])
def test_only_rows_that_hold_something_not_finite_are_marked(
    pooled: Pooled, mode: str, bad: float, lengths: list[int]
) -> None:
    states = torch.ones(sum(lengths), 8)
    states[lengths[0], 5] = bad
    vectors, finite = pooled(states, lengths, mode)
    assert finite.tolist() == [True, False, True]
    assert vectors[::2].isfinite().all()
    # Beyond the cut it harms nobody.
    assert pooled(states, lengths, mode, [8, 5, 8])[1].all()


def test_what_cannot_be_read_is_refused(pooled: Pooled) -> None:
    with pytest.raises(ValueError, match="float64"):
        pooled(torch.ones(2, 3, dtype=torch.float64), [2], "mean")
    with pytest.raises(ValueError, match="weightedmean"):
        pooled(torch.ones(2, 3), [2], "weightedmean")


def test_the_reference_has_the_same_signature_and_takes_empty_rows() -> None:
    lengths = [0, 3, 0, 200, 0]
    states = torch.randn(sum(lengths), 16)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    cut = torch.tensor([16, 9, 16, 16, 1], dtype=torch.int32)
    for mode in POOLINGS:
        vectors, finite = pooling.pool_and_finish(states, offsets, mode, cut, normalize=True)
        assert (vectors.double() - exact(states, lengths, mode, cut.tolist(), True)).abs().max() < 1e-6
        assert finite.all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", POOLINGS)
def test_after_a_small_and_a_large_batch_nothing_is_compiled_any_more(mode: str) -> None:
    from embedserve.kernels.pooling_triton import _chunks, _finish, pool_and_finish

    def run(lengths: list[int]) -> int:
        """Programs that there are after the batch, whose offsets lie somewhere in a staging buffer."""
        offsets = torch.tensor([0, 0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")[1:]
        states = torch.randn(sum(lengths), 384, device="cuda", dtype=torch.float16)
        pool_and_finish(states, offsets, mode, None, normalize=True)
        return sum(len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in (_chunks, _finish))

    run([16])
    compiled = run([200])
    assert [run(lengths) for lengths in ([1], [3, 5], [17] * 16, [2] * 100, [700, 33])] == [compiled] * 5


@pytest.mark.parametrize("capability", [80, 90], ids=["Ampere", "Hopper"])
def test_the_compiler_makes_programs_that_read_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int
) -> None:
    triton = pytest.importorskip("triton", reason="Triton is published for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from embedserve.kernels import pooling_triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"HIDDEN": 768, "WIDTH": 1024, "PARTS": 16}
    finish = {"CUT": True, "NORMALIZE": True}
    for name, source, constants in (
        ("_chunks", "fp16", {"CHUNK": 64, "MAXIMUM": False}),
        ("_chunks", "bf16", {"CHUNK": 64, "MAXIMUM": True}),
        ("_finish", "fp32", {"CHUNK": 64, "MODE": "mean", **finish}),
        ("_finish", "fp16", {"CHUNK": 1, "MODE": "max", **finish}),
        ("_finish", "fp16", {"CHUNK": 1, "MODE": "cls", "PARTS": 1, **finish}),
        ("_finish", "bf16", {"CHUNK": 1, "MODE": "last", "PARTS": 1, **finish}),
    ):
        kernel = getattr(pooling_triton, name)
        types = {"states": f"*{source}", "source": f"*{source}", "sums": "*fp32", "vectors": "*fp32", "finite": "*i8"}
        types |= {"cu_seqlens": "*i32", "dimensions": "*i32"} | dict.fromkeys({**sizes, **constants}, "constexpr")
        signature = {argument: types.get(argument, "i32") for argument in kernel.arg_names}
        # As a launch finds them: these are multiples of 16.
        sixteenth = ("states", "source", "sums", "vectors", "token", "stride")
        attributes = {(index,): [["tt.divisibility", 16]] for index, one in enumerate(signature) if one in sixteenth}
        program = triton.compile(
            ASTSource(kernel, signature, {**sizes, **constants}, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": 8 if {**sizes, **constants}["PARTS"] > 1 else 4},
        )
        assert "ld.global.v4.b32" in program.asm["ptx"], (name, constants)
