"""The command line: ``embedserve serve`` and ``embedserve models``."""

import argparse
import os
import sys
from collections.abc import Sequence
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


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The entry point. Exits with 0, or with 2 and one line when something has to be changed first."""
    parser = _Parser(prog="embedserve", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--version", action="version", version=f"embedserve {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve models over HTTP",
        epilog=_SERVE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    config.add_options(serve)
    models = commands.add_parser("models", help="list what can be served")
    config.add_options(models, ["models_dir"])
    flags = vars(parser.parse_args(arguments))
    try:
        settings = config.load(flags)
        log.set_up(settings.log_format, settings.log_level)
        if flags["command"] == "models":
            print(_table(settings))
            sys.exit(0)
        sys.exit(supervisor.serve(settings))
    except KeyboardInterrupt:  # before the supervisor took over
        sys.exit(130)
    except (ConfigError, ModelError, TokenizerError, VocabularyError) as error:
        print("embedserve:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


def _version() -> str:
    try:
        return metadata.version("embedserve")
    except metadata.PackageNotFoundError:
        return "(from its source tree, not installed)"


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


if __name__ == "__main__":
    main()
