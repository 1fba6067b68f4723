"""The command line: one table of commands, each with its options and the function that runs it.

What needs torch or another heavy library is imported by the function of the command that needs it.
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import NoReturn

# Before numpy comes in: its BLAS would start a thread a core in processes that never multiply matrices, and a process
# with threads is not safe to fork.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from embedserve.models import bundle, catalog, hub
from embedserve.models.errors import ModelError
from embedserve.models.manifest import Manifest
from embedserve.models.progress import size
from embedserve.server import config, log, model_list, parsers, served, supervisor
from embedserve.server.config import ConfigError
from embedserve.server.token_arrays import VocabularyError
from embedserve.server.tokenizer import TokenizerError

__all__ = ["main"]

_DESCRIPTION = """\
Serve embedding models behind OpenAI's embeddings API.

  embedserve serve                            the small model that comes with the [demo] extra, on 127.0.0.1:8000
  embedserve serve --model BAAI/bge-base-en-v1.5 --models-dir /srv/models
  embedserve models                           what can be served
  embedserve selftest BAAI/bge-base-en-v1.5   whether it gives the vectors that it should
  embedserve bench http http://127.0.0.1:8000/v1   how fast it answers; `bench engine` measures without HTTP

Into a network without access to the hub:

  embedserve pull BAAI/bge-m3 --to weights        on a machine with access
  embedserve pack weights -o models.tar           one file to carry, with a SHA-256 for each file in it
  embedserve unpack models.tar --to /srv/models   checks all of them on the way
"""

_SERVE_EPILOG = """\
Every option is also an environment variable, named in brackets (several values with commas between), and a key of the
file that --config names: --rate-limit 50 is EMBEDSERVE_RATE_LIMIT=50 or `rate_limit = 50`. Flags win over the
environment, the environment over the file. Only the file has tables for single models:

  [model_settings."BAAI/bge-base-en-v1.5"]
  token_ids = "native"              # token arrays in requests are this model's own ids; default "cl100k"
  default_prompt_name = "query"     # the prompt of requests that do not say; default as the model's files have it
  dimensions = 768                  # of vectors for requests that do not say
  price = 0.02                      # per million tokens, shown in /v1/embedding-models
  currency = "USD"

  [aliases]                         # other names for models, with any of these settings of their own
  "my-embeddings" = "BAAI/bge-base-en-v1.5"
  "text-embedding-ada-002" = { model = "BAAI/bge-base-en-v1.5", price = 0.1 }

  [upstreams."text-embedding-3-small"]      # relay requests for this name to another server; needs network access
  key_env = "OPENAI_API_KEY"                # the variable with the key for it; only `serve` reads it

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
    parser.add_argument("--json", action="store_true", help="all that is known of each, as a JSON array")
    config.add_options(parser, ["models_dir"])


def _models(options: argparse.Namespace) -> int:
    models_dir = _settings(options).models_dir
    if models_dir is not None and not os.path.isdir(models_dir):
        raise ConfigError(f"--models-dir: there is no folder {models_dir}")
    if options.json:
        print(json.dumps(model_list.describe(models_dir), indent=2, ensure_ascii=False))
    else:
        print(model_list.table(models_dir))
    return 0


# ----------------------------------------------------------------------------------------------------------- selftest

_SELFTEST_EPILOG = """\
Published values are those of other implementations: the models' own READMEs, and the tests of sentence-transformers,
fastembed and Text Embeddings Inference. Where none is known of a model, only what must hold of every model is checked:
a text alone and in a batch, the same batch twice, norms, truncation, half precision against float32. Exit status 1
where a check failed.
"""


def _selftest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as --model of `embedserve serve` takes it")
    parser.add_argument("--json", action="store_true", help="a JSON line for each check")
    config.add_options(parser, ["models_dir", "device", "dtype", "backend", "threads"])


def _selftest(options: argparse.Namespace) -> int:
    from embedserve.server import selftest

    return selftest.main(_settings(options), options.model, as_json=options.json)


# ------------------------------------------------------------------------------------------------------------- export

_EXPORT_EPILOG = """\
Needs optimum, in an environment of its own; in a checkout of embedserve: pip install ".[export]". The graph is compared
with the model that it was made from, on texts of 1 to 512 random tokens, and thrown away if the cosine between two
vectors is below 0.9999 (with --fp16 0.999). Serve it with --backend onnx.
"""


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as --model of `embedserve serve` takes it")
    parser.add_argument("--to", choices=["onnx"], required=True, help="the format")
    parser.add_argument("--fp16", action="store_true", help="weights and arithmetic in float16, for GPUs")
    parser.add_argument("--optimize", action="store_true", help="ONNX Runtime's fused operators, for BERT and its kin")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="where to write the graph; default: the model's folder onnx"
    )
    config.add_options(parser, ["models_dir"])


def _export(options: argparse.Namespace) -> int:
    from embedserve.models import export

    name, folder = served.locate(options.model, _settings(options).models_dir)
    made = export.export(
        catalog.configure(folder, name),
        half=options.fp16,
        optimize=options.optimize,
        output=options.output,
        progress=_tell,
    )
    _tell(str(made))
    return 0


