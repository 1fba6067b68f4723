"""Named arrays whose rows differ in length: what a batch's answer is made of, from the runner to the front end.

    dense            float32, a row's vector
    sparse_ids       int32, a row's token ids, ascending
    sparse_weights   float32, as many
    colbert          float32, a row's vectors, one behind the other

All elements take four bytes, so the broker can hand rows on without knowing what they mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ARRAYS", "OUTPUTS", "Rows", "array_names", "join", "output_bits", "pack", "unpack", "wants"]

ARRAYS = {"dense": "<f4", "sparse_ids": "<i4", "sparse_weights": "<f4", "colbert": "<f4"}
"""Name → dtype."""

OUTPUTS = {"dense": ("dense",), "sparse": ("sparse_ids", "sparse_weights"), "colbert": ("colbert",)}
"""What a request can ask for → the arrays that it is answered with."""

_BITS = {output: 1 << bit for bit, output in enumerate(OUTPUTS)}

Ints = npt.NDArray[np.int32]


def output_bits(outputs: Sequence[str]) -> int:
    """The outputs that a text is to have, as one number: bit i is the i-th of `OUTPUTS`."""
    return sum(_BITS[output] for output in outputs)


def array_names(bits: int) -> list[str]:
    """The arrays that a text with these outputs is answered with."""
    return [name for output, names in OUTPUTS.items() if bits & _BITS[output] for name in names]


def wants(bits: Ints, output: str) -> npt.NDArray[np.bool_]:
    """Which of several texts are to have an output."""
    wanted: npt.NDArray[np.bool_] = (bits & _BITS[output]) != 0
    return wanted


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of different lengths. `counts` int32 [rows]: elements of each; `elements` [sum of counts], row after row."""

    counts: Ints
    elements: npt.NDArray[Any]

    @cached_property
    def _offsets(self) -> npt.NDArray[np.int64]:
        offsets = np.zeros(len(self.counts) + 1, dtype=np.int64)
        np.cumsum(self.counts, out=offsets[1:])
        return offsets

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, row: int) -> npt.NDArray[Any]:
        return self.elements[self._offsets[row] : self._offsets[row + 1]]

    def between(self, first: int, last: int) -> Rows:
        """Rows `first` to `last - 1`, without a copy."""
        return Rows(self.counts[first:last], self.elements[self._offsets[first] : self._offsets[last]])

    def take(self, index: npt.NDArray[np.integer[Any]]) -> Rows:
        """The rows that `index` names, in its order; the same one may be named more than once. Neighbours in their own
        order are not copied."""
        if len(index) == 1 or bool((index[1:] - index[:-1] == 1).all()):
            return self.between(int(index[0]), int(index[-1]) + 1)
        counts = self.counts[index]
        columns = int(self.counts[0])
        if bool((self.counts == columns).all()):
            return Rows(counts, self.elements.reshape(len(self), columns)[index].reshape(-1))
        return Rows(counts, np.concatenate([self[row] for row in index]))

    @classmethod
    def of(cls, rows: Sequence[npt.NDArray[Any]], dtype: str) -> Rows:
        """Put together from one flat array a row."""
        counts = np.array([len(row) for row in rows], dtype=np.int32)
        return cls(counts, np.concatenate(rows).astype(dtype, copy=False) if len(rows) else np.empty(0, dtype))

    @classmethod
    def of_matrix(cls, matrix: npt.NDArray[np.float32], counts: Ints) -> Rows:
        """Row i of a matrix [rows, columns], cut to its first `counts[i]` columns."""
        columns = matrix.shape[1]
        if len(counts) and int(counts.min()) == columns:
            return cls(counts, matrix.reshape(-1))
        return cls(counts, matrix[np.arange(columns)[None, :] < counts[:, None]])


def join(name: str, rows: int, parts: Sequence[tuple[Ints, Mapping[str, Rows]]]) -> Rows:
    """One array of all `rows` rows from parts, each with the positions of its rows; a part without it has it empty."""
    found = [(positions, arrays[name]) for positions, arrays in parts if name in arrays]
    # Most requests fit into one batch.
    if len(found) == 1 and len(found[0][0]) == rows and _ascend(found[0][0]):
        return found[0][1]
    counts = np.zeros(rows, dtype=np.int32)
    if not found:
        return Rows(counts, np.empty(0, ARRAYS[name]))
    positions = np.concatenate([positions for positions, _ in found])
    together = Rows(
        np.concatenate([part.counts for _, part in found]), np.concatenate([part.elements for _, part in found])
    )
    counts[positions] = together.counts
    if _ascend(positions):
        return Rows(counts, together.elements)
    return Rows(counts, together.take(np.argsort(positions)).elements)


def _ascend(positions: Ints) -> bool:
    return len(positions) == 1 or bool((positions[:-1] < positions[1:]).all())


def pack(arrays: Mapping[str, Rows]) -> tuple[list[str], list[memoryview]]:
    """(names, payload): of each array its counts and its elements, as the bytes of a frame. Nothing is copied."""
    buffers: list[memoryview] = []
    for name, rows in arrays.items():
        elements = np.ascontiguousarray(rows.elements, dtype=ARRAYS[name])
        buffers += [np.ascontiguousarray(rows.counts, dtype="<i4").data.cast("B"), elements.data.cast("B")]
    return list(arrays), buffers


def unpack(names: Sequence[str], rows: int, payload: bytes, start: int = 0) -> dict[str, Rows]:
    """What `pack` made, read back from byte `start` of a payload without a copy. Raises ValueError for nonsense."""
    arrays = {}
    for name in names:
        counts = np.frombuffer(payload, dtype="<i4", count=rows, offset=start)
        start += 4 * rows
        total = int(counts.sum(dtype=np.int64))
        if name not in ARRAYS or (rows and int(counts.min()) < 0):
            raise ValueError(f"array {name!r} with {counts.min()} elements")
        arrays[name] = Rows(counts, np.frombuffer(payload, dtype=ARRAYS[name], count=total, offset=start))
        start += 4 * total
    if start != len(payload):
        raise ValueError(f"{len(payload) - start} bytes too many")
    return arrays
