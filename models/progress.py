"""How far a long command is: one line on a terminal that rewrites itself, and nothing anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_SECONDS_BETWEEN = 0.1


class Progress:
    """Counts bytes of `total` under a heading, on standard error unless told otherwise; a context manager."""

    def __init__(self, heading: str, total: int, stream: TextIO | None = None) -> None:
        self.heading = heading
        self.total = total
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._shown = self._stream.isatty()
        self._next = 0.0

    def __enter__(self) -> Progress:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal an empty line."""
        if self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def advance(self, count: int) -> None:
        """Count `count` more bytes as done."""
        self.done += count
        if self._shown and (now := time.monotonic()) >= self._next:
            self._next = now + _SECONDS_BETWEEN
            percent = min(100, 100 * self.done // max(1, self.total))
            self._stream.write(f"\r\x1b[K{self.heading}  {percent:3} %  {size(self.done)} of {size(self.total)}")
            self._stream.flush()


def size(count: int) -> str:
    """A number of bytes for people: 1234567 is 1.2 MB."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
