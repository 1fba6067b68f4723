"""Each head's RMSNorm and rotary position on CUDA, in place and in one pass over the queries and keys of a product.

A program has one token: all its heads that are to turn, [heads, head_dim / 2] twice, and its row of cosines and sines,
which it reads once for all of them. torch takes a dozen kernels for it and writes float32 copies to memory.
`rotary.norm_rotate` is the reference; sums are float32, and rounding is where the reference has it.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. It has not
been run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _norm_rotate(  # type: ignore[no-untyped-def]
    qk,
    weight,
    cos,
    sin,
    eps,
    qk_token,
    qk_head,
    HEADS: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    HALF: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    WIDTH: tl.constexpr,  # noqa: N803
):
    """One token. Component i of a head turns with component i + HALF."""
    # 64 bits: tokens times stride may pass 2^31.
    token = tl.program_id(0).to(tl.int64)
    dtype = qk.dtype.element_ty
    head, component = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    there = (head < HEADS) & (component < HALF)
    low_at = qk + token * qk_token + head * qk_head + component
    low = tl.load(low_at, mask=there, other=0.0).to(tl.float32)
    high = tl.load(low_at + HALF, mask=there, other=0.0).to(tl.float32)

    scale = tl.rsqrt(tl.sum(low * low + high * high, 1) / (2 * HALF) + eps)[:, None]
    own = weight + head * (2 * HALF) + component
    # Rounded before the product with the weight and after it: see `norm.rms_norm`.
    low = (low * scale).to(dtype).to(tl.float32) * tl.load(own, mask=there, other=0.0).to(tl.float32)
    high = (high * scale).to(dtype).to(tl.float32) * tl.load(own + HALF, mask=there, other=0.0).to(tl.float32)
    low, high = low.to(dtype).to(tl.float32), high.to(dtype).to(tl.float32)

    c = tl.load(cos + token * HALF + component, mask=component < HALF, other=0.0)
    s = tl.load(sin + token * HALF + component, mask=component < HALF, other=0.0)
    tl.store(low_at, (low * c - high * s).to(dtype), mask=there)
    tl.store(low_at + HALF, (high * c + low * s).to(dtype), mask=there)


def norm_rotate(qk: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rotary.norm_rotate`; the result is written over qk.

    Raises ValueError where a head's components do not stand side by side in memory, or the others are not contiguous.
    """
    tokens, heads, head_dim = qk.shape
    if qk.stride(2) != 1 or not all(part.is_contiguous() for part in (weight, cos, sin)):
        raise ValueError("the components of a head must stand side by side, and weight, cos and sin be contiguous")
    rows, width = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim // 2)
    # Triton launches on the current device.
    with torch.cuda.device_of(qk):  # type: ignore[no-untyped-call]
        _norm_rotate[(tokens,)](
            qk,
            weight,
            cos,
            sin,
            eps,
            qk.stride(0),
            qk.stride(1),
            HEADS=heads,
            HALF=head_dim // 2,
            ROWS=rows,
            WIDTH=width,
            # Sixteen numbers a thread, of each head's halves eight: 16 bytes of half precision.
            num_warps=min(max(rows * width // 256, 1), 16),
        )
    return qk
