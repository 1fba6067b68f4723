"""How far a measurement is: a bar on a terminal, a line a step elsewhere, on standard error."""

from __future__ import annotations

import signal
import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

__all__ = ["Progress"]

_WIDTH = 24


class Progress:
    """Counts steps of `total`; a context manager, which clears its line at the end.

    total: expected seconds, or any other measure of the work; it may be wrong, the bar then stays full.
    """

    def __init__(self, total: float, stream: TextIO | None = None) -> None:
        self.total, self.done = total, 0.0
        self._started = time.monotonic()
        self._stream = sys.stderr if stream is None else stream
        self._bar = self._stream.isatty()
        self._interrupted = False
        self._before: Any = None

    def __enter__(self) -> Progress:
        """From now on Ctrl-C holds: where the exception that it raises gets lost, the next step raises it again."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def _interrupt(self, *_: object) -> None:
        self._interrupted = True
        raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal an empty line."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
        self._clear()

    def step(self, text: str, done: float = 0.0) -> None:
        """What is done now, and how much was done since the last call."""
        if self._interrupted:
            raise KeyboardInterrupt
        self.done = min(self.total, self.done + done)
        share = self.done / self.total if self.total else 0.0
        elapsed = time.monotonic() - self._started
        if self._bar:
            filled = round(share * _WIDTH)
            left = f", {_clock(elapsed / share - elapsed)} left" if share > 0.02 else ""
            bar = "█" * filled + "░" * (_WIDTH - filled)
            self._stream.write(f"\r\x1b[K{bar} {share:4.0%}  {_clock(elapsed)}{left}  {text}"[:160])
        elif text:
            self._stream.write(f"{share:4.0%}  {_clock(elapsed)}  {text}\n")
        self._stream.flush()

    def print(self, text: str) -> None:
        """A result, on standard output, above the bar."""
        self._clear()
        print(text, flush=True)

    def _clear(self) -> None:
        if self._bar:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"
