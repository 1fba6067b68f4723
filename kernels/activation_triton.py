"""What follows a feed-forward block's first product on CUDA, in one pass: bias and activation, or a gate.

    apply_bias      y = act(y + b), in place
    glu             act(gate) · up, [tokens, 2 · inner] → [tokens, inner]

The products themselves are cuBLAS's, whose kernels nobody has to write again. It adds a bias on its way out, which is
why a linear without activation needs nothing from here; the GELU it can add is the tanh form alone, and the checkpoints
ask for the exact one. `activation.py` and `gated.py` have the formulas and the references; computed in float32,
rounded once.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. They have
not been run on a GPU yet.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from embedserve.kernels.gated import GATES

# Columns of a program: eight numbers for each thread of four warps, 16 bytes of half precision.
_COLUMNS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _activated(x, ACTIVATION: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """act(x) in float32; a NaN stays one."""
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # noqa: RET505 (Triton takes the branch away while it compiles)
        # 1 + tanh(z) = 2 · sigmoid(2z), and 1.5957691 = 2·√(2/π).
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    else:
        tl.static_assert(ACTIVATION == "relu")
        return tl.where(x < 0.0, 0.0, x)


@triton.jit  # type: ignore[untyped-decorator]
def _apply_bias(  # type: ignore[no-untyped-def]
    y,
    bias,
    y_token,
    INNER: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    COLUMNS: tl.constexpr,  # noqa: N803
    BIASED: tl.constexpr,  # noqa: N803
    ACTIVATION: tl.constexpr,  # noqa: N803
):
    """One stretch of columns of one token."""
    # 64 bits: tokens times stride may pass 2^31.
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < INNER
    x = tl.load(y + token * y_token + column, mask=there, other=0.0).to(tl.float32)
    if BIASED:
        x += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)
    tl.store(y + token * y_token + column, _activated(x, ACTIVATION).to(y.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _glu(  # type: ignore[no-untyped-def]
    both,
    out,
    both_token,
    INNER: tl.constexpr,  # noqa: N803
    COLUMNS: tl.constexpr,  # noqa: N803
    GATE: tl.constexpr,  # noqa: N803
    UP: tl.constexpr,  # noqa: N803
    ACTIVATION: tl.constexpr,  # noqa: N803
):
    """One stretch of columns of one token; GATE and UP are the first columns of the two halves. out is contiguous."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < INNER
    row = both + token * both_token + column
    gate = tl.load(row + GATE, mask=there, other=0.0).to(tl.float32)
    up = tl.load(row + UP, mask=there, other=0.0).to(tl.float32)
    product = _activated(gate, ACTIVATION) * up
    tl.store(out + token * INNER + column, product.to(out.dtype.element_ty), mask=there)


def apply_bias(y: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """`act(y + bias)`, written over y and returned.

    y is [tokens, inner], bias [inner] or None, activation a key of `gated.GATES`. Raises KeyError for another, and
    ValueError where the components of a token do not stand side by side in memory.
    """
    tokens, inner = y.shape
    _check(y, activation)
    columns, blocks = _columns(inner)
    # Triton launches on the current device. Tokens are on the first axis, the only one that goes beyond 65535.
    with torch.cuda.device_of(y):  # type: ignore[no-untyped-call]
        _apply_bias[(tokens, blocks)](
            y,
            y if bias is None else bias,
            y.stride(0),
            INNER=inner,
            COLUMNS=columns,
            BIASED=bias is not None,
            ACTIVATION=activation,
        )
    return y


def glu(both: Tensor, activation: str, gate_first: bool) -> Tensor:
    """See `gated.glu`. Raises as `apply_bias`."""
    tokens, inner = both.shape[0], both.shape[1] // 2
    _check(both, activation)
    columns, blocks = _columns(inner)
    out = torch.empty(tokens, inner, dtype=both.dtype, device=both.device)
    with torch.cuda.device_of(both):  # type: ignore[no-untyped-call]
        _glu[(tokens, blocks)](
            both,
            out,
            both.stride(0),
            INNER=inner,
            COLUMNS=columns,
            GATE=0 if gate_first else inner,
            UP=inner if gate_first else 0,
            ACTIVATION=activation,
        )
    return out


class CublasLinear:
    """A `Linear`: cuBLAS's product, which adds the bias; with an activation, bias and activation in one pass after it.

    weight is [out, in], bias [out] or None; activation is a key of `ACTIVATIONS` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        self._weight, self._bias, self._activation = weight.contiguous(), bias, activation

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        if self._activation is None:
            return F.linear(x, self._weight, self._bias)
        return apply_bias(F.linear(x, self._weight), self._bias, self._activation)


def _columns(inner: int) -> tuple[int, int]:
    """Columns of a program, and how many programs share a token."""
    columns = min(_COLUMNS, triton.next_power_of_2(inner))
    return columns, triton.cdiv(inner, columns)


def _check(x: Tensor, activation: str) -> None:
    if activation not in GATES:
        raise KeyError(f"unknown activation {activation!r}; expected one of {', '.join(GATES)}")
    if x.stride(1) != 1:
        raise ValueError("the components of a token must stand side by side in memory")
