"""JSON files of a checkpoint: typed access to their fields, errors that name file and field. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from embedserve.models.errors import CheckpointError
from embedserve.models.files import present, read_file

# Larger than any configuration of a model, smaller than a weight file that got a wrong name.
_MAX_BYTES = 8 << 20


class JsonFile:
    """One JSON object of a checkpoint, or an object within it: typed access, errors that name file and field.

    Every method raises CheckpointError where the file does not hold what is asked for.
    """

    def __init__(self, path: Path, values: dict[str, Any], within: str = "") -> None:
        """within: the dotted name of the object that values are, with a dot at the end; empty for the whole file."""
        self.path = path
        self.values = values
        self._within = within

    @classmethod
    def read(cls, path: Path) -> JsonFile:
        """Read a file."""
        values = load_json(path)
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: expected a JSON object, found {kind_of(values)}; copy the file again")
        return cls(path, values)

    @classmethod
    def read_optional(cls, path: Path) -> JsonFile:
        """Read a file; one that is not there counts as an empty object."""
        return cls.read(path) if present(path) else cls(path, {})

    def fail(self, name: str, found: object, expected: str) -> NoReturn:
        """Raise CheckpointError about a field."""
        raise CheckpointError(f"{self.path}: field {self._within + name!r} is {_shown(found)}; {expected}")

    def get(self, name: str) -> Any:
        """The value, None also where it is absent."""
        return self.values.get(name)

    def child(self, name: str) -> JsonFile:
        """The object that a field holds; an empty one where it is absent or null."""
        value = self.values.get(name)
        if value is None:
            value = {}
        if not isinstance(value, dict):
            self.fail(name, value, "expected an object")
        return JsonFile(self.path, value, f"{self._within}{name}.")

    def integer(self, name: str, lowest: int, highest: int, default: int | None = None) -> int:
        """An integer between two bounds. A field that is absent has the default; without one it is an error."""
        value = self.values.get(name, default)
        if value is None:
            raise CheckpointError(f"{self.path}: field {self._within + name!r} is missing; expected an integer")
        if not is_integer(value) or not lowest <= value <= highest:
            self.fail(name, value, f"expected an integer from {lowest} to {highest}")
        return int(value)

    def number(self, name: str, above: float, below: float, default: float) -> float:
        """A number strictly between two bounds; the default where the field is absent or null."""
        value = self.values.get(name)
        if value is None:
            return default
        # NaN fails every comparison.
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < below:
            self.fail(name, value, f"expected a number above {above:g} and below {below:g}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """True or false; the default where the field is absent."""
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, value, "expected true or false")
        return value

    def string(self, name: str) -> str | None:
        """A string; None where the field is absent or null."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            self.fail(name, value, "expected a string")
        return value

    def refuse(self, name: str, neutral: Sequence[object], remedy: str) -> None:
        """Fail unless the field is absent, null, or one of the values that change nothing."""
        value = self.values.get(name)
        # By type too: 0 == False in Python, and a wrong type is a mistake elsewhere.
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            self.fail(name, value, remedy)

    def refuse_unknown(self, known: frozenset[str], remedy: str) -> None:
        """Fail if there is a field that is not among the known ones."""
        if unknown := sorted(set(self.values) - known):
            self.fail(unknown[0], self.values[unknown[0]], remedy)


def load_json(path: Path) -> Any:
    """Parse a file of at most 8 MiB. Raises CheckpointError."""
    raw = read_file(path, _MAX_BYTES)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}); copy the file again") from error


def is_integer(value: object) -> bool:
    """Whether a value of a JSON file is an integer, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def kind_of(value: object) -> str:
    """What a value of a JSON file is, for a message."""
    return {dict: "an object", list: "a list", str: "a string", type(None): "null"}.get(type(value), repr(value)[:40])


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
