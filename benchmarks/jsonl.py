"""Results: JSON lines, a line a measured cell, appended as soon as it is whole, so that an interruption keeps them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["FOLDER", "append", "read", "spread"]

FOLDER = Path(__file__).resolve().parent / "results"
"""Where the project's own lie, in a checkout; not part of the installed package."""


def append(line: dict[str, Any], file: Path | str) -> None:
    """Write a line, complete or not at all. file: "-" for nowhere. Raises OSError."""
    if str(file) != "-":
        with Path(file).open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")


def read(file: Path | str) -> list[dict[str, Any]]:
    """All lines of a file. Raises OSError, and ValueError with the number of the line that is none."""
    found = []
    for number, text in enumerate(Path(file).read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: expected a JSON object ({error})") from None
        if not isinstance(line, dict):
            raise ValueError(f"{file}, line {number}: expected a JSON object")
        found.append(line)
    return found


def spread(values: Sequence[float], digits: int) -> dict[str, float] | None:
    """Median, lowest and highest; None without a figure. NaN is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    named = {"median": statistics.median(known), "lowest": min(known), "highest": max(known)}
    return {name: round(value, digits) for name, value in named.items()}
