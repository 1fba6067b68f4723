"""bge-m3's sparse and multi-vector outputs, against their formulas in float64 and by hand."""

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch

from embedserve.kernels.attention import Layout
from embedserve.kernels.heads import Head, colbert_vectors, sparse_rows, sparse_weights

LENGTHS = [1, 2, 7, 40]
WIDTH = 24
DROPPED = (0, 1, 2, 3)  # <s>, padding, </s>, <unk>


def layout(lengths: list[int]) -> Layout:
    sizes = torch.tensor(lengths)
    return Layout(
        cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        rows=torch.repeat_interleave(torch.arange(len(lengths)), sizes).int(),
        positions=torch.cat([torch.arange(length) for length in lengths]).int(),
        max_seqlen=max(lengths),
        runs=(),
    )


def head(out: int, dtype: torch.dtype = torch.float32) -> Head:
    torch.manual_seed(out)
    return Head((torch.randn(out, WIDTH) / WIDTH**0.5).to(dtype), torch.randn(out).to(dtype) * 0.1)


def states(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(sum(LENGTHS), WIDTH).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sparse_weights_are_their_formula(dtype: torch.dtype) -> None:
    linear, hidden = head(1, dtype), states(dtype)
    expected = (hidden.double() @ linear.weight.double()[0] + linear.bias.double()[0]).clamp_min(0)
    weights, finite = sparse_weights(hidden, linear, layout(LENGTHS))
    assert weights.dtype == torch.float32
    assert (weights.double() - expected).abs().max() < 1e-6
    assert (expected == 0).any()
    assert finite.all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_colbert_vectors_are_their_formula(dtype: torch.dtype, tolerance: float) -> None:
    linear, hidden = head(5, dtype), states(dtype)
    expected = []
    for row in torch.split(hidden.double(), LENGTHS):
        projected = row[1:] @ linear.weight.double().T + linear.bias.double()
        expected.append(projected / projected.norm(dim=1, keepdim=True))
    vectors, finite = colbert_vectors(hidden, linear, layout(LENGTHS))
    assert vectors.dtype == torch.float32
    assert vectors.shape == (sum(LENGTHS) - len(LENGTHS), 5)
    assert (vectors.double() - torch.cat(expected)).abs().max() < tolerance
    assert (vectors.norm(dim=1) - 1).abs().max() < 1e-6
    assert finite.all()


def ids(*values: int) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def weights(*values: float) -> npt.NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


def readable(
    rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
) -> list[dict[int, float]]:
    return [dict(zip(indices.tolist(), values.tolist(), strict=True)) for indices, values in rows]


def test_a_repeated_token_has_its_largest_weight() -> None:
    rows = sparse_rows(ids(0, 9, 5, 9, 9, 2), weights(0, 0.25, 0.5, 0.75, 0.125, 0), ids(0, 6), DROPPED)
    assert readable(rows) == [{5: 0.5, 9: 0.75}]


def test_special_tokens_and_weights_of_zero_are_left_out() -> None:
    rows = sparse_rows(ids(0, 3, 7, 8, 1, 2), weights(9, 9, 0, 0.5, 9, 9), ids(0, 6), DROPPED)
    assert readable(rows) == [{8: 0.5}]


def test_rows_do_not_see_each_other_and_may_be_empty() -> None:
    rows = sparse_rows(ids(0, 0, 2, 7, 6, 7), weights(1, 1, 1, 0.5, 0, 0.25), ids(0, 1, 3, 4, 6), DROPPED)
    assert readable(rows) == [{}, {}, {7: 0.5}, {7: 0.25}]
    assert readable(sparse_rows(ids(0), weights(1), ids(0, 1), DROPPED)) == [{}]


def test_indices_ascend_and_keep_their_types() -> None:
    ((indices, values),) = sparse_rows(ids(90, 5, 70, 5), weights(1, 2, 3, 4), ids(0, 4), DROPPED)
    assert indices.tolist() == [5, 70, 90]
    assert values.tolist() == [4, 3, 1]
    assert (indices.dtype, values.dtype) == (np.int32, np.float32)


def test_many_random_rows_are_as_the_loop_of_the_definition_has_them() -> None:
    chance = np.random.default_rng(0)
    lengths = chance.integers(1, 30, 50)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    tokens = chance.integers(0, 20, offsets[-1], dtype=np.int32)
    scores = np.maximum(chance.standard_normal(offsets[-1], dtype=np.float32), 0)
    expected: list[dict[int, float]] = []
    for start, end in itertools.pairwise(offsets.tolist()):
        best: dict[int, float] = {}
        for token, score in zip(tokens[start:end].tolist(), scores[start:end].tolist(), strict=True):
            if token not in DROPPED and score > 0:
                best[token] = max(score, best.get(token, 0.0))
        expected.append(dict(sorted(best.items())))
    assert readable(sparse_rows(tokens, scores, offsets, DROPPED)) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_only_the_row_that_holds_something_not_finite_is_marked(bad: float) -> None:
    hidden = states()
    hidden[LENGTHS[0] + LENGTHS[1] + 3, 0] = bad
    for _, finite in (
        sparse_weights(hidden, head(1), layout(LENGTHS)),
        colbert_vectors(hidden, head(5), layout(LENGTHS)),
    ):
        assert finite.tolist() == [True, True, False, True]


def test_a_text_of_one_token_has_no_vectors() -> None:
    vectors, finite = colbert_vectors(torch.ones(1, WIDTH), head(5), layout([1]))
    assert vectors.shape == (0, 5)
    assert finite.tolist() == [True]


def test_a_zero_vector_stays_zero() -> None:
    linear = Head(torch.zeros(5, WIDTH), torch.zeros(5))
    assert not colbert_vectors(torch.ones(2, WIDTH), linear, layout([2]))[0].any()


# How the outputs are compared, as the model was trained; a client does this, not the server.


def lexical_score(query: dict[int, float], document: dict[int, float]) -> float:
    """The sum over shared token ids of the product of their weights."""
    return sum(weight * document.get(token, 0.0) for token, weight in query.items())


def colbert_score(query: torch.Tensor, document: torch.Tensor) -> float:
    """The mean over the query's vectors of the best dot product with one of the document's."""
    return float((query @ document.T).max(dim=1).values.mean())


def test_scores_of_a_pair() -> None:
    query, document = readable(sparse_rows(ids(5, 6, 6, 7), weights(0.5, 0.5, 1, 2), ids(0, 2, 4), DROPPED))
    assert lexical_score(query, document) == 0.5 * 1.0
    assert lexical_score(query, {8: 3.0}) == 0.0

    identity = Head(torch.eye(WIDTH), torch.zeros(WIDTH))
    vectors, _ = colbert_vectors(states(), identity, layout(LENGTHS))
    first, second, third, fourth = torch.split(vectors, [length - 1 for length in LENGTHS])
    assert len(first) == 0
    assert colbert_score(third, third) == pytest.approx(1.0)
    assert colbert_score(second, fourth) == pytest.approx(float((fourth @ second[0]).max()))
