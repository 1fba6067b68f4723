"""Token states → one vector a text: pool, cut (Matryoshka), normalise, check; on the device, without a synchronisation.

`pool_and_finish` is all of it, and the reference of `pooling_triton`'s, which reads the states once and writes vectors.
All in float32, whatever the model's dtype: a mean over hundreds of float16 states loses digits otherwise.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

POOLINGS = ("cls", "mean", "max", "last")

# torch.nn.functional.normalize's: a zero vector stays zero instead of becoming NaN.
SMALLEST_NORM = 1e-12


class Pool(Protocol):
    """Token states → finished vectors, in one go."""

    def __call__(
        self, states: Tensor, cu_seqlens: Tensor, mode: str, dimensions: Tensor | None, *, normalize: bool
    ) -> tuple[Tensor, Tensor]:
        """Return `finish(pool(states, cu_seqlens, mode), dimensions, normalize)`: see both, for their errors as well.

        An empty row gives zeros, which are finite.
        """
        ...


def pool(states: Tensor, cu_seqlens: Tensor, mode: str) -> Tensor:
    """Reduce packed token states to one vector a row.

    With the n tokens t of a row: "cls" is the first state, "last" the last, "mean" `Σ h_t / n`, "max" `max_t h_t` by
    component; zeros for a row of no tokens.
    states is [tokens, hidden] of any float dtype, at least one token, cu_seqlens int32 [rows + 1]. Returns float32
    [rows, hidden]. Raises ValueError for another mode.
    """
    check_pooling(mode)
    if mode in ("mean", "max"):
        # unsafe: the checks read the offsets on the host and would wait for the device.
        pooled = torch.segment_reduce(states.float(), mode, offsets=cu_seqlens.long(), axis=0, unsafe=True)
    else:
        index = cu_seqlens[:-1] if mode == "cls" else cu_seqlens[1:] - 1
        # An empty row at either end would point beside the states.
        pooled = states.index_select(0, index.clamp(0, len(states) - 1)).float()
    return pooled.masked_fill_((cu_seqlens[1:] == cu_seqlens[:-1])[:, None], 0.0)


def check_pooling(mode: str) -> None:
    """Raise ValueError for a mode that is none of `POOLINGS`."""
    if mode not in POOLINGS:
        raise ValueError(f"unknown pooling {mode!r}; expected one of {', '.join(POOLINGS)}")


def finish(pooled: Tensor, dimensions: Tensor | None, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Cut each row to its own dimension, then bring it to unit length, then look whether it is finite.

    `v_j = p_j for j < dimensions[i], else 0`, then `v / max(‖v‖₂, 1e-12)` if normalize: truncated first, so a shortened
    vector has unit length again (Kusupati et al. 2022, arXiv:2205.13147).

    pooled is float32 [rows, hidden]; dimensions int32 [rows], or None where no row is cut. Returns (vectors float32
    [rows, hidden], finite bool [rows]); columns from dimensions[i] on are 0. A NaN or infinity makes only its own row
    not finite, and only if it lies within the row's dimensions.
    """
    vectors = pooled
    if dimensions is not None:
        columns = torch.arange(pooled.shape[1], device=pooled.device)
        vectors = pooled.masked_fill(columns[None, :] >= dimensions[:, None], 0.0)
    if normalize:
        norms = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        vectors = vectors / norms.clamp_min(SMALLEST_NORM)
    return vectors, torch.isfinite(vectors).all(dim=1)


def pool_and_finish(
    states: Tensor, cu_seqlens: Tensor, mode: str, dimensions: Tensor | None, *, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The reference, and the CPU's: see `Pool`."""
    return finish(pool(states, cu_seqlens, mode), dimensions, normalize=normalize)
