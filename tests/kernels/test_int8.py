"""The 8-bit linear: near the float32 one, and each token on its own."""

import pytest
import torch
import torch.nn.functional as F

from embedserve.kernels import int8
from embedserve.kernels.int8 import Int8Linear

pytestmark = pytest.mark.skipif(int8.why_not() is not None, reason=str(int8.why_not()))


def case(tokens: int, inner: int, out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x with outliers on one side, as the states of real models have; weight; bias."""
    chance = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=chance)
    x[:, 3] -= 8.0
    return x, torch.randn(out, inner, generator=chance) * 0.05, torch.randn(out, generator=chance)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize(("tokens", "inner", "out"), [(1, 384, 1536), (5, 123, 77), (123, 312, 384), (1000, 64, 96)])
def test_it_is_near_the_exact_product(activation: str | None, tokens: int, inner: int, out: int) -> None:
    x, weight, bias = case(tokens, inner, out)
    exact = F.linear(x.double(), weight.double(), bias.double())
    exact = {
        None: lambda y: y,
        "gelu": F.gelu,
        "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
        "relu": F.relu,
    }[activation](exact)
    found = Int8Linear(weight, bias, activation)(x)
    assert found.dtype == torch.float32
    cosines = F.cosine_similarity(found.double(), exact, dim=1)
    assert cosines.min() >= 0.999


def test_without_a_bias() -> None:
    x, weight, _ = case(7, 96, 40)
    assert F.cosine_similarity(Int8Linear(weight, None)(x), F.linear(x, weight)).min() >= 0.999


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    x, weight, bias = case(64, 384, 1152)
    linear = Int8Linear(weight, bias, "gelu")
    # The products are of integers, so nothing may differ, not even the last bit; a neighbour a thousand times as large.
    x[1] *= 1000.0
    together = linear(x)
    for token in (0, 1, 63):
        assert torch.equal(linear(x[token : token + 1])[0], together[token])


@pytest.mark.parametrize("value", [0.0, 2.5, -1e20, 1e-38])
def test_a_token_of_equal_elements(value: float) -> None:
    _, weight, bias = case(1, 96, 40)
    found = Int8Linear(weight, bias)(torch.full((1, 96), value))
    exact = F.linear(torch.full((1, 96), value, dtype=torch.float64), weight.double(), bias.double())
    assert torch.allclose(found.double(), exact, rtol=0.02, atol=0.02 * max(1.0, abs(value)))


def test_a_row_of_zeros_in_the_weight() -> None:
    x, weight, bias = case(3, 96, 40)
    weight[5] = 0.0
    assert torch.equal(Int8Linear(weight, bias)(x)[:, 5], bias[5].expand(3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_in_its_token(bad: float) -> None:
    x, weight, bias = case(4, 96, 40)
    linear = Int8Linear(weight, bias)
    clean = linear(x)
    x[2, 50] = bad
    found = linear(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])
