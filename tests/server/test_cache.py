"""The result cache keeps what was used last, within its bytes."""

import tracemalloc

import numpy as np
import pytest

from embedserve.server.cache import ResultCache
from embedserve.server.digests import Kind, digests

VECTOR = (b"v" * 1536,)


def keys(count: int, first: int = 0) -> list[bytes]:
    return [number.to_bytes(32, "little") for number in range(first, first + count)]


def test_what_was_used_last_stays() -> None:
    one, two, three, four = keys(4)
    cache = ResultCache(10_000)
    cache.put(one, VECTOR)
    room = cache.bytes
    cache = ResultCache(3 * room)
    for key in (one, two, three):
        cache.put(key, VECTOR)
    assert cache.get(one) == VECTOR
    cache.put(four, VECTOR)
    assert [cache.get(key) is not None for key in (one, two, three, four)] == [True, False, True, True]
    assert (len(cache), cache.bytes, cache.evictions) == (3, 3 * room, 1)


def test_a_result_that_comes_again_is_counted_once() -> None:
    cache = ResultCache(10_000)
    cache.put(b"k" * 32, VECTOR)
    room = cache.bytes
    cache.put(b"k" * 32, VECTOR)
    assert (len(cache), cache.bytes, cache.evictions) == (1, room, 0)


def test_a_result_that_is_larger_than_all_drives_nothing_out() -> None:
    cache = ResultCache(10_000)
    cache.put(b"k" * 32, VECTOR)
    cache.put(b"large".ljust(32), (b"x" * 10_000,))
    assert cache.get(b"k" * 32) == VECTOR
    assert len(cache) == 1


@pytest.mark.parametrize(("size", "arrays"), [(128, 1), (1536, 1), (4096, 1), (400, 3)])
def test_its_memory_stays_below_the_bound_whatever_comes(size: int, arrays: int) -> None:
    bound = 4 << 20
    cache = ResultCache(bound)
    row = np.zeros(size, np.uint8)
    tracemalloc.start()
    try:
        for number in range(60_000):
            cache.put(number.to_bytes(32, "little"), tuple(row.tobytes() for _ in range(arrays)))
            if number % 1000 == 0:
                assert tracemalloc.get_traced_memory()[0] < bound, number
        assert cache.evictions > 0
        assert bound * 0.95 < cache.bytes <= bound
    finally:
        tracemalloc.stop()


def test_a_key_depends_on_all_that_the_answer_depends_on() -> None:
    text = memoryview(np.array([5, 6, 7], "<i4").tobytes())
    kind = Kind("m", 1, "text", 384, 1)
    others = [
        kind._replace(model="n"),
        kind._replace(edition=2),
        kind._replace(modality="image"),
        kind._replace(dimensions=256),
        kind._replace(outputs=3),
    ]
    [key] = digests(kind, [text])
    assert digests(kind, [text, text]) == [key, key]
    found = {key, *(digests(other, [text])[0] for other in others), *digests(kind, [text[:4], text[4:], text[:8]])}
    assert len(found) == 1 + len(others) + 3
