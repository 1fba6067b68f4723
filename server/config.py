"""The server's settings: one frozen dataclass, filled from flags, environment, a TOML file and defaults, in that order.

Every field below is an option of ``embedserve serve``: ``rate_limit`` is the flag ``--rate-limit``, the variable
``EMBEDSERVE_RATE_LIMIT`` and the key ``rate_limit`` of the file. Its metadata holds the help and the parser.
"""

import argparse
import dataclasses
import ipaddress
import os
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embedserve.server import parsers
from embedserve.server.log import LOG_FORMATS
from embedserve.server.parsers import ConfigError, Parser
from embedserve.server.tables import Alias, ModelSettings, read_aliases, read_model_settings, read_upstreams
from embedserve.server.upstreams import Upstream

__all__ = ["APIKey", "Alias", "ConfigError", "ModelSettings", "ServerConfig", "Upstream", "add_options", "load"]

ENV_PREFIX = "EMBEDSERVE_"
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class APIKey:
    """Who may call. An `internal` key is never rate-limited. The secret is never printed."""

    name: str
    secret: str = field(repr=False)
    internal: bool = False


def _key(*, internal: bool) -> Callable[[Any], APIKey]:
    def parse(value: Any) -> APIKey:
        name, equals, secret = parsers.text(value).partition("=")
        # The message must not repeat the value: it holds the key.
        secret = secret.strip()
        if not (equals and re.fullmatch(r"[\w.-]+", name) and secret and secret.isascii() and secret.isprintable()):
            raise ValueError("NAME=KEY, the name of letters, digits, '.', '_' and '-', the key printable ASCII")
        return APIKey(name, secret, internal)

    return parse


# ------------------------------------------------------------------------------------------------------------- fields


