"""Log lines: readable on a terminal, JSON otherwise. Never a text, never a key."""

import logging
import sys
import time
import traceback
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

__all__ = ["LOG_FORMATS", "set_up"]

LOG_FORMATS = ("auto", "text", "json")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _fields(record: logging.LogRecord) -> Mapping[str, Any]:
    """What a caller passed as `extra`."""
    return {name: value for name, value in vars(record).items() if name not in _STANDARD}


@lru_cache(maxsize=1)
def _utc(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message and the fields of the call."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        line: dict[str, Any] = {
            "time": f"{_utc(int(record.created))}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = _traceback(record)
        return orjson.dumps(line, default=str).decode()


class TextFormatter(logging.Formatter):
    """Time, level, message, then ``name=value`` for the fields of the call."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname:<7} {record.getMessage()}"
        for name, value in _fields(record).items():
            # A client chose some of them, and must not write lines of its own, or to the terminal.
            line += f" {name}={value if str(value).isprintable() else ascii(value)}"
        if record.exc_info:
            line += "\n" + _traceback(record)
        return line


def _traceback(record: logging.LogRecord) -> str:
    """Where it happened and of what type, without the exception's message: that may quote what a client sent."""
    assert record.exc_info is not None
    kind, _, trace = record.exc_info
    name = kind.__name__ if kind is not None else "?"
    return "".join(traceback.format_tb(trace)) + name


def set_up(log_format: str, level: str) -> None:
    """Send all log lines of this process to standard error. `log_format` is one of `LOG_FORMATS`."""
    if log_format == "auto":
        log_format = "text" if sys.stderr.isatty() else "json"
    # What no line of ours shows is not looked for: 3 us of the 17 that a line costs.
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    handler.setFormatter(TextFormatter() if log_format == "text" else JSONFormatter())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # One line a request is ours; uvicorn's own would repeat it.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").setLevel("WARNING")
