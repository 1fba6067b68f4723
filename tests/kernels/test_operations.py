"""Each operation against its formula in float64, on awkward shapes."""

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial

import pytest
import torch

from embedserve.kernels import dispatch
from embedserve.kernels.activation import ACTIVATIONS
from embedserve.kernels.embedding import embed
from embedserve.kernels.gated import GATES, OneProduct, TwoProducts, glu
from embedserve.kernels.linear import Linear, OneDnnLinear, TorchLinear
from embedserve.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

ROWS = [1, 5, 123, 1000]
OPERATIONS = [field.name for field in fields(dispatch.Kernels) if field.name not in ("attend", "pads")]


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
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rows", ROWS)
def test_linear_is_its_formula(
    implementation: type[TorchLinear] | type[OneDnnLinear], activation: str | None, biased: bool, rows: int
) -> None:
    if implementation is OneDnnLinear and not OneDnnLinear.available():
        pytest.skip("this build of torch has no oneDNN")
    x, weight, bias = torch.randn(rows, 123), torch.randn(77, 123), torch.randn(77) if biased else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 123), (1000, 123), (5, 3, 16), (123, 24, 128)])
def test_rms_norm_is_its_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The last axis alone, each head with its own weight."""
    x = (torch.randn(shape) * torch.logspace(-3, 2, shape[0])[(...,) + (None,) * (len(shape) - 1)]).to(dtype)
    weight = torch.randn(shape[1:]).to(dtype)
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    # Half precision rounds twice: before the product with the weight, and after it.
    assert torch.allclose(found.double(), exact, rtol=2.1 * torch.finfo(dtype).eps, atol=1e-6)


def test_rms_norm_reads_a_strided_view_and_leaves_it() -> None:
    wide = torch.randn(5, 10, 16)
    before = wide.clone()
    weight = torch.randn(7, 16)
    assert torch.equal(rms_norm(wide[:, :7], weight, 1e-6), rms_norm(wide[:, :7].contiguous(), weight, 1e-6))
    assert torch.equal(wide, before)


def test_rms_norm_does_not_overflow_in_half_precision() -> None:
    x = torch.full((1, 64), 1000.0, dtype=torch.float16)  # its square is more than float16 holds
    assert torch.equal(rms_norm(x, torch.ones(64, dtype=torch.float16), 1e-6), torch.ones(1, 64, dtype=torch.float16))


def exact_glu(both: torch.Tensor, activation: str, gate_first: bool) -> torch.Tensor:
    first, second = both.double().chunk(2, dim=-1)
    gate, up = (first, second) if gate_first else (second, first)
    return up * (gate / (1 + torch.exp(-gate)) if activation == "silu" else exact_activation(gate, activation))


@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "gate second"])
@pytest.mark.parametrize("activation", sorted(GATES))
def test_a_gate_is_its_formula(activation: str, gate_first: bool) -> None:
    both = torch.randn(123, 2 * 77) * 4
    before = both.clone()
    found = glu(both, activation, gate_first)
    assert (found.double() - exact_glu(both, activation, gate_first)).abs().max() < 2e-5
    assert (found.double() - exact_glu(both, activation, not gate_first)).abs().max() > 1e-2
    assert torch.equal(both, before)


@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "gate second"])
@pytest.mark.parametrize("block", [OneProduct, partial(TwoProducts, linear=TorchLinear)], ids=["one", "two"])
def test_a_gated_block_is_its_formula(block: Callable[..., Linear], gate_first: bool, biased: bool) -> None:
    x, weight, bias = torch.randn(5, 123), torch.randn(2 * 77, 123), torch.randn(2 * 77) if biased else None
    both = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    expected = exact_glu(both, "gelu", gate_first)
    found = block(weight, bias, "gelu", gate_first)(x)
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("with_table", [True, False], ids=["words and positions", "words"])
def test_an_embedding_is_its_formula(with_table: bool) -> None:
    ids, positions = torch.randint(50, (123,)).int(), torch.arange(123).int() % 40
    words, table, weight, bias = torch.randn(50, 77), torch.randn(40, 77), torch.randn(77), torch.randn(77)
    total = words.double()[ids] + (table.double()[positions] if with_table else 0)
    expected = torch.nn.functional.layer_norm(total, (77,), weight.double(), bias.double(), 1e-5)
    before = words.clone()
    found = embed(ids, words, positions, table if with_table else None, weight, bias, 1e-5)
    assert (found.double() - expected).abs().max() < 1e-5
    assert torch.equal(words, before)


def test_rms_norm_after_a_sum_leaves_the_sum_in_the_residual() -> None:
    x, residual, weight = torch.randn(5, 77), torch.randn(5, 77), torch.randn(77)
    total = x + residual
    assert torch.equal(add_rms_norm(x.clone(), residual, weight, 1e-6), rms_norm(total, weight, 1e-6))
    assert torch.equal(residual, total)


def test_the_cpu_takes_onednn_and_the_override_takes_plain_torch() -> None:
    cpu = torch.device("cpu")
    chosen = dispatch.choose(cpu, torch.float32)
    assert chosen.linear is (OneDnnLinear if OneDnnLinear.available() else TorchLinear)
    assert dispatch.choose(cpu, torch.float32, reference=True) == dispatch.REFERENCE


@pytest.mark.parametrize(("capability", "fused"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gpus_take_the_fused_kernels_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fused: bool, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    chosen = dispatch.choose(torch.device("cuda"), dtype)
    plain = [name for name in OPERATIONS if getattr(chosen, name) is getattr(dispatch.REFERENCE, name)]
    assert plain == ([] if fused else OPERATIONS)
    assert dispatch.choose(torch.device("cuda"), dtype, reference=True) == dispatch.REFERENCE
