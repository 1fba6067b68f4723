"""Each operation against its formula in float64, on awkward shapes."""

import math

import pytest
import torch

from embedserve.kernels import dispatch
from embedserve.kernels.activation import ACTIVATIONS
from embedserve.kernels.linear import OneDnnLinear, TorchLinear
from embedserve.kernels.norm import add_layer_norm, layer_norm

ROWS = [1, 5, 123, 1000]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def exact_activation(x: torch.Tensor, name: str) -> torch.Tensor:
    if name == "gelu":
        return x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    if name == "gelu_tanh":
        return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp_min(0)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_activation_is_its_formula(name: str) -> None:
    x = torch.linspace(-12, 12, 4001)
    assert torch.allclose(ACTIVATIONS[name](x).double(), exact_activation(x.double(), name), atol=1e-6, rtol=1e-6)


def test_the_two_gelus_differ() -> None:
    x = torch.linspace(-3, 3, 101)
    assert (ACTIVATIONS["gelu"](x) - ACTIVATIONS["gelu_tanh"](x)).abs().max() > 1e-4


@pytest.mark.parametrize("implementation", [TorchLinear, OneDnnLinear])
@pytest.mark.parametrize("activation", [None, *sorted(ACTIVATIONS)])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_its_formula(
    implementation: type[TorchLinear] | type[OneDnnLinear], activation: str | None, rows: int
) -> None:
    if implementation is OneDnnLinear and not OneDnnLinear.available():
        pytest.skip("this build of torch has no oneDNN")
    x, weight, bias = torch.randn(rows, 123), torch.randn(77, 123), torch.randn(77)
    expected = x.double() @ weight.double().T + bias.double()
    if activation is not None:
        expected = exact_activation(expected, activation)
    found = implementation(weight, bias, activation)(x)
    assert found.dtype == torch.float32
    # Values reach 50, so this is 1e-6 of their size.
    assert (found.double() - expected).abs().max() < 5e-5


@pytest.mark.parametrize("rows", ROWS)
def test_layer_norm_after_a_sum_is_its_formula(rows: int) -> None:
    x, residual, weight, bias = torch.randn(rows, 123), torch.randn(rows, 123), torch.randn(123), torch.randn(123)
    total = x.double() + residual.double()
    deviation = total - total.mean(1, keepdim=True)
    expected = deviation / (deviation.square().mean(1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    assert (layer_norm(x + residual, weight, bias, 1e-5).double() - expected).abs().max() < 1e-5
    assert (add_layer_norm(x, residual, weight, bias, 1e-5).double() - expected).abs().max() < 1e-5


def test_the_cpu_takes_onednn_and_the_override_takes_plain_torch() -> None:
    cpu = torch.device("cpu")
    chosen = dispatch.choose(cpu, torch.float32)
    assert chosen.linear is (OneDnnLinear if OneDnnLinear.available() else TorchLinear)
    assert dispatch.choose(cpu, torch.float32, reference=True) == dispatch.REFERENCE
