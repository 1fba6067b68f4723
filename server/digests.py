"""What makes two texts the same: all that their answer depends on, as one short key.

A cryptographic digest and not a hash of Python's, so that nobody can make two texts that are taken for the same.
BLAKE2b of 256 bits: 0.45 µs for a text of 16 tokens, 45 µs for one of 8192. The bytes themselves would cost 0.2 µs and
as much memory as the text, for as long as its result is kept.
"""

import hashlib
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

__all__ = ["Kind", "digests"]


class Kind(NamedTuple):
    """What answers depend on beside the content. `edition` tells engines of one name apart that may differ in what they
    have loaded; `outputs` see `arrays.output_bits`."""

    model: str
    edition: int
    modality: str
    dimensions: int
    outputs: int


def digests(kind: Kind, items: Iterable[memoryview]) -> list[bytes]:
    """The key of each item: its token ids or its pixels, as bytes."""
    start = _hasher(kind)
    keys = []
    for item in items:
        hasher = start.copy()
        hasher.update(item)
        keys.append(hasher.digest())
    return keys


@lru_cache(maxsize=1024)
def _hasher(kind: Kind) -> Any:
    """The state after the kind. It begins with its length, so no kind and content can look like another's."""
    facts = repr(tuple(kind)).encode()
    return hashlib.blake2b(b"%d:%b" % (len(facts), facts), digest_size=32)
