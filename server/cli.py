"""The command line: one table of commands, each with its options and the function that runs it.

What needs torch or another heavy library is imported by the function of the command that needs it.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NoReturn

# Before numpy comes in: its BLAS would start a thread a core in processes that never multiply matrices, and a process
# with threads is not safe to fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from embedserve.models import catalog
from embedserve.models.errors import ModelError
from embedserve.server import config, log, supervisor
from embedserve.server.config import ConfigError
from embedserve.server.token_arrays import VocabularyError
from embedserve.server.tokenizer import TokenizerError

__all__ = ["main"]

_DESCRIPTION = """\
Serve embedding models behind OpenAI's embeddings API.

  embedserve serve                            the small model that comes with the [demo] extra, on 127.0.0.1:8000
  embedserve serve --model BAAI/bge-base-en-v1.5 --models-dir /models
  embedserve models                           what can be served
"""

_SERVE_EPILOG = """\
Every option is also an environment variable, named in brackets (several values with commas between), and a key of the
file that --config names: --rate-limit 50 is EMBEDSERVE_RATE_LIMIT=50 or `rate_limit = 50`. Flags win over the
environment, the environment over the file. Only the file has tables for single models:

  [model_settings."BAAI/bge-base-en-v1.5"]
  token_ids = "native"      # token arrays in requests are this model's own ids; default "cl100k"
  price = 0.02              # per million tokens, shown in /v1/embedding-models
  currency = "USD"

SIGTERM, SIGHUP and Ctrl-C end the server once the requests in flight are answered; a second one ends it at once.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"embedserve: {message}; see `{self.prog} --help`\n")


@dataclass(frozen=True)
class Command:
    """A word of the command line.

    help: its line in the list of commands. options: gives its parser the flags. run: does the work and returns the
    exit status; what has to be changed by the user first it raises as a `ModelError` or `ConfigError`.
    """

    help: str
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str | None = None


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Exits with a command's status, or with 2 and one line when something has to be changed first."""
    parser = _Parser(prog="embedserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"embedserve {_version()}")
    words = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for word, command in COMMANDS.items():
        command.options(
            words.add_parser(
                word,
                help=command.help,
                description=command.help[0].upper() + command.help[1:] + ".",
                epilog=command.epilog,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )
    options = parser.parse_args(arguments)
    try:
        sys.exit(COMMANDS[options.command].run(options))
    except KeyboardInterrupt:  # in `serve`: before the supervisor took over
        sys.exit(130)
    except (ConfigError, ModelError, TokenizerError, VocabularyError) as error:
        print("embedserve:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


# -------------------------------------------------------------------------------------------------------------- serve


def _serve(options: argparse.Namespace) -> int:
    return supervisor.serve(_settings(options))


def _settings(options: argparse.Namespace) -> config.ServerConfig:
    settings = config.load(vars(options))
    log.set_up(settings.log_format, settings.log_level)
    return settings


# ------------------------------------------------------------------------------------------------------------- models


def _models_options(parser: argparse.ArgumentParser) -> None:
    config.add_options(parser, ["models_dir"])


def _models(options: argparse.Namespace) -> int:
    print(_table(_settings(options)))
    return 0


def _table(settings: config.ServerConfig) -> str:
    """The catalogue: a line a model, and whether its files are here. Raises `ConfigError`."""
    if settings.models_dir is not None and not settings.models_dir.is_dir():
        raise ConfigError(f"--models-dir: there is no folder {settings.models_dir}")
    rows = [("MODEL", "DIMENSIONS", "MAX TOKENS", "LANGUAGES", "LICENCE", "FILES")]
    for entry in catalog.CATALOG:
        try:
            files = str(catalog.locate(entry.id, settings.models_dir))
        except ModelError:
            files = "not here"
        rows.append(
            (entry.id, str(entry.dimensions), str(entry.max_tokens), ", ".join(entry.languages), entry.licence, files)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    )


# ----------------------------------------------------------------------------------------------------------- commands

COMMANDS = {
    "serve": Command("serve models over HTTP", config.add_options, _serve, _SERVE_EPILOG),
    "models": Command("list what can be served", _models_options, _models),
}


def _version() -> str:
    try:
        return metadata.version("embedserve")
    except metadata.PackageNotFoundError:
        return "(from its source tree, not installed)"


if __name__ == "__main__":
    main()
