"""PackedRows: what is packed comes out again, in order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.models.errors import BatchError

texts = st.lists(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=12), min_size=1, max_size=20)


def pack(rows: list[list[int]]) -> PackedRows:
    ids = np.array([token for row in rows for token in row], dtype=np.int32)
    return PackedRows.pack(ids, np.array([len(row) for row in rows], dtype=np.int32))


@given(texts)
def test_every_text_is_there_once_in_its_own_row(rows: list[list[int]]) -> None:
    packed = pack(rows)
    split = np.split(packed.ids, packed.cu_seqlens[1:-1])
    assert [row.tolist() for row in split] == [rows[index] for index in packed.order]
    assert sorted(packed.order.tolist()) == list(range(len(rows)))
    assert packed.positions.tolist() == [index for row in split for index in range(len(row))]
    assert packed.rows.tolist() == [number for number, row in enumerate(split) for _ in row]


@given(texts)
def test_the_runs_cover_the_tokens_in_order(rows: list[list[int]]) -> None:
    packed = pack(rows)
    covered = []
    for start, count, length in packed.runs():
        assert start == sum(covered)
        covered += [length] * count
    assert covered == packed.lengths.tolist()
    assert len({length for _, _, length in packed.runs()}) == len(packed.runs())


@given(texts, st.integers(0, 20), st.integers(0, 5))
def test_a_bucket_holds_the_batch_in_front_and_its_padding_as_one_more_row(
    rows: list[list[int]], padding: int, spare: int
) -> None:
    packed = pack(rows)
    tokens, count = len(packed.ids) + padding, len(rows) + (padding > 0) + spare
    filled = packed.in_bucket(tokens, count)
    assert len(filled.ids) == len(filled.positions) == len(filled.rows) == tokens
    assert len(filled.lengths) == count == len(filled.cu_seqlens) - 1
    for name in ("ids", "positions", "rows", "lengths", "cu_seqlens"):
        own = getattr(packed, name)
        assert getattr(filled, name)[: len(own)].tolist() == own.tolist()
    assert filled.lengths[len(rows) :].tolist() == ([padding] if padding else []) + [0] * spare
    assert filled.cu_seqlens[len(rows) + 1 :].tolist() == [tokens] * (count - len(rows))
    assert filled.rows[len(packed.ids) :].tolist() == [len(rows)] * padding
    assert filled.positions[len(packed.ids) :].tolist() == list(range(padding))
    # All tokens are in a run, empty rows in none.
    assert [start for start, _, _ in filled.runs()] == np.cumsum(
        [0] + [rows * length for _, rows, length in filled.runs()]
    )[:-1].tolist()
    assert sum(count * length for _, count, length in filled.runs()) == tokens


@pytest.mark.parametrize(("tokens", "rows"), [(4, 9), (5, 1), (6, 2)])
def test_what_is_larger_than_a_bucket_is_refused(tokens: int, rows: int) -> None:
    with pytest.raises(BatchError, match=f"5 tokens in 2 rows do not fit into {tokens} in {rows}"):
        pack([[1, 2], [3, 4, 5]]).in_bucket(tokens, rows)


@given(texts)
def test_results_come_back_in_the_callers_order(rows: list[list[int]]) -> None:
    packed = pack(rows)
    sums = np.add.reduceat(packed.ids.astype(np.int64), packed.cu_seqlens[:-1])
    assert packed.restore(sums).tolist() == [sum(row) for row in rows]


@given(texts)
def test_the_padded_view_holds_the_same_tokens(rows: list[list[int]]) -> None:
    packed = pack(rows)
    ids, mask = packed.padded(pad_id=-1)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert [row[kept.astype(bool)].tolist() for row, kept in zip(ids, mask, strict=True)] == [
        rows[index] for index in packed.order
    ]
    assert (ids[mask == 0] == -1).all()


def test_the_cpu_batch_shares_the_hosts_memory() -> None:
    packed = pack([[1, 2], [3]])
    batch = PackedBatch.on_cpu(packed)
    assert batch.ids.tolist() == [3, 1, 2]
    assert batch.ids.data_ptr() == packed.ids.ctypes.data
    assert batch.layout.max_seqlen == 2


@pytest.mark.parametrize(
    ("ids", "lengths", "said"),
    [
        ([1, 2], [], "at least one text"),
        ([1, 2], [2, 0], "text 1"),
        ([1, 2], [3, -1], "text 1"),
        ([1, 2], [1], "1 tokens, but 2"),
        ([1, 2], [2, 2], "4 tokens, but 2"),
        ([[1, 2]], [2], "one axis"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(ids: list[int], lengths: list[int], said: str) -> None:
    with pytest.raises(BatchError, match=said):
        PackedRows.pack(np.array(ids, dtype=np.int32), np.array(lengths, dtype=np.int32))
