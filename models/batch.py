"""PackedBatch: the token ids of many texts in one row, without padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from embedserve.kernels.attention import Layout
from embedserve.models.errors import BatchError

Ints = npt.NDArray[np.int32]
Element = TypeVar("Element", bound=np.generic)


@dataclass(frozen=True)
class PackedRows:
    """A batch on the host. `pack` sorts rows by length, so rows of one length stand together.

    ids, positions, rows: int32 [tokens], token id, index within its row, and row of each token.
    lengths: int32 [rows]. cu_seqlens: int32 [rows + 1], the first token of each row and the number of tokens.
    order: int64 [rows], row i of the batch is row order[i] of the caller; rows that `in_bucket` adds are nobody's.
    """

    ids: Ints
    positions: Ints
    rows: Ints
    lengths: Ints
    cu_seqlens: Ints
    order: npt.NDArray[np.int64]

    @classmethod
    def pack(cls, ids: Ints, lengths: Ints) -> PackedRows:
        """Build from the caller's ids [tokens], row after row, and lengths [rows].

        Raises BatchError if there is no row, a row is empty, or the lengths do not add up to the ids.
        """
        if ids.ndim != 1 or lengths.ndim != 1:
            raise BatchError(f"ids and lengths must have one axis each, not shapes {ids.shape} and {lengths.shape}")
        if not len(lengths):
            raise BatchError("a batch needs at least one text")
        if int(lengths.min()) < 1:
            raise BatchError(f"text {int(lengths.argmin())} of the batch has no tokens; each needs at least one")
        total = int(lengths.sum(dtype=np.int64))
        if total != len(ids):
            raise BatchError(f"the lengths add up to {total} tokens, but {len(ids)} token ids came")

        order = np.argsort(lengths, kind="stable")
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        sorted_lengths = lengths[order]
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(sorted_lengths, out=cu_seqlens[1:])
        rows = np.repeat(np.arange(len(lengths), dtype=np.int32), sorted_lengths)
        positions = np.arange(total, dtype=np.int32) - cu_seqlens[rows]
        return cls(
            ids=ids[starts[order][rows] + positions].astype(np.int32, copy=False),
            positions=positions,
            rows=rows,
            lengths=sorted_lengths.astype(np.int32, copy=False),
            cu_seqlens=cu_seqlens,
            order=order,
        )

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest row."""
        return int(self.lengths.max())

    def runs(self) -> tuple[tuple[int, int, int], ...]:
        """(first token, number of rows, tokens a row) of each stretch of rows of one length; empty rows are in none."""
        first = np.flatnonzero(np.diff(self.lengths, prepend=-1))
        counts = np.diff(first, append=len(self.lengths))
        lengths, starts = self.lengths[first], self.cu_seqlens[first]
        found = zip(starts.tolist(), counts.tolist(), lengths.tolist(), strict=True)
        return tuple(run for run in found if run[2])

    def in_bucket(self, tokens: int, rows: int) -> PackedRows:
        """The same batch with exactly so many tokens and rows, its own in front, for what runs in fixed shapes.

        Tokens of padding, all of id 0, are one more row, so no row of the batch sees them; the rows behind it are
        empty. Raises BatchError where the batch is larger, or has no row to spare for its padding.
        """
        own, padding = len(self.lengths), tokens - len(self.ids)
        if padding < 0 or own + (padding > 0) > rows:
            raise BatchError(f"{len(self.ids)} tokens in {own} rows do not fit into {tokens} in {rows}")
        cu_seqlens = np.full(rows + 1, tokens, dtype=np.int32)
        cu_seqlens[: own + 1] = self.cu_seqlens
        return PackedRows(
            ids=np.concatenate([self.ids, np.zeros(padding, dtype=np.int32)]),
            positions=np.concatenate([self.positions, np.arange(padding, dtype=np.int32)]),
            rows=np.concatenate([self.rows, np.full(padding, own, dtype=np.int32)]),
            lengths=np.diff(cu_seqlens),
            cu_seqlens=cu_seqlens,
            order=self.order,
        )

    def padded(self, pad_id: int) -> tuple[Ints, Ints]:
        """The same batch as (ids, mask), both int32 [rows, max_seqlen]: padded on the right, mask 1 on real tokens."""
        ids = np.full((len(self.lengths), self.max_seqlen), pad_id, dtype=np.int32)
        ids[self.rows, self.positions] = self.ids
        mask = np.zeros_like(ids)
        mask[self.rows, self.positions] = 1
        return ids, mask

    def only(self, kept: npt.NDArray[np.bool_]) -> tuple[PackedRows, npt.NDArray[np.int64]]:
        """The batch without some of its rows, and where the tokens that are left stood; kept: bool [rows]."""
        tokens = np.flatnonzero(kept[self.rows])
        lengths = self.lengths[kept]
        cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        part = PackedRows(
            ids=self.ids[tokens],
            positions=self.positions[tokens],
            rows=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
            lengths=lengths,
            cu_seqlens=cu_seqlens,
            order=self.order[kept],
        )
        return part, tokens

    def restore(self, values: npt.NDArray[Element]) -> npt.NDArray[Element]:
        """Bring per-row values [rows, ...] of the batch back into the caller's order."""
        restored = np.empty_like(values)
        restored[self.order] = values
        return restored


@dataclass(frozen=True)
class PackedBatch:
    """A batch on the device: what a backend runs.

    ids: int32 [tokens]. layout: where the rows lie, with positions. host: the same batch on the host.
    """

    ids: Tensor
    layout: Layout
    host: PackedRows

    @classmethod
    def on_cpu(cls, host: PackedRows) -> PackedBatch:
        """Wrap the host's arrays without a copy."""
        return cls.from_staged(
            host,
            ids=torch.from_numpy(host.ids),
            positions=torch.from_numpy(host.positions),
            rows=torch.from_numpy(host.rows),
            cu_seqlens=torch.from_numpy(host.cu_seqlens),
        )

    @classmethod
    def from_staged(
        cls, host: PackedRows, *, ids: Tensor, positions: Tensor, rows: Tensor, cu_seqlens: Tensor
    ) -> PackedBatch:
        """Put together from int32 tensors that are on the device already."""
        layout = Layout(
            cu_seqlens=cu_seqlens, rows=rows, positions=positions, max_seqlen=host.max_seqlen, runs=host.runs()
        )
        return cls(ids=ids, layout=layout, host=host)
