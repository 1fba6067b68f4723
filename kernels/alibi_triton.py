"""Attention with ALiBi over packed sequences on CUDA, in one kernel that writes neither scores nor bias to memory.

    O_i = Σ_j softmax_j(⟨q_i, k_j⟩ / √head_dim - slope · |i - j|) · v_j        i, j within one row of the batch

FlashAttention's forward pass (Dao 2023, arXiv:2307.08691): a program has a block of a row's queries, goes over the
row's keys block by block, and keeps the running maximum, the running sum and the weighted values of each query in
float32. `attention.attend_by_runs` is the reference.

Tested against float64 under Triton's interpreter (TRITON_INTERPRET=1), and compiled for Ampere and Hopper. It has not
been run on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from embedserve.kernels.attention import Layout

_LARGEST_HEAD_DIM = 128
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LOG2_E = 1.4426950408889634


# Not specialised by what changes from batch to batch, or requests would wait for the compiler after the warm-up.
@triton.jit(do_not_specialize=["blocks"], do_not_specialize_on_alignment=["cu_seqlens"])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q,
    k,
    v,
    out,
    slopes,
    cu_seqlens,
    scale,
    blocks,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    HEAD_DIM: tl.constexpr,  # noqa: N803 (constants of the compilation, by Triton's custom)
    WIDTH: tl.constexpr,  # noqa: N803
    QUERIES: tl.constexpr,  # noqa: N803
    KEYS: tl.constexpr,  # noqa: N803
):
    """One block of queries of one row and head. scale and slopes come times log2(e): exponents are powers of two."""
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    head = tl.program_id(1)
    begin = tl.load(cu_seqlens + row)
    length = tl.load(cu_seqlens + row + 1) - begin
    if block * QUERIES >= length:
        return
    slope = tl.load(slopes + head)
    # 64 bits: tokens times stride may pass 2^31.
    start = begin.to(tl.int64)
    i = block * QUERIES + tl.arange(0, QUERIES)
    channel = tl.arange(0, WIDTH)
    own = (i[:, None] < length) & (channel[None, :] < HEAD_DIM)
    queries = tl.load(q + (start + i)[:, None] * q_token + head * q_head + channel[None, :], mask=own, other=0.0)

    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, WIDTH], tl.float32)
    for first in range(0, length, KEYS):
        j = first + tl.arange(0, KEYS)
        there = (j[:, None] < length) & (channel[None, :] < HEAD_DIM)
        keys = tl.load(k + (start + j)[:, None] * k_token + head * k_head + channel[None, :], mask=there, other=0.0)
        # ieee: float32 would otherwise be multiplied as TF32, with ten bits.
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores -= slope * tl.abs(i[:, None] - j[None, :]).to(tl.float32)
        scores = tl.where(j[None, :] < length, scores, float("-inf"))
        # Never -inf: every block of keys begins within the row.
        raised = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - raised[:, None])
        faded = tl.exp2(highest - raised)
        total = total * faded + tl.sum(weights, 1)
        values = tl.load(v + (start + j)[:, None] * v_token + head * v_head + channel[None, :], mask=there, other=0.0)
        mixed = mixed * faded[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        highest = raised

    states = (mixed / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + (start + i)[:, None] * out_token + head * HEAD_DIM + channel[None, :], states, mask=own)


def attend_alibi(q: Tensor, k: Tensor, v: Tensor, layout: Layout, slopes: Tensor) -> Tensor:
    """See `attention.Attend`; as many heads in k and v as in q, in both directions.

    float16, bfloat16 or float32, head_dim up to 128, channels side by side; scores, softmax and sums are float32.
    Raises ValueError for anything else.
    """
    tokens, heads, head_dim = q.shape
    if k.shape != q.shape or v.shape != q.shape:
        raise ValueError(f"k {list(k.shape)} and v {list(v.shape)} must have the shape of q, {list(q.shape)}")
    if head_dim > _LARGEST_HEAD_DIM or q.dtype not in _DTYPES:
        raise ValueError(f"head_dim {head_dim} as {q.dtype}: expected up to {_LARGEST_HEAD_DIM}, a 16- or 32-bit float")
    if any(part.stride(2) != 1 for part in (q, k, v)):
        raise ValueError("the channels of q, k and v must stand side by side in memory")
    out = q.new_empty(tokens, heads * head_dim)
    # The tiles of float32 take twice the shared memory, which a block of 64 keys and 128 channels would overfill.
    queries, keys = (32, 32) if q.dtype == torch.float32 else (64, 64)
    blocks = triton.cdiv(layout.max_seqlen, queries)
    rows = layout.cu_seqlens.shape[0] - 1
    # Triton launches on the current device. Blocks and rows share the first axis, the only one that goes beyond 65535.
    with torch.cuda.device_of(q):  # type: ignore[no-untyped-call]
        _forward[(blocks * rows, heads)](
            q,
            k,
            v,
            out,
            slopes * _LOG2_E,
            layout.cu_seqlens,
            head_dim**-0.5 * _LOG2_E,
            blocks,
            q.stride(0),
            q.stride(1),
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            out.stride(0),
            HEAD_DIM=head_dim,
            WIDTH=max(16, triton.next_power_of_2(head_dim)),
            QUERIES=queries,
            KEYS=keys,
        )
    return out
