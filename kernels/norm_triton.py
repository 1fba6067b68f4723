"""LayerNorm and RMSNorm on CUDA, each alone and after a residual sum: one pass over a token's state.

    layer_norm      LN(x)               add_layer_norm    LN(x + residual)
    rms_norm        RMS(x)              add_rms_norm      residual += x; RMS(residual)

A program has one token's whole state in registers and reads and writes it once; sums, mean and variance are float32.
torch has both norms as one kernel each, and the sum before them as another one that writes it to memory in between.
`norm.py` has the formulas and the references.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. They have
not been run on a GPU yet.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def normalised(x, weight, bias, eps, column, there, HIDDEN: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """LN of one state, float32: x float32, 0 beyond HIDDEN, where `there` is false."""
    mean = tl.sum(x, 0) / HIDDEN
    deviation = tl.where(there, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(deviation * deviation, 0) / HIDDEN + eps)
    scaled = deviation * scale * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    return scaled + tl.load(bias + column, mask=there, other=0.0).to(tl.float32)


@triton.jit  # type: ignore[untyped-decorator]
def _layer_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    out,
    weight,
    bias,
    eps,
    x_token,
    residual_token,
    out_token,
    HIDDEN: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    WIDTH: tl.constexpr,  # noqa: N803
    SUM: tl.constexpr,  # noqa: N803
):
    """One token. out may be x: all of a state is read before any of it is written."""
    # 64 bits: tokens times stride may pass 2^31.
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < HIDDEN
    state = tl.load(x + token * x_token + column, mask=there, other=0.0).to(tl.float32)
    if SUM:
        state += tl.load(residual + token * residual_token + column, mask=there, other=0.0).to(tl.float32)
    state = normalised(state, weight, bias, eps, column, there, HIDDEN)
    tl.store(out + token * out_token + column, state.to(out.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    residual,
    out,
    weight,
    eps,
    x_token,
    residual_token,
    out_token,
    HIDDEN: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
    SUM: tl.constexpr,  # noqa: N803
):
    """One token; with SUM, the sum is rounded, written to residual, and normalised as it stands there."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    there = column < HIDDEN
    state = tl.load(x + token * x_token + column, mask=there, other=0.0).to(tl.float32)
    if SUM:
        state += tl.load(residual + token * residual_token + column, mask=there, other=0.0).to(tl.float32)
        total = state.to(residual.dtype.element_ty)
        tl.store(residual + token * residual_token + column, total, mask=there)
        state = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(state * state, 0) / HIDDEN + eps)
    # Rounded before the product with the weight: see `norm.rms_norm`.
    scaled = (state * scale).to(out.dtype.element_ty).to(tl.float32)
    scaled *= tl.load(weight + column, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * out_token + column, scaled.to(out.dtype.element_ty), mask=there)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `norm.layer_norm`; x may be a strided view of whole rows. Raises ValueError as all of this file do."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_layer_norm, x, x, out, (weight, bias), eps, add=False)
    return out


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See `norm.add_layer_norm`; the result is written over x, the sum is rounded nowhere."""
    _launch(_layer_norm, x, residual, x, (weight, bias), eps, add=True)
    return x


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `norm.rms_norm`; x is [tokens, hidden]. Heads with weights of their own are `rotary_triton.norm_rotate`'s."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(_rms_norm, x, x, out, (weight,), eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `norm.add_rms_norm`; the result is written over x."""
    _launch(_rms_norm, x, residual, x, (weight,), eps, add=True)
    return x


def row_size(hidden: int) -> dict[str, int]:
    """How a program holds a row of `hidden` numbers: WIDTH, a power of two, and the warps that share it.

    Eight numbers a thread, the 16 bytes of half precision that one instruction loads; from 4096 on more.
    """
    width = triton.next_power_of_2(hidden)
    return {"WIDTH": width, "num_warps": min(max(width // 256, 1), 16)}


def _launch(
    kernel: Any, x: Tensor, residual: Tensor, out: Tensor, parameters: tuple[Tensor, ...], eps: float, *, add: bool
) -> None:
    tokens, hidden = x.shape
    if residual.shape != x.shape or any(one.shape != (hidden,) for one in parameters):
        raise ValueError(
            f"a state {list(x.shape)}, a residual {list(residual.shape)}, parameters "
            f"{[list(one.shape) for one in parameters]}: expected [tokens, hidden] twice, then [hidden]"
        )
    if any(part.stride(-1) != 1 for part in (x, residual, out, *parameters)):
        raise ValueError("the components of a state must stand side by side in memory")
    # Triton launches on the current device.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(tokens,)](
            x,
            residual,
            out,
            *parameters,
            eps,
            x.stride(0),
            residual.stride(0),
            out.stride(0),
            HIDDEN=hidden,
            SUM=add,
            **row_size(hidden),
        )
