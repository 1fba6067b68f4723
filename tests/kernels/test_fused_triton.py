"""The Triton kernels between the products, against their formulas in float64: interpreted, and on a GPU."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kernels.test_operations import exact_activation, exact_glu
from tests.kernels.test_rotary import turned
from tests.kernels.triton_calls import PLACES, calls
from torch import Tensor
from torch.nn.functional import layer_norm, rms_norm

from embedserve.kernels.gated import GATES
from embedserve.kernels.rotary import rotary_angles

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Tokens and hidden size: of the catalogue's models, and awkward ones. A thousand once: interpreted, a token takes ms.
SHAPES = [(1, 384), (5, 768), (123, 1024), (5, 312), (2, 2560), (1, 4096)]
CASES = [*((*shape, dtype) for shape in SHAPES for dtype in DTYPES), (1000, 7, torch.float16)]
EPS = 1e-6


@pytest.fixture(scope="module", params=PLACES)
def call(request: pytest.FixtureRequest) -> Iterator[Callable[..., Tensor]]:
    with calls(request.param) as call:
        yield call


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: Tensor, exact: Tensor, roundings: int = 1) -> bool:
    """Whether `found` is `exact`, float64, but for so many roundings to its dtype, and float32's own error."""
    # Rounding is half a step away from the number at most; Triton's interpreter (3.7.1) cuts bfloat16 off instead.
    step = 1.02 if found.dtype == torch.bfloat16 else 0.51
    rtol = step * roundings * torch.finfo(found.dtype).eps + 1e-6
    return torch.allclose(found.double(), exact, rtol=rtol, atol=1e-5)


