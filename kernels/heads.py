"""Token states → the two outputs that bge-m3 has beside its dense vector; on the device, without a synchronisation.

With the last layer's states h_t of a text's tokens t = 0 … n-1:

    sparse    w_t = max(0, a·h_t + b); a token id's weight is the largest among its occurrences
    colbert   c_t = (W h_t + b) / ‖W h_t + b‖ for t = 1 … n-1: not the first token, but `</s>`

Source: Chen et al. 2024 (arXiv:2402.03216), and FlagEmbedding, the code that the model was published with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from embedserve.kernels.attention import Layout

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Head:
    """A linear over token states: weight [out, hidden], bias [out], on the device, in the model's dtype."""

    weight: Tensor
    bias: Tensor


def sparse_weights(states: Tensor, head: Head, layout: Layout) -> tuple[Tensor, Tensor]:
    """Each token's weight `max(0, a·h + b)`; `sparse_rows` makes texts of them.

    states is [tokens, hidden] of any float dtype, head has one output. Computed in float32 whatever the dtype: a weight
    in float16 has but three digits, and one product a token costs nothing. Returns (weights float32 [tokens], finite
    bool [rows]); a NaN or infinity marks its own row, also a negative one, which the maximum would hide.
    """
    scores = F.linear(states.float(), head.weight.float(), head.bias.float()).squeeze(1)
    return scores.relu(), _finite_rows(scores[:, None], layout.rows, layout)


def sparse_rows(ids: Ints, weights: Floats, cu_seqlens: Ints, dropped: Sequence[int]) -> list[tuple[Ints, Floats]]:
    """On the host, the lexical weights of each text: (token ids int32, ascending and once each; weights float32, > 0).

    ids int32 and weights float32 are [tokens], cu_seqlens int32 [rows + 1]. An id's weight is the largest among its
    occurrences; dropped are ids that never get one (`<s>`, `</s>`, padding, `<unk>`). Rows may come out empty.
    """
    rows = np.repeat(np.arange(len(cu_seqlens) - 1), np.diff(cu_seqlens))
    kept = (weights > 0) & ~np.isin(ids, dropped)
    rows, ids, weights = rows[kept], ids[kept], weights[kept]
    order = np.lexsort((ids, rows))
    rows, ids, weights = rows[order], ids[order], weights[order]
    first = np.ones(len(ids), dtype=bool)
    first[1:] = (rows[1:] != rows[:-1]) | (ids[1:] != ids[:-1])
    starts = np.flatnonzero(first)
    largest = np.maximum.reduceat(weights, starts) if len(starts) else weights
    ends = np.searchsorted(rows[starts], np.arange(1, len(cu_seqlens) - 1))
    return list(zip(np.split(ids[starts], ends), np.split(largest, ends), strict=True))


def colbert_vectors(states: Tensor, head: Head, layout: Layout) -> tuple[Tensor, Tensor]:
    """A unit vector for each token but the first of its row.

    states is [tokens, hidden], head [dim, hidden], of one float dtype, in which the product is computed; norms are in
    float32. Returns (vectors float32 [tokens - rows, dim], row after row; finite bool [rows]). A row of n tokens has
    n - 1 vectors. A zero vector stays zero; a NaN or infinity marks its own row.
    """
    rows = len(layout.cu_seqlens) - 1
    # The size is known on the host, so nobody waits for the device to count.
    kept = torch.nonzero_static(layout.positions, size=len(states) - rows).squeeze(1)
    vectors = F.linear(states.index_select(0, kept), head.weight, head.bias).float()
    finite = _finite_rows(vectors, layout.rows.index_select(0, kept), layout)
    return F.normalize(vectors, dim=1), finite


def _finite_rows(values: Tensor, rows: Tensor, layout: Layout) -> Tensor:
    """Return bool [rows], whether all values of a row are finite: values [tokens, any], in rows, int32 [tokens]."""
    bad = (~torch.isfinite(values)).any(dim=1).to(torch.int32)
    counts = torch.zeros(len(layout.cu_seqlens) - 1, dtype=torch.int32, device=values.device)
    return counts.index_add_(0, rows, bad) == 0
