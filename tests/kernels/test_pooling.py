"""Token states to one vector a text."""

import itertools

import pytest
import torch

from embedserve.kernels.pooling import POOLINGS, finish, pool

LENGTHS = [1, 5, 123, 2, 400]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pooling_is_its_formula(mode: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    states = torch.randn(sum(LENGTHS), 37).to(dtype)
    rows = torch.split(states.double(), LENGTHS)
    reduce = {
        "cls": lambda row: row[0],
        "last": lambda row: row[-1],
        "mean": lambda row: row.mean(0),
        "max": lambda row: row.max(0).values,
    }[mode]
    found = pool(states, offsets(LENGTHS), mode)
    assert found.dtype == torch.float32
    assert (found.double() - torch.stack([reduce(row) for row in rows])).abs().max() < 1e-6


def test_an_unknown_pooling_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="weightedmean"):
        pool(torch.ones(2, 3), offsets([2]), "weightedmean")


def test_each_row_is_cut_to_its_own_dimension_and_has_unit_length_again() -> None:
    torch.manual_seed(0)
    pooled = torch.randn(4, 50)
    dimensions = [1, 7, 49, 50]
    vectors, finite = finish(pooled, torch.tensor(dimensions, dtype=torch.int32), normalize=True)
    for row, (vector, dimension) in enumerate(zip(vectors, dimensions, strict=True)):
        expected = torch.nn.functional.normalize(pooled[row, :dimension].double(), dim=0)
        assert (vector[:dimension].double() - expected).abs().max() < 1e-6
        assert not vector[dimension:].any()
    assert finite.all()


def test_without_normalisation_a_cut_only_cuts() -> None:
    pooled = torch.tensor([[3.0, 4.0, 5.0]])
    assert finish(pooled, torch.tensor([2], dtype=torch.int32), normalize=False)[0].tolist() == [[3.0, 4.0, 0.0]]
    assert finish(pooled, None, normalize=False)[0].tolist() == [[3.0, 4.0, 5.0]]


def test_a_zero_vector_stays_zero() -> None:
    vectors, finite = finish(torch.zeros(1, 3), None, normalize=True)
    assert vectors.tolist() == [[0.0, 0.0, 0.0]]
    assert finite.all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("normalize", [True, False])
def test_only_rows_that_hold_something_not_finite_are_marked(bad: float, normalize: bool) -> None:
    pooled = torch.ones(3, 4)
    pooled[1, 2] = bad
    vectors, finite = finish(pooled, None, normalize=normalize)
    assert finite.tolist() == [True, False, True]
    assert vectors[0].isfinite().all()


def test_a_bad_component_beyond_the_cut_harms_nobody() -> None:
    pooled = torch.ones(1, 4)
    pooled[0, 3] = float("nan")
    vectors, finite = finish(pooled, torch.tensor([3], dtype=torch.int32), normalize=True)
    assert finite.tolist() == [True]
    assert vectors.isfinite().all()
