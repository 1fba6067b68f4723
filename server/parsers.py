"""What the value of a setting may be. A parser takes a string, or what TOML has, and gives the value that is meant.

It raises ValueError with what was expected; who called it knows where the value stood and adds that.
"""

import ipaddress
import math
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

__all__ = [
    "ConfigError",
    "Parser",
    "base_url",
    "choice",
    "device",
    "environment_name",
    "flag",
    "network",
    "number",
    "path",
    "show",
    "text",
    "whole",
    "whole_numbers_or",
]

Parser = Callable[[Any], Any]


class ConfigError(Exception):
    """An option cannot be used. The message names it, what was expected and what came; the command exits with 2."""


def show(value: Any) -> str:
    """A value as an error message repeats it, shortened."""
    return textwrap.shorten(repr(value[0] if isinstance(value, list) and len(value) == 1 else value), 80)


def whole(minimum: int, maximum: int) -> Callable[[Any], int]:
    """A whole number between two others, themselves included."""
    expected = f"a whole number from {minimum} to {maximum}"

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not (isinstance(value, int) or re.fullmatch(r"\s*\d+\s*", str(value), re.ASCII)):
            raise ValueError(expected)
        number = int(value)
        if not minimum <= number <= maximum:
            raise ValueError(expected)
        return number

    return parse


def whole_numbers_or(word: str, minimum: int, maximum: int) -> Callable[[Any], tuple[int, ...] | str]:
    """A list of whole numbers, at least one; or a word that stands for all of them."""
    one = whole(minimum, maximum)

    def parse(value: Any) -> tuple[int, ...] | str:
        if value == word:
            return word
        if not isinstance(value, list) or not value:
            raise ValueError(f'"{word}", or a list of whole numbers')
        return tuple(map(one, value))

    return parse


def number(minimum: float, maximum: float = math.inf) -> Callable[[Any], float]:
    """A finite number between two others, themselves included; only from TOML."""

    def parse(value: Any) -> float:
        fits = not isinstance(value, bool) and isinstance(value, int | float) and minimum <= value <= maximum
        if not fits or math.isinf(value):
            raise ValueError(f"a number of at least {minimum}" + (f", at most {maximum}" * (maximum < math.inf)))
        return float(value)

    return parse


def choice(*choices: str) -> Callable[[Any], str]:
    """One of a few words."""

    def parse(value: Any) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(choices))
        return str(value)

    return parse


def text(value: Any) -> str:
    """Any text but the empty one."""
    if not isinstance(value, str) or not value:
        raise ValueError("a text")
    return value


def path(value: Any) -> Path:
    """A path; `~` is the home."""
    return Path(text(value)).expanduser()


def device(value: Any) -> str:
    """One device or several, as `--device` takes them."""
    devices = text(value).split(",")
    if not all(re.fullmatch(r"auto|cpu|cuda|cuda:\d+", device) for device in devices):
        raise ValueError("auto, cpu, cuda or cuda:N, or several of them separated by commas")
    return ",".join(devices)


def flag(value: Any) -> bool:
    """True or false, in the usual words."""
    words = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
    answer = words.get(str(value).lower())
    if answer is None:
        raise ValueError("true or false")
    return answer


def network(value: Any) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    """An address or a network of them."""
    try:
        return ipaddress.ip_network(text(value), strict=False)
    except ValueError:
        raise ValueError("an IP address or a network such as 10.0.0.0/8") from None


def base_url(value: Any) -> str:
    """An http or https URL to which `/embeddings` can be added."""
    expected = "a URL such as https://api.example.com/v1, without a user, a key or a query"
    try:
        parts = urlsplit(text(value))
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or parts.query or parts.fragment or re.search(r"[^!-~]", value):
        raise ValueError(expected)
    return str(value).rstrip("/")


def environment_name(value: Any) -> str:
    """The name of an environment variable."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text(value)):
        raise ValueError("the name of an environment variable, such as OPENAI_API_KEY, never the key itself")
    return str(value)
