"""The tables of the settings file: ``[model_settings]``, ``[aliases]`` and ``[upstreams]``, each with a name a row."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from embedserve.models.config import DimensionRange
from embedserve.server import parsers
from embedserve.server.parsers import ConfigError, Parser
from embedserve.server.upstreams import Upstream, closed_model

__all__ = ["Alias", "ModelSettings", "read_aliases", "read_model_settings", "read_upstreams"]

MAX_DIMENSIONS = 1 << 20


@dataclass(frozen=True)
class ModelSettings:
    """The operator's settings of one model, from the file's table ``[model_settings."<id>"]``.

    token_ids: what token arrays in `input` are: ``cl100k`` (decoded to text first) or ``native``, the model's own.
    dimensions: the size of a vector where a request does not say; None is the model's own.
    default_prompt_name: the prompt that is put before texts where a request does not say; None leaves it to the model's
        files.
    price: per million tokens, in `currency`; shown in /v1/embedding-models, nothing else.
    """

    token_ids: str = "cl100k"
    dimensions: int | None = None
    default_prompt_name: str | None = None
    price: float = 0.0
    currency: str = "USD"


@dataclass(frozen=True)
class Alias:
    """Another name for a model, from the file's table ``[aliases]``. `settings`: those of the fields of `ModelSettings`
    that differ from the model's."""

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)


_SETTINGS: Mapping[str, Parser] = {
    "token_ids": parsers.choice("cl100k", "native"),
    "dimensions": parsers.whole(1, MAX_DIMENSIONS),
    "default_prompt_name": parsers.text,
    "price": parsers.number(0),
    "currency": parsers.text,
}

_UPSTREAM: Mapping[str, Parser] = {
    "base_url": parsers.base_url,
    "key_env": parsers.environment_name,
    "model": parsers.text,
    "dimensions": parsers.whole(1, MAX_DIMENSIONS),
    "allowed_dimensions": parsers.whole_numbers_or("any", 1, MAX_DIMENSIONS),
    "max_tokens": parsers.whole(1, 100_000_000),
    "max_inputs": parsers.whole(1, 1_000_000),
    "encoding_format": parsers.choice("float", "base64"),
    "timeout_seconds": parsers.number(0.1, 3600),
    "connect_timeout": parsers.number(0.1, 3600),
    "request_timeout": parsers.number(0.1, 36_000),
    "retries": parsers.whole(0, 10),
}
_UPSTREAM_SETTINGS = ("token_ids", "price", "currency")


def read_model_settings(tables: Any, where: str) -> dict[str, dict[str, Any]]:
    """``[model_settings]``: by model id, what was given of the fields of `ModelSettings`. Raises `ConfigError`."""
    example = '[model_settings."BAAI/bge-m3"]'
    return {name: _read(table, _SETTINGS, f"{where}.{name}") for name, table in _rows(tables, where, example)}


def read_aliases(tables: Any, where: str) -> dict[str, Alias]:
    """``[aliases]``: by name, an id, or a table with `model` and settings. Raises `ConfigError`."""
    aliases = {}
    for name, row in _rows(tables, where, '"my-name" = "BAAI/bge-m3"', or_text=True):
        table = {"model": row} if isinstance(row, str) else row
        settings = _read(table, {"model": parsers.text, **_SETTINGS}, f"{where}.{name}")
        if "model" not in settings:
            raise ConfigError(f"{where}.{name}: expected `model`, the model that it is another name for")
        aliases[name] = Alias(settings.pop("model"), settings)
    return aliases


def read_upstreams(tables: Any, where: str) -> dict[str, Upstream]:
    """``[upstreams]``: by model name, filled up with what is known of the closed models. Raises `ConfigError`."""
    upstreams = {}
    for name, table in _rows(tables, where, '[upstreams."text-embedding-3-small"]'):
        here = f"{where}.{name}"
        shared = {key: _SETTINGS[key] for key in _UPSTREAM_SETTINGS}
        given = _read(table, {**_UPSTREAM, **shared}, here, secret="key_env")
        settings = {key: given.pop(key) for key in shared if key in given}
        known = closed_model(name)
        if known is None and not {"base_url", "dimensions"} <= set(given):
            raise ConfigError(f"{here}: expected base_url and dimensions, since nothing is known of this model")
        size = known.dimensions if known else given["dimensions"]
        if given.get("dimensions", size) != size:
            raise ConfigError(
                f"{here}: dimensions: expected {size}, the full size of this model's vectors, not "
                f"{given['dimensions']}. The size for requests that do not say is `dimensions` of "
                f'[model_settings."{name}"]'
            )
        if "allowed_dimensions" in given:
            given["matryoshka"] = _range(given.pop("allowed_dimensions"), size, here)
        call = given.get("timeout_seconds", Upstream.timeout_seconds)
        whole = given.setdefault("request_timeout", max(call, Upstream.request_timeout))
        if whole < call:
            raise ConfigError(f"{here}: request_timeout: expected at least timeout_seconds, {call:g}, not {whole:g}")
        if known is None:
            upstreams[name] = Upstream(**{"model": name, **given, "settings": settings})
        else:
            upstreams[name] = dataclasses.replace(known, **given, settings={**known.settings, **settings})
    return upstreams


def _rows(tables: Any, where: str, example: str, *, or_text: bool = False) -> Iterator[tuple[str, Any]]:
    """The rows of a table by their names. Raises `ConfigError`."""
    kinds = (dict, str) if or_text else (dict,)
    if not isinstance(tables, dict) or not all(isinstance(row, kinds) for row in tables.values()):
        raise ConfigError(f"{where}: expected {'lines' if or_text else 'tables'} such as {example}")
    seen: dict[str, str] = {}
    for name, row in tables.items():
        if not (name and name.isascii() and name.isprintable()):
            raise ConfigError(f"{where}: {name!r} cannot be a model's name, which goes into headers: use ASCII")
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise ConfigError(f"{where}: {name} and {other} are one name: upper and lower case are not told apart")
        yield name, row


def _read(table: Mapping[str, Any], known: Mapping[str, Parser], where: str, *, secret: str = "") -> dict[str, Any]:
    """A row's values, parsed. A wrong value of the key `secret` is not repeated."""
    values = {}
    for key, value in table.items():
        if key not in known:
            raise ConfigError(f"{where}: there is no setting {key!r}; there are {', '.join(known)}")
        try:
            values[key] = known[key](value)
        except ValueError as error:
            came = "" if key == secret else f", not {parsers.show(value)}"
            raise ConfigError(f"{where}: {key}: expected {error}{came}") from None
    return values


def _range(allowed: tuple[int, ...] | str, size: int, where: str) -> DimensionRange:
    if isinstance(allowed, str):
        return DimensionRange(1, size)
    if max(allowed) > size:
        raise ConfigError(f"{where}: allowed_dimensions: expected sizes of at most {size}, its dimensions")
    return DimensionRange(min(allowed), max(allowed), tuple(sorted(allowed)))
