"""Named arrays: what is taken apart, packed, cut and put together again is what went in."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.server.arrays import ARRAYS, OUTPUTS, Rows, array_names, join, output_bits, pack, unpack, wants

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=9)


def rows_of(counts: list[int], dtype: str) -> Rows:
    return Rows(np.array(counts, dtype=np.int32), np.arange(sum(counts)).astype(dtype))


def listed(rows: Rows) -> list[list[float]]:
    return [rows[row].tolist() for row in range(len(rows))]


@given(st.data(), COUNTS)
def test_packed_arrays_come_back(data: st.DataObject, counts: list[int]) -> None:
    names = data.draw(st.lists(st.sampled_from(sorted(ARRAYS)), unique=True))
    arrays = {name: rows_of(counts, ARRAYS[name]) for name in names}
    found_names, buffers = pack(arrays)
    payload = b"head" + b"".join(buffers)
    found = unpack(found_names, len(counts), payload, start=4)
    assert {name: listed(rows) for name, rows in found.items()} == {name: listed(r) for name, r in arrays.items()}


@given(st.data(), COUNTS)
def test_parts_in_any_order_make_the_whole(data: st.DataObject, counts: list[int]) -> None:
    whole = rows_of(counts, "<f4")
    order = data.draw(st.permutations(range(len(counts))))
    cut = data.draw(st.integers(0, len(counts)))
    parts = []
    for positions in (order[:cut], order[cut:]):
        if positions:
            part = Rows.of([whole[row] for row in positions], "<f4")
            parts.append((np.array(positions, dtype=np.int32), {"dense": part}))
    assert listed(join("dense", len(counts), parts)) == listed(whole)


def test_a_part_without_an_array_has_it_empty() -> None:
    dense = rows_of([2, 2], "<f4")
    parts = [(np.array([0, 2], np.int32), {"dense": dense}), (np.array([1], np.int32), {})]
    assert listed(join("dense", 3, parts)) == [[0, 1], [], [2, 3]]
    assert listed(join("colbert", 3, parts)) == [[], [], []]


@given(COUNTS, st.data())
def test_rows_between_two(counts: list[int], data: st.DataObject) -> None:
    rows = rows_of(counts, "<i4")
    first = data.draw(st.integers(0, len(counts)))
    last = data.draw(st.integers(first, len(counts)))
    assert listed(rows.between(first, last)) == listed(rows)[first:last]


def test_a_matrix_is_cut_row_by_row() -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(3, 4)
    assert listed(Rows.of_matrix(matrix, np.array([4, 0, 2], np.int32))) == [[0, 1, 2, 3], [], [8, 9]]
    assert listed(Rows.of_matrix(matrix, np.array([4, 4, 4], np.int32))) == matrix.tolist()


@pytest.mark.parametrize(
    ("names", "payload"),
    [
        (["nonsense"], b"\0\0\0\0"),
        (["dense"], b"\xff\xff\xff\xff"),
        (["dense"], b"\1\0\0\0"),
        (["dense"], b"\0\0\0\0more"),
        (["dense"], b""),
    ],
    ids=["unknown name", "negative count", "too short", "too long", "empty"],
)
def test_nonsense_is_refused(names: list[str], payload: bytes) -> None:
    with pytest.raises(ValueError, match=r"array|buffer|bytes|offset"):
        unpack(names, 1, payload)


def test_outputs_as_bits() -> None:
    bits = np.array([output_bits(outputs) for outputs in (["dense"], ["sparse", "colbert"], list(OUTPUTS))], np.int32)
    assert wants(bits, "dense").tolist() == [True, False, True]
    assert wants(bits, "sparse").tolist() == [False, True, True]
    assert wants(bits, "colbert").tolist() == [False, True, True]


@given(st.data(), COUNTS)
def test_rows_are_taken_in_any_order_and_more_than_once(data: st.DataObject, counts: list[int]) -> None:
    whole = rows_of(counts, "<f4")
    index = data.draw(st.lists(st.integers(0, len(counts) - 1), min_size=1, max_size=12))
    assert listed(whole.take(np.array(index, np.int32))) == [whole[row].tolist() for row in index]


def test_rows_of_one_size_are_taken_as_rows_of_many_sizes_are() -> None:
    whole = rows_of([3] * 4, "<i4")
    assert listed(whole.take(np.array([3, 0, 0, 2]))) == [[9, 10, 11], [0, 1, 2], [0, 1, 2], [6, 7, 8]]
    empty = rows_of([0, 0], "<i4")
    assert listed(empty.take(np.array([1, 0, 1]))) == [[], [], []]


def test_neighbours_are_taken_without_a_copy() -> None:
    whole = rows_of([2, 3, 1], "<f4")
    assert np.shares_memory(whole.take(np.array([1, 2])).elements, whole.elements)


def test_outputs_name_their_arrays() -> None:
    assert array_names(output_bits(["colbert", "dense"])) == ["dense", "colbert"]
    assert array_names(output_bits(list(OUTPUTS))) == list(ARRAYS)
