"""Results: JSON lines, a line a measured cell, appended as soon as it is whole, so that an interruption keeps them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedserve.server.config import ConfigError

__all__ = ["FOLDER", "append", "check", "read", "spread"]

FOLDER = Path(__file__).resolve().parent / "results"
"""Where the project's own lie, in a checkout; not part of the installed package."""


def append(line: dict[str, Any], file: Path | str) -> None:
    """Write a line. file: "-" for nowhere. Raises ConfigError where it cannot be written."""
    _write(json.dumps(line) + "\n", file)


def check(file: Path | str) -> None:
    """Raise ConfigError where no line could be appended: better before an hour of measuring than after it."""
    _write("", file)


def _write(text: str, file: Path | str) -> None:
    if str(file) == "-":
        return
    try:
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {file}: {error.strerror}") from error


def read(file: Path | str) -> list[dict[str, Any]]:
    """All lines of a file. Raises ConfigError, with the number of the line that is no JSON object."""
    try:
        texts = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is not UTF-8 text") from None
    found = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}, line {number}: expected a JSON object ({error})") from None
        if not isinstance(line, dict):
            raise ConfigError(f"{file}, line {number}: expected a JSON object")
        found.append(line)
    return found


def spread(values: Sequence[float], digits: int) -> dict[str, float] | None:
    """Median, lowest and highest; None without a figure. NaN is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    named = {"median": statistics.median(known), "lowest": min(known), "highest": max(known)}
    return {name: round(value, digits) for name, value in named.items()}