# -------------------------------------------------------------------------------------------------------------- bench

# Imported when asked for: the tool is the one package that stands above this one.


def _bench_options(parser: argparse.ArgumentParser) -> None:
    from embedserve.benchmarks import bench

    bench.add_options(parser)


def _bench(options: argparse.Namespace) -> int:
    from embedserve.benchmarks import bench

    # Ends as Ctrl-C does: random weights, gigabytes for the larger shapes, would stay in the temporary folder.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return bench.run(options)


# ----------------------------------------------------------------------------------------- models for closed networks


def _target_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to",
        type=parsers.path,
        metavar="DIR",
        help="the models directory; a model gets the folder of its id in it; default: the server's "
        f"[{config.ENV_PREFIX}MODELS_DIR]",
    )
    config.add_options(parser, [])


def _target(options: argparse.Namespace) -> Path:
    target: Path | None = options.to or _settings(options).models_dir
    if target is None:
        raise ConfigError(f"expected a models directory to write to: --to DIR, or {config.ENV_PREFIX}MODELS_DIR")
    if os.path.lexists(target / "__init__.py"):
        # As in a clone of this very project, where `models` is no folder of weights.
        raise ConfigError(f"{target} is a Python package, it has __init__.py; expected a folder for models alone")
    return target


def _pull_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a name of the catalogue, or <organisation>/<name> of the hub")
    _target_options(parser)
    parser.add_argument(
        "--revision",
        metavar="REVISION",
        help="a commit, tag or branch; default: the catalogue's commit, main for other models",
    )
    parser.add_argument("--onnx", action="store_true", help="the ONNX graphs too")


def _pull(options: argparse.Namespace) -> int:
    target = _target(options)
    place = hub.pull(options.model, target, revision=options.revision, onnx=options.onnx, tell=_tell)
    _tell(f"serve it with: embedserve serve --models-dir {target} --model {place.relative_to(target)}")
    return 0


def _tell(line: str) -> None:
    # At once, so that it stands before the progress bar of standard error.
    print(line, flush=True)


def _convert_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a model's folder with pytorch_model.bin in it")
    parser.add_argument("--remove", action="store_true", help="remove the pickles afterwards")


def _convert(options: argparse.Namespace) -> int:
    from embedserve.models import convert  # torch

    done = convert.convert_folder(options.folder, remove=options.remove)
    for conversion in done:
        _tell(f"{conversion.source} → {conversion.target}")
    if not done:
        _tell(f"nothing to do: {options.folder} holds no pickle without safetensors beside it")
    return 0


def _pack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="a model's folder, or a directory of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the bundle to write")
    parser.add_argument("--model", metavar="ID", help="the id of a single folder, where its place does not tell")
    parser.add_argument("--force", action="store_true", help="replace a file that is already there")


def _pack(options: argparse.Namespace) -> int:
    for manifest in bundle.pack(options.folder, options.output, model=options.model, force=options.force):
        _tell(_line(manifest))
    _tell(f"{options.output}  {size(options.output.stat().st_size)}")
    return 0


def _verify_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="DIR|BUNDLE", help="a model's folder, a directory of them, a bundle")


def _verify(options: argparse.Namespace) -> int:
    faults = bundle.verify(options.path)
    for model, lines in faults.items():
        for line in lines or ["OK"]:
            _tell(f"{model or options.path}: {line}")
    return 1 if any(faults.values()) else 0


def _unpack_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="what `embedserve pack` wrote")
    _target_options(parser)


def _unpack(options: argparse.Namespace) -> int:
    for manifest in bundle.unpack(options.bundle, _target(options)):
        _tell(_line(manifest))
    return 0


def _line(manifest: Manifest) -> str:
    revision = f", revision {manifest.revision}" if manifest.revision else ""
    return f"{manifest.model}  {len(manifest.files)} files, {size(manifest.size)}{revision}"


# ----------------------------------------------------------------------------------------------------------- commands

COMMANDS = {
    "serve": Command("serve models over HTTP", config.add_options, _serve, _SERVE_EPILOG),
    "models": Command("list what can be served", _models_options, _models),
    "selftest": Command(
        "compare a model's vectors with published ones", _selftest_options, _selftest, _SELFTEST_EPILOG
    ),
    "bench": Command("measure throughput and latency, here or over HTTP", _bench_options, _bench),
    "export": Command("make an ONNX graph of a model", _export_options, _export, _EXPORT_EPILOG),
    "pull": Command("get a model from the Hugging Face hub", _pull_options, _pull),
    "convert": Command("turn a folder's pickled weights into safetensors", _convert_options, _convert),
    "pack": Command("put models into one file, with checksums", _pack_options, _pack),
    "verify": Command("check models or a bundle against their checksums", _verify_options, _verify),
    "unpack": Command("take models out of a bundle, checking them", _unpack_options, _unpack),
}


def _version() -> str:
    try:
        return metadata.version("embedserve")
    except metadata.PackageNotFoundError:
        return "(from its source tree, not installed)"


if __name__ == "__main__":
    main()