def _option(
    default: Any,
    parse: Parser,
    help: str,  # noqa: A002 - argparse's own word
    *,
    metavar: str = "",
    group: str = "Server",
    secret: bool = False,
) -> Any:
    metadata = {"parse": parse, "help": help, "metavar": metavar, "group": group, "secret": secret}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ServerConfig:
    """Everything that can be set. A tuple may be given more than once, or with commas in the environment."""

    model: tuple[str, ...] = _option(
        (DEFAULT_MODEL,),
        parsers.text,
        "a model to serve: an id of the catalogue (see `embedserve models`), a checkpoint folder, or NAME=FOLDER to "
        "serve the folder under a name; may be given several times; none where the file has upstreams and no model",
        metavar="ID|FOLDER",
        group="Models",
    )
    models_dir: Path | None = _option(
        None,
        parsers.path,
        "where model folders lie: DIR/<organisation>/<name>, DIR/<name>, or a Hugging Face cache",
        metavar="DIR",
        group="Models",
    )
    device: str = _option(
        "auto",
        parsers.device,
        "auto (the first GPU, else the CPU), cpu, cuda or cuda:N; with commas, an engine on each: cuda:0,cuda:1",
        metavar="DEVICE",
        group="Models",
    )
    backend: str = _option(
        "auto",
        parsers.choice("auto", "native", "onnx", "transformers"),
        "what computes: native is our own packed code, onnx the graph in the model's folder, transformers the class of "
        "the library; auto is native for the families that we have, else transformers",
        metavar="auto|native|onnx|transformers",
        group="Models",
    )
    dtype: str = _option(
        "auto",
        parsers.choice("auto", "float32", "float16", "bfloat16", "int8"),
        "auto is float32 on the CPU, and on a GPU float16, or bfloat16 for models that overflow float16; bfloat16 and "
        "int8 on a CPU that has them in hardware: faster, less exact, how much is printed at start",
        metavar="auto|float32|float16|bfloat16|int8",
        group="Models",
    )
    threads: int = _option(
        0, parsers.whole(0, 1024), "CPU threads of an engine; 0 chooses", metavar="N", group="Models"
    )
    max_batch_tokens: int = _option(
        0, parsers.whole(0, 10_000_000), "tokens in a batch; 0 chooses by device", metavar="N", group="Models"
    )
    host: str = _option("127.0.0.1", parsers.text, "the address to listen on", metavar="HOST")
    port: int = _option(8000, parsers.whole(0, 65535), "the port; 0 takes a free one and prints it", metavar="PORT")
    front_ends: int = _option(
        0,
        parsers.whole(0, 256),
        "HTTP processes; 0 chooses: 1 on a CPU, one for each 4 cores beside a GPU",
        metavar="N",
    )
    shutdown_seconds: int = _option(
        30, parsers.whole(1, 86400), "how long requests in flight may take to finish at the end", metavar="SECONDS"
    )
    api_key: tuple[APIKey, ...] = _option(
        (),
        _key(internal=False),
        "a key that may call, and the name it goes by in the logs; for trying out, since a process list shows it; "
        "without any key the server is open",
        metavar="NAME=KEY",
        group="Access",
        secret=True,
    )
    internal_key: tuple[APIKey, ...] = _option(
        (), _key(internal=True), "the same, and never rate-limited", metavar="NAME=KEY", group="Access", secret=True
    )
    api_keys_file: Path | None = _option(
        None,
        parsers.path,
        "a file with a key a line, NAME=KEY or `internal NAME=KEY`; # starts a comment",
        metavar="FILE",
        group="Access",
    )
    rate_limit: int = _option(
        100,
        parsers.whole(0, 1_000_000),
        "requests a second and client address; 0 is no limit",
        metavar="N",
        group="Access",
    )
    trusted_proxy: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = _option(
        (),
        parsers.network,
        "an address or network whose X-Forwarded-For counts as the client's address",
        metavar="NETWORK",
        group="Access",
    )
    closed_discovery: bool = _option(
        False, parsers.flag, "ask for a key on the lists of models too", metavar="true|false", group="Access"
    )
    max_inputs: int = _option(2048, parsers.whole(1, 1_000_000), "texts in a request", metavar="N", group="Limits")
    max_request_tokens: int = _option(
        300_000, parsers.whole(1, 100_000_000), "tokens in a request", metavar="N", group="Limits"
    )
    max_body_bytes: int = _option(
        32 << 20, parsers.whole(1024, 1 << 30), "bytes of a body, also once unpacked", metavar="N", group="Limits"
    )
    max_queue_tokens: int = _option(
        1_000_000,
        parsers.whole(1, 1 << 40),
        "tokens that may wait; past it requests get a 503. When none wait, any request is taken",
        metavar="N",
        group="Limits",
    )
    cache_mib: int = _option(
        0,
        parsers.whole(0, 1 << 20),
        "MiB of results to keep, so that a text that came before is answered without an engine; 0 keeps none",
        metavar="N",
        group="Limits",
    )
    cl100k_file: Path | None = _option(
        None,
        parsers.path,
        "the cl100k_base.tiktoken vocabulary, for clients that send token arrays; looked for in TIKTOKEN_CACHE_DIR "
        "and in the installed packages litellm and llama-index-core otherwise",
        metavar="FILE",
        group="Models",
    )
    log_format: str = _option(
        "auto", parsers.choice(*LOG_FORMATS), "auto is text on a terminal and JSON otherwise", metavar="auto|text|json"
    )
    log_level: str = _option(
        "info", parsers.choice("debug", "info", "warning", "error"), "the least level to log", metavar="LEVEL"
    )
    model_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By model id or alias, what is set of the fields of `ModelSettings`. These three are only in the file."""
    aliases: Mapping[str, Alias] = field(default_factory=dict)
    """By name."""
    upstreams: Mapping[str, Upstream] = field(default_factory=dict)
    """By the name under which requests are relayed there."""

    @property
    def keys(self) -> tuple[APIKey, ...]:
        """All keys, in no matter which place they stand."""
        return self.api_key + self.internal_key


_OPTIONS = {f.name: f for f in dataclasses.fields(ServerConfig) if f.metadata}


def _is_list(option: dataclasses.Field[Any]) -> bool:
    return isinstance(option.default, tuple)


# -------------------------------------------------------------------------------------------------------------- flags


def add_options(parser: argparse.ArgumentParser, names: Sequence[str] | None = None) -> None:
    """Give a parser the flags of the options (all, or `names`), and `--config`."""
    parser.add_argument(
        "--config", metavar="FILE", help=f"a TOML file with any of these options as keys [{ENV_PREFIX}CONFIG]"
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, option in _OPTIONS.items():
        if names is not None and name not in names:
            continue
        title = option.metadata["group"]
        group = groups.get(title) or groups.setdefault(title, parser.add_argument_group(title))
        default = DEFAULT_MODEL if name == "model" else option.default
        shown = f"; default {str(default).lower() if isinstance(default, bool) else default}"
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            metavar=option.metadata["metavar"],
            action="append" if _is_list(option) else "store",
            help=f"{option.metadata['help']} [{ENV_PREFIX}{name.upper()}{shown if default not in ((), None) else ''}]",
        )


def _parse(option: dataclasses.Field[Any], values: Any, where: str) -> Any:
    """One option's value from the source that `where` names. A list of values stays one."""
    parse = option.metadata["parse"]
    try:
        if not _is_list(option):
            return parse(values)
        return tuple(parse(value) for value in (values if isinstance(values, list) else [values]))
    except ValueError as error:
        came = "" if option.metadata["secret"] else f", not {parsers.show(values)}"
        raise ConfigError(f"{where}: expected {error}{came}") from None


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def load(flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """The settings: flags over environment over file over defaults. Raises `ConfigError`.

    The default model is for those who configured nothing: with upstreams alone, nothing runs here.
    """
    chosen: dict[str, Any] = {}
    path = flags.get("config") or environment.get(f"{ENV_PREFIX}CONFIG")
    if path:
        chosen |= _from_file(Path(path).expanduser())
    for name, option in _OPTIONS.items():
        variable = f"{ENV_PREFIX}{name.upper()}"
        text = environment.get(variable)
        # Kubernetes sets EMBEDSERVE_PORT=tcp://… in every pod beside a service called embedserve.
        if text and not (name == "port" and text.startswith("tcp://")):
            chosen[name] = _parse(option, _split(text) if _is_list(option) else text, variable)
        if flags.get(name) is not None:
            chosen[name] = _parse(option, flags[name], "--" + name.replace("_", "-"))
    if chosen.get("api_keys_file"):
        for key in _keys_of(chosen["api_keys_file"]):
            name = "internal_key" if key.internal else "api_key"
            chosen[name] = (*chosen.get(name, ()), key)
    if chosen.get("upstreams"):
        chosen.setdefault("model", ())
    config = ServerConfig(**chosen)
    _refuse_twice("key name", [key.name for key in config.keys])
    return config


def _refuse_twice(what: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the {what} {name!r} is given twice")


def _from_file(path: Path) -> dict[str, Any]:
    try:
        content = tomllib.loads(_read(path, "--config"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    chosen: dict[str, Any] = {}
    for name, value in content.items():
        where = f"{path}: {name}"
        if name == "model_settings":
            chosen[name] = read_model_settings(value, where)
        elif name == "aliases":
            chosen[name] = read_aliases(value, where)
        elif name == "upstreams":
            chosen[name] = read_upstreams(value, where)
        elif name in _OPTIONS:
            chosen[name] = _parse(_OPTIONS[name], value, where)
        else:
            raise ConfigError(f"{path}: there is no option {name!r}; `embedserve serve --help` lists them")
    return chosen


def _keys_of(path: Path) -> list[APIKey]:
    keys = []
    for number, line in enumerate(_read(path, "--api-keys-file").splitlines(), 1):
        line = line.strip()
        if line and not line.startswith("#"):
            internal = line.startswith("internal ")
            try:
                keys.append(_key(internal=internal)(line.removeprefix("internal ").strip()))
            except ValueError as error:
                raise ConfigError(f"{path}, line {number}: expected {error}") from None
    if not keys:
        raise ConfigError(f"{path} holds no key; leave --api-keys-file out for an open server")
    return keys


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{option}: {path} is not UTF-8 text") from None
