"""`y = act(x Wᵀ + b)` with W and x in 8 bits, on CPUs that multiply such (VNNI).

    W ≈ s_w · Q_w    Q_w int8 in -127 … 127, s_w a scale for each output channel, made once
    x ≈ lo + s_x · Q_x    Q_x uint8 in 0 … 255, lo and s_x of each token, from its own smallest and largest element
    x Wᵀ ≈ s_x · s_w · (Q_x Q_wᵀ) + lo · rowsum(s_w · Q_w)

Q_x Q_wᵀ is summed in int32. A token's range depends on nothing but the token, so a text's vector does not depend on
its neighbours, as it would with one range for the whole batch. A range that is symmetric around zero is half wasted on
tokens whose outliers lie on one side: all-MiniLM-L6-v2's lowest cosine to float32, short and mixed texts, was 0.990 so
and is 0.996 now. Factors between the input channels of W and x, as in SmoothQuant (Xiao et al. 2022,
arXiv:2211.10438), gave 0.996 alone and 0.997 with this; they need texts to calibrate with, and are left out.

512 tokens, 384 to 1536 with GELU, one core: 1.4 ms, where float32 took 3.4 and bfloat16 1.7; of them the product 0.86.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from embedserve.kernels.activation import ACTIVATIONS

__all__ = ["Int8Linear", "why_not"]

_LEVELS = 255
# A token of equal elements, such as zeros, has no range; any scale will do for it.
_LEAST = 1e-30


class Int8Linear:
    """A weight in 8 bits; x is float32 [tokens, in], the result float32 [tokens, out]. See `linear.Linear`.

    weight is float32 [out, in], bias [out] or None; activation is a key of `ACTIVATIONS` or None. The original weight
    is not kept. A token with a NaN or an infinity gets NaN for its result, and no other token does.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation: str | None = None) -> None:
        scales = weight.abs().amax(1).clamp_min_(_LEAST).div_(127)
        quantised = (weight / scales[:, None]).round_()
        self._row_sums = quantised.sum(1).mul_(scales)
        # Into the blocked layout of oneDNN, once.
        self._weight = torch.ops.onednn.qlinear_prepack(quantised.to(torch.int8), None)
        self._scales = scales
        self._zero_points = torch.zeros(len(scales), dtype=torch.int32)
        self._bias = torch.zeros_like(scales) if bias is None else bias
        self._activation = ACTIVATIONS[activation] if activation is not None else None

    def __call__(self, x: Tensor) -> Tensor:
        """See `Linear`."""
        lowest = x.amin(1, keepdim=True)
        step = x.amax(1, keepdim=True).sub_(lowest).clamp_min_(_LEAST).div_(_LEVELS)
        # To int8 and from there to uint8: torch converts floats to uint8 at a quarter of the speed.
        levels = x.sub(lowest).div_(step).sub_(128.0).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(128)
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            levels, 1.0, 0, self._weight, self._scales, self._zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        # In place: the product is the largest tensor of a layer, and each pass over it counts.
        torch.addcmul(self._bias, y, step, out=y).addcmul_(lowest, self._row_sums)
        return y if self._activation is None else self._activation(y)


def why_not() -> str | None:
    """Why this torch or this CPU cannot run `Int8Linear` well; None where it can."""
    onednn: Any = torch.backends.mkldnn
    if not (onednn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")):
        return "this build of torch has no quantised products of oneDNN"
    cpu: Any = torch.cpu
    if not cpu._is_vnni_supported():
        # Without it oneDNN adds pairs of products in 16 bits, which saturates with all 8 bits of x in use.
        return "the CPU has no VNNI, without which products of 8 bits are neither exact nor fast"
    return None