def states(tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Random states, each of another size."""
    return (torch.randn(tokens, hidden) * torch.logspace(-2, 1, tokens)[:, None]).to(dtype)


def parameters(hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(hidden).to(dtype), torch.randn(hidden).to(dtype)


def exact_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x.double(), weight.shape, weight.double(), bias.double(), EPS)


@pytest.mark.parametrize(("tokens", "hidden", "dtype"), CASES[:-1], ids=str)
def test_layer_norm(call: Callable[..., Tensor], tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, (weight, bias) = states(tokens, hidden, dtype), parameters(hidden, dtype)
    before = x.clone()
    found = call("norm_triton:layer_norm", x, weight, bias, EPS)
    assert found.dtype == dtype
    assert close(found, exact_layer_norm(x, weight, bias))
    assert torch.equal(x, before)


@pytest.mark.parametrize(("tokens", "hidden", "dtype"), CASES, ids=str)
def test_layer_norm_after_a_sum(call: Callable[..., Tensor], tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual = states(tokens, hidden, dtype), states(tokens, hidden, dtype)
    weight, bias = parameters(hidden, dtype)
    exact, before = exact_layer_norm(x.double() + residual.double(), weight, bias), residual.clone()
    assert close(call("norm_triton:add_layer_norm", x, residual, weight, bias, EPS), exact)
    assert torch.equal(residual, before)


@pytest.mark.parametrize(("tokens", "hidden", "dtype"), CASES[:-1], ids=str)
def test_rms_norm(call: Callable[..., Tensor], tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, (weight, _) = states(tokens, hidden, dtype), parameters(hidden, dtype)
    before = x.clone()
    found = call("norm_triton:rms_norm", x, weight, EPS)
    assert found.dtype == dtype
    assert close(found, rms_norm(x.double(), weight.shape, weight.double(), EPS), roundings=2)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("tokens", "hidden", "dtype"), CASES, ids=str)
def test_rms_norm_after_a_sum(call: Callable[..., Tensor], tokens: int, hidden: int, dtype: torch.dtype) -> None:
    x, residual, (weight, _) = states(tokens, hidden, dtype), states(tokens, hidden, dtype), parameters(hidden, dtype)
    total = x.double() + residual.double()
    found = call("norm_triton:add_rms_norm", x, residual, weight, EPS)
    assert close(residual, total)
    # Of the sum as it was rounded.
    assert close(found, rms_norm(residual.double(), weight.shape, weight.double(), EPS), roundings=2)


def test_rms_norm_does_not_overflow_in_half_precision(call: Callable[..., Tensor]) -> None:
    x = torch.full((1, 64), 1000.0, dtype=torch.float16)  # its square is more than float16 holds
    assert torch.equal(call("norm_triton:rms_norm", x, torch.ones(64, dtype=torch.float16), EPS), torch.ones_like(x))


def test_norms_read_a_part_of_a_wider_row(call: Callable[..., Tensor]) -> None:
    """JinaBERT normalises the queries within the buffer that holds keys and values too."""
    wide, (weight, bias) = states(5, 3 * 40, torch.float32), parameters(40, torch.float32)
    before = wide.clone()
    q, k, _ = wide.view(5, 3, 40).unbind(1)
    assert close(call("norm_triton:layer_norm", k, weight, bias, EPS), exact_layer_norm(k, weight, bias))
    exact = rms_norm(q.double(), weight.shape, weight.double(), EPS)
    assert close(call("norm_triton:rms_norm", q, weight, EPS), exact)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("with_table", [True, False], ids=["words and positions", "words"])
@pytest.mark.parametrize(("tokens", "hidden", "dtype"), CASES[:-1], ids=str)
def test_embedding(call: Callable[..., Tensor], tokens: int, hidden: int, with_table: bool, dtype: torch.dtype) -> None:
    ids, positions = torch.randint(50, (tokens,)).int(), torch.arange(tokens).int() % 40
    words, table, (weight, bias) = states(50, hidden, dtype), states(40, hidden, dtype), parameters(hidden, dtype)
    total = words.double()[ids] + (table.double()[positions] if with_table else 0)
    found = call("embedding_triton:embed", ids, words, positions, table if with_table else None, weight, bias, EPS)
    assert found.dtype == dtype
    assert close(found, exact_layer_norm(total, weight, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", sorted(GATES))
@pytest.mark.parametrize(("tokens", "inner", "biased"), [(1, 1536, True), (5, 3072, False), (123, 40, True)])
def test_bias_and_activation(
    call: Callable[..., Tensor], tokens: int, inner: int, biased: bool, activation: str, dtype: torch.dtype
) -> None:
    y, bias = states(tokens, inner, dtype), torch.randn(inner).to(dtype) if biased else None
    x = y.double() + (0 if bias is None else bias.double())
    exact = x * torch.sigmoid(x) if activation == "silu" else exact_activation(x, activation)
    assert close(call("activation_triton:apply_bias", y, bias, activation), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate_first", [True, False], ids=["gate first", "gate second"])
@pytest.mark.parametrize("activation", sorted(GATES))
@pytest.mark.parametrize(("tokens", "inner"), [(1, 1536), (5, 2048 + 40), (123, 7)])
def test_gate(
    call: Callable[..., Tensor], tokens: int, inner: int, activation: str, gate_first: bool, dtype: torch.dtype
) -> None:
    both = states(tokens, 2 * inner, dtype)
    found = call("activation_triton:glu", both, activation, gate_first)
    assert found.dtype == dtype
    assert close(found, exact_glu(both, activation, gate_first))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "head_dim"), [(1, 16, 8, 128), (123, 6, 2, 16), (5, 3, 3, 24)])
def test_norm_and_rotation(
    call: Callable[..., Tensor], tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    """In place, within the buffer that holds the values too, which stay."""
    qkv = states(tokens, (heads + 2 * kv_heads) * head_dim, dtype).view(tokens, heads + 2 * kv_heads, head_dim)
    qk, v = qkv[:, :-kv_heads], qkv[:, -kv_heads:].clone()
    weight = torch.randn(heads + kv_heads, head_dim).to(dtype)
    # Few enough that the angles, float32 products, are exact to the tolerance.
    positions = torch.arange(tokens).int() % 20
    normed = torch.stack([rms_norm(head.double(), (head_dim,), None, EPS) for head in qk.unbind(1)], 1)
    # Where the reference rounds: a turn mixes two components, and an error of the larger is seen in the smaller.
    exact = turned((normed.to(dtype) * weight), positions)
    found = call("rotary_triton:norm_rotate", qk, weight, EPS, *rotary_angles(positions, head_dim, 1e6))
    assert found.dtype == dtype
    length = exact.unflatten(-1, (2, -1)).norm(dim=-2).repeat(1, 1, 2)
    assert ((found.double() - exact).abs() <= (4 * torch.finfo(dtype).eps + 5e-5) * length).all()
    assert torch.equal(found, qkv[:, :-kv_heads])
    assert torch.equal(qkv[:, -kv_heads:], v)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_token(call: Callable[..., Tensor], bad: float) -> None:
    def broken(hidden: int) -> Tensor:
        x = torch.randn(5, hidden)
        x[2, 3] = bad
        return x

    weight, bias = parameters(24, torch.float32)
    angles = rotary_angles(torch.arange(5).int(), 8, 1e4)
    found = {
        "layer_norm": call("norm_triton:layer_norm", broken(24), weight, bias, EPS),
        "add_layer_norm": call("norm_triton:add_layer_norm", broken(24), torch.randn(5, 24), weight, bias, EPS),
        "add_rms_norm": call("norm_triton:add_rms_norm", torch.randn(5, 24), broken(24), weight, EPS),
        "embed": call("embedding_triton:embed", torch.arange(5).int(), broken(24), bias.int(), None, weight, bias, EPS),
        "norm_rotate": call("rotary_triton:norm_rotate", broken(24).view(5, 3, 8), weight.view(3, 8), EPS, *angles),
        **{name: call("activation_triton:apply_bias", broken(24), bias, name) for name in GATES},
        **{f"{name} gate": call("activation_triton:glu", broken(48), name, True) for name in GATES},
    }
    for name, states in found.items():
        assert states.flatten(1).isfinite().all(1).tolist() == [True, True, False, True, True], name


def test_what_they_cannot_read_is_refused(call: Callable[..., Tensor]) -> None:
    x, weight, ids = torch.randn(24, 24), torch.randn(24), torch.arange(5).int()
    with pytest.raises(ValueError, match="side by side"):
        call("norm_triton:rms_norm", x.T, weight, EPS)
    with pytest.raises(ValueError, match=r"a residual \[5, 24\]"):
        call("norm_triton:add_rms_norm", x, x[:5], weight, EPS)
    with pytest.raises(ValueError, match="contiguous"):
        call("embedding_triton:embed", ids, x.T, ids, None, weight, weight, EPS)
    with pytest.raises(ValueError, match="side by side"):
        call("activation_triton:glu", x.T, "gelu", True)
    with pytest.raises(KeyError, match="mish"):
        call("activation_triton:apply_bias", x, None, "mish")
    with pytest.raises(ValueError, match="side by side"):
        call("rotary_triton:norm_rotate", x.view(4, 6, 24).transpose(1, 2), weight, EPS, x, x)


# Every kernel with what is constant in it, at bge-large's and Qwen3's sizes.
ROW = {"HIDDEN": 1024, "WIDTH": 1024}
COLUMNS = {"INNER": 3072, "COLUMNS": 1024}
PROGRAMS: list[tuple[str, str, dict[str, Any]]] = [
    ("norm_triton", "_layer_norm", {**ROW, "SUM": False}),
    ("norm_triton", "_layer_norm", {**ROW, "SUM": True}),
    ("norm_triton", "_rms_norm", {**ROW, "SUM": False}),
    ("norm_triton", "_rms_norm", {**ROW, "SUM": True}),
    ("embedding_triton", "_embed", {**ROW, "TABLE": False}),
    ("embedding_triton", "_embed", {**ROW, "TABLE": True}),
    *(("activation_triton", "_apply_bias", {**COLUMNS, "BIASED": True, "ACTIVATION": name}) for name in GATES),
    *(("activation_triton", "_glu", {**COLUMNS, "GATE": 0, "UP": 3072, "ACTIVATION": name}) for name in GATES),
    ("rotary_triton", "_norm_rotate", {"HEADS": 24, "HALF": 64, "ROWS": 32, "WIDTH": 64}),
]


@pytest.mark.parametrize("capability", [80, 90], ids=["Ampere", "Hopper"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_compiler_makes_programs_that_read_16_bytes_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, dtype: str
) -> None:
    triton = pytest.importorskip("triton", reason="Triton is published for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"ids": "*i32", "positions": "*i32", "cos": "*fp32", "sin": "*fp32", "eps": "fp32"}
    for module, name, constants in PROGRAMS:
        kernel = getattr(pytest.importorskip(f"embedserve.kernels.{module}"), name)
        signature, attributes = {}, {}
        for index, argument in enumerate(kernel.arg_names):
            number = argument.endswith(("_token", "_head"))
            signature[argument] = "constexpr" if argument in constants else types.get(argument, f"*{dtype}")
            if number:
                signature[argument] = "i32"
            # As a launch finds them: of pointers and strides, those that 16 divides.
            if argument not in constants and argument not in ("ids", "positions", "eps"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, signature, constants, attributes)
        program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        assert "ld.global.v4.b32" in program.asm["ptx"], (name, constants)
