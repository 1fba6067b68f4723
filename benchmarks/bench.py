"""The options of `embedserve bench`, a word a tool, and the way to each. Imports nothing heavy: see `server/cli.py`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from embedserve.benchmarks import jsonl
from embedserve.benchmarks.shapes import SHAPES
from embedserve.server import config

__all__ = ["add_options", "interrupted", "run"]

OUTPUT = Path("embedserve-bench.jsonl")
KINDS = {"short": "4 to 16 words", "mixed": "4 to 230", "long": "180 to 240"}

_EPILOG = """\
  embedserve bench engine --shape bge-large --dtype float16     no HTTP: length × batch, share of the matrix rate
  embedserve bench http http://127.0.0.1:8000/v1 other=http://127.0.0.1:7997
  embedserve bench report -o report.html                        one page with plots, and PNG files beside it

Each figure is appended to a file of JSON lines (-o) as soon as it is whole: Ctrl-C keeps what was measured. Exit status
0, 1 where something could not be measured or was answered with errors, 130 after Ctrl-C.
"""

_HTTP_EPILOG = """\
The servers take turns on the same texts, and the first is compared with each of the others. A server that does not
answer, answers errors or no vectors, is said so, and the others go on. First a closed loop with each number of clients,
each of which waits for its answer before it asks again; then an open loop, with Poisson arrivals at shares of the rate
that the server reached before, or at given rates: there, latency counts from the time a request was due.
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give the parser of `embedserve bench` its tools."""
    parser.epilog = _EPILOG
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")

    def tool(name: str, about: str, epilog: str | None = None) -> argparse.ArgumentParser:
        return tools.add_parser(
            name,
            help=about,
            description=about[0].upper() + about[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    _engine_options(tool("engine", "measure a model in process: tokens/s and latency by length and batch"))
    _http_options(tool("http", "measure servers with OpenAI's embeddings API, in turns", _HTTP_EPILOG))
    _report_options(tool("report", "draw a page of plots and tables from what was measured"))


def run(options: argparse.Namespace) -> int:
    """Run the tool that was asked for; the exit status. Raises ConfigError, and ModelError for a model."""
    if options.tool == "report":
        from embedserve.benchmarks import report

        return report.main(options)
    jsonl.check(options.output)
    if options.tool == "http":
        from embedserve.benchmarks import http

        return http.main(options)
    if options.shape and options.model:
        raise config.ConfigError("expected --model or --shape, not both")
    from embedserve.benchmarks import engine

    return engine.main(options)


def _engine_options(parser: argparse.ArgumentParser) -> None:
    config.add_options(parser, ["model", "models_dir", "device", "dtype", "backend", "threads", "max_batch_tokens"])
    group = parser.add_argument_group("Measurement")
    group.add_argument(
        "--shape", nargs="+", choices=SHAPES, default=[], help="instead of --model: random weights of the true shape"
    )
    group.add_argument(
        "--lengths", nargs="+", type=_above(0, int), metavar="TOKENS", help="default: 16 to what the model takes"
    )
    group.add_argument(
        "--batches",
        nargs="+",
        type=_batch,
        metavar="TEXTS|full",
        help="that come together; full is a whole batch (default: 1 8 32 full)",
    )
    group.add_argument("--mix", action="store_true", help="texts of mixed lengths too, log-normal around 64 tokens")
    group.add_argument(
        "--seconds", type=_above(0), default=2.0, metavar="S", help="of each cell, or round (default: 2)"
    )
    group.add_argument(
        "--against",
        choices=["sentence-transformers"],
        help="no sweep: real texts, tokenising inside the clock, in turns with this library",
    )
    group.add_argument(
        "--kinds", nargs="+", choices=[*KINDS, "one"], default=[*KINDS, "one"], help="of texts, with --against"
    )
    group.add_argument("--rounds", type=_above(0, int), default=5, help="of --against (default: 5)")
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        type=_above(0, int),
        default=[8, 32, 128],
        help="of the library; the best counts (default: 8 32 128)",
    )
    group.add_argument("--resume", action="store_true", help="leave out the cells that the file has already")
    _output_option(group)


def _http_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "servers", nargs="+", type=_server, metavar="[NAME=]URL", help="as the base_url of OpenAI's client"
    )
    parser.add_argument("--model", help="id of the model; default: what each server lists first")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="variable with a key, sent to all servers")
    parser.add_argument(
        "--clients",
        nargs="+",
        type=_above(0, int),
        default=[1, 4, 16, 64],
        metavar="N",
        help="closed loops of so many (default: 1 4 16 64)",
    )
    parser.add_argument(
        "--texts", nargs="+", type=_above(0, int), default=[1], metavar="N", help="texts a request (default: 1)"
    )
    kinds = "; ".join(f"{name} is {words} words" for name, words in KINDS.items())
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=["short"], help=f"of texts (default: short); {kinds}"
    )
    parser.add_argument("--words", nargs=2, type=_above(0, int), metavar=("FROM", "TO"), help="of a text, for --kinds")
    parser.add_argument(
        "--shares",
        nargs="*",
        type=_above(0),
        default=[0.8],
        metavar="SHARE",
        help="open loops at these shares of the best rate that the server reached (default: 0.8; none: nothing)",
    )
    parser.add_argument(
        "--rates", nargs="+", type=_above(0), default=[], metavar="R", help="open loops at requests/s, for --shares"
    )
    parser.add_argument("--rounds", type=_above(0, int), default=3, help="turns of each server (default: 3)")
    parser.add_argument(
        "--seconds", type=_above(0), default=4.0, metavar="S", help="of a round of one server (default: 4)"
    )
    parser.add_argument("--timeout", type=_above(0), default=30.0, metavar="S", help="of a request (default: 30)")
    parser.add_argument("--encoding-format", choices=["base64", "float"], default="base64", help="of the answers")
    _output_option(parser)


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help=f"JSON lines (default: {OUTPUT}); the last of a kind counts"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="the page")


def _output_option(parser: Any) -> None:
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=OUTPUT,
        metavar="FILE",
        help=f"JSON lines are appended to it; - for none (default: {OUTPUT})",
    )


def _above(bound: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = bound
        if not bound < value < float("inf"):
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"expected {what} above {bound:g}, not {text!r}")
        return value

    return number


def _batch(text: str) -> int | str:
    try:
        return text if text == "full" else int(_above(0, int)(text))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, nor full") from None


def _server(text: str) -> tuple[str, str]:
    """NAME=URL or URL → name and URL."""
    name, equals, url = text.partition("=")
    if not equals or "/" in name:
        name, url = "", text
    try:
        split = urlsplit(url)
        host, _ = split.hostname, split.port
    except ValueError:
        host = None
    if split.scheme not in ("http", "https") or not host:
        raise argparse.ArgumentTypeError(f"expected [NAME=]URL, as in http://127.0.0.1:8000/v1, not {text!r}")
    return name or split.netloc.rpartition("@")[2], url.rstrip("/")


def interrupted() -> int:
    """Say that Ctrl-C keeps what was measured; the exit status."""
    print("interrupted; what was whole is kept", file=sys.stderr)
    return 130
