"""Results of texts that came before, so that no engine computes them again. Off unless `--cache-mib` is given.

It holds digests and results, never a text, and ends with the broker's process. What is in it came from an engine and
was finite. The least recently used goes first; the bound is one of bytes and counts what Python needs for an entry.
"""

from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["ENTRY_BYTES", "ResultCache"]

Result = Sequence[bytes]
"""The arrays of one text (see `arrays.array_names`), as bytes."""

ENTRY_BYTES = 272
"""Of an entry, beside its arrays: the key, the tuple, and the place in the table. With one array that makes 320; as
resident memory it was 250 to 318, by where the table stood between two doublings (43,000 to 350,000 entries, arrays of
128 to 4096 bytes)."""

ARRAY_BYTES = 48
"""Of each array, beside its bytes: their header, what malloc rounds up, and the place in the tuple."""


class ResultCache:
    """Digest → result, the least recently used dropped once `max_bytes` are passed."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self.evictions = 0
        self._entries: OrderedDict[bytes, Result] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: bytes) -> Result | None:
        """The result under a key, which counts as used now."""
        result = self._entries.get(key)
        if result is not None:
            self._entries.move_to_end(key)
        return result

    def put(self, key: bytes, result: Result) -> None:
        """Keep a result. One that is larger than the whole cache is not kept."""
        size = _size(result)
        if size > self.max_bytes:
            return
        if (old := self._entries.pop(key, None)) is not None:
            self.bytes -= _size(old)
        self._entries[key] = result
        self.bytes += size
        while self.bytes > self.max_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.bytes -= _size(dropped)
            self.evictions += 1


def _size(result: Result) -> int:
    return ENTRY_BYTES + sum(ARRAY_BYTES + len(array) for array in result)
