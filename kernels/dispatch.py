"""Which implementation of an operation runs where: the one place of that choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from embedserve.kernels.activation import ACTIVATIONS
from embedserve.kernels.attention import Attend, attend_by_runs, attend_padded, attend_varlen
from embedserve.kernels.embedding import embed
from embedserve.kernels.gated import OneProduct, TwoProducts
from embedserve.kernels.int8 import Int8Linear
from embedserve.kernels.linear import Linear, OneDnnLinear, TorchLinear
from embedserve.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from embedserve.kernels.pooling import Pool, pool_and_finish
from embedserve.kernels.rotary import norm_rotate

# FlashAttention's kernels begin with Ampere, and so does what Triton supports.
_AMPERE = (8, 0)


@dataclass(frozen=True)
class Kernels:
    """The chosen operations. What each computes, from what to what, is said where REFERENCE has it from.

    linear(weight, bias, activation) and gated(weight, bias, activation, gate_first) prepare weights, once; the others
    compute. pads: whether attend pads its rows to the longest, so that a batch should hold rows of like length.
    """

    attend: Attend
    linear: Callable[[Tensor, Tensor | None, str | None], Linear]
    gated: Callable[[Tensor, Tensor | None, str, bool], Linear]
    embed: Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, float], Tensor]
    layer_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    norm_rotate: Callable[[Tensor, Tensor, float, Tensor, Tensor], Tensor]
    pool_and_finish: Pool
    pads: bool = False


REFERENCE = Kernels(
    attend=attend_by_runs,
    linear=TorchLinear,
    gated=OneProduct,
    embed=embed,
    layer_norm=layer_norm,
    add_layer_norm=add_layer_norm,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    norm_rotate=norm_rotate,
    pool_and_finish=pool_and_finish,
)


def choose(device: torch.device, dtype: torch.dtype, *, reference: bool = False) -> Kernels:
    """Return the fastest operations that device and dtype can run; `reference` overrides with plain torch.

    int8 is that of the CPU's linears, with float32 for all else; see `int8.why_not` for where it is not there.
    """
    if reference:
        return REFERENCE
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < _AMPERE:
            return replace(REFERENCE, attend=attend_padded, pads=True)
        return fused(attend_varlen)
    if dtype == torch.int8:
        return replace(REFERENCE, linear=Int8Linear, gated=partial(OneProduct, linear=Int8Linear))
    if device.type == "cpu" and dtype in (torch.float32, torch.bfloat16) and OneDnnLinear.available():
        return replace(REFERENCE, linear=OneDnnLinear, gated=_onednn_gated)
    return REFERENCE


def fused(attend: Attend) -> Kernels:
    """Return cuBLAS's products with our Triton kernels between them: all but attention, in every float up to 32 bits.

    Raises ImportError where torch came without Triton, as its CPU builds do.
    """
    from embedserve.kernels import activation_triton, embedding_triton, norm_triton, pooling_triton, rotary_triton

    linear = activation_triton.CublasLinear
    return Kernels(
        attend=attend,
        linear=linear,
        gated=partial(OneProduct, linear=linear, gate=activation_triton.glu),
        embed=embedding_triton.embed,
        layer_norm=norm_triton.layer_norm,
        add_layer_norm=norm_triton.add_layer_norm,
        rms_norm=norm_triton.rms_norm,
        add_rms_norm=norm_triton.add_rms_norm,
        norm_rotate=rotary_triton.norm_rotate,
        pool_and_finish=pooling_triton.pool_and_finish,
    )


def _onednn_gated(weight: Tensor, bias: Tensor | None, activation: str, gate_first: bool) -> Linear:
    # oneDNN applies an activation on its way out, which pays with GELU (see TwoProducts) and not with SiLU: two
    # products took 1.02 times as long as one and SiLU after it for 16 and 128 tokens of Qwen3-0.6B, 0.99 for 512.
    blocks = TwoProducts if activation in ACTIVATIONS else OneProduct
    return blocks(weight, bias, activation, gate_first, linear=OneDnnLinear)
