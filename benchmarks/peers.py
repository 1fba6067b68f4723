"""How does this server compare with its peers: Infinity over HTTP, sentence-transformers in a process without HTTP?

All of it, servers started and ended by the script, in about eight minutes (rounds.py says how parties take turns):

    python -m embedserve.benchmarks.peers --infinity .venv-infinity --sentence-transformers

Servers that run already are compared by `embedserve bench http`. Scenarios, of which a round is a fixed amount of work:

    short, mixed, long   many texts a request from a few clients, each waiting for its answer: the rate
    single               one short text a request from 8 clients
    chain                one text of 14 words a request, one after another from one client
    one                  the same with a pause between: the latency of an idle server, whose threads and caches are cold
    open                 single short texts in Poisson arrivals, at 80 % of the best rate that the server reached with
                         32 clients; latency counts from the time a request was due (no coordinated omission)

sentence-transformers gets all texts of a round in one call, so that it sorts them by length, at the best of several
batch sizes, tried beforehand for each kind of text. Infinity lives in an environment of its own, which is made with

    python3.11 -m venv .venv-infinity
    .venv-infinity/bin/pip install torch==2.13.0
    .venv-infinity/bin/pip install "infinity-emb[server,torch,optimum]==0.0.78" torch==2.13.0 "transformers<5"

and is started as INFINITY says below, offline and with its telemetry off; by hand that is

    HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 .venv-infinity/bin/infinity_emb v2 --model-id FOLDER --engine torch \\
        --host 127.0.0.1 --port 7997 --dtype float32 --device cpu …

Ctrl-C, or the end of the time, keeps the rounds that are whole. Appends a JSON line a scenario to
benchmarks/results/http.jsonl.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from embedserve.benchmarks import bench, jsonl, machine, shapes
from embedserve.benchmarks.load import Round, Sample, Target
from embedserve.benchmarks.parties import Party, PartyError, Scenario, Server, Texts
from embedserve.benchmarks.progress import Progress
from embedserve.benchmarks.rounds import Run
from embedserve.benchmarks.texts import common_words
from embedserve.models.catalog import locate
from embedserve.models.errors import ModelError

RESULTS = jsonl.FOLDER / "http.jsonl"
MODEL = "sentence-transformers/all-MiniLM-L6-v2"
# For MiniLM on two cores: small batches are its best where lengths are mixed (less padding), 32 where they are short;
# bettertransformer and a larger batch were slower, compiling made no difference. --infinity-options replaces them.
INFINITY = (
    "--engine torch --no-bettertransformer --batch-size 32",
    "--engine torch --no-bettertransformer --batch-size 8",
)
BATCH_SIZES = (8, 32, 128)
READY_SECONDS = 120.0
SCENARIOS = (
    Scenario("short", "short", clients=4, size=32, requests=24),
    Scenario("mixed", "mixed", clients=4, size=32, requests=6),
    Scenario("long", "long", clients=4, size=8, requests=8),
    Scenario("single", "short", clients=8, size=1, requests=240),
    Scenario("chain", "one", clients=1, size=1, requests=60),
    Scenario("one", "one", clients=1, size=1, requests=30, pause=0.02),
    Scenario("open", "short", clients=0, size=1, seconds=5.0),
)


class SentenceTransformers(Party):
    """The library in a process of its own, without HTTP: its clock runs there, around `encode` alone."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.name = "sentence-transformers"
        self._best: dict[str, int] = {}
        self.facts = {"in_process": True, "dtype": options.dtype, "device": options.device}
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=_sentence_transformers, args=(theirs, str(folder), options.device, options.dtype), daemon=True
        )
        self._process.start()
        theirs.close()

    def wait_ready(self) -> None:
        """Until the model is loaded."""
        self.facts["threads"] = self._receive(READY_SECONDS)

    def close(self) -> None:
        """End the process: at once if it waits, or in the middle of a call."""
        self._pipe.close()
        self._process.join(3)
        self._process.terminate()
        self._process.join(10)

    def vectors(self, texts: list[str], within: float) -> np.ndarray[Any, Any]:
        """One call."""
        self._pipe.send(("vectors", [texts], 32, 0.0))
        found: np.ndarray[Any, Any] = self._receive(within)
        return found

    def prepare(self, scenario: Scenario, texts: Texts, within: float) -> None:
        """Find the best batch size for this kind of text."""
        asked = texts.requests()
        if scenario.is_rate and scenario.size > 1:
            # Half a round's texts at each batch size, after a first call that does not count.
            flat = list(chain.from_iterable(asked[: max(1, len(asked) // 2)]))
            self._seconds([flat[:32]], 32, within)
            taken = {size: self._seconds([flat], size, within)[0] for size in BATCH_SIZES}
            self._best[scenario.name] = min(taken, key=taken.__getitem__)
        elif scenario.clients == 1:
            self._seconds(asked[:3], 1, within)

    def run(self, scenario: Scenario, texts: Texts, within: float) -> Round | None:
        """All texts in one call, or one call a text where a scenario asks for latency."""
        asked = texts.requests()
        if scenario.is_rate and scenario.size > 1:
            calls, batch_size = [list(chain.from_iterable(asked))], self._best[scenario.name]
        elif scenario.clients == 1:
            calls, batch_size = asked, 1
        else:
            return None
        seconds = self._seconds(calls, batch_size, within, scenario.pause)
        samples = [Sample(0.0, 0.0, took, 200, len(call), 0) for call, took in zip(calls, seconds, strict=True)]
        return Round(samples, sum(seconds), 0.0)

    def facts_of(self, scenario: Scenario) -> dict[str, Any]:
        """With the batch size."""
        return {**self.facts, "batch_size": self._best.get(scenario.name, 1)}

    def _seconds(self, calls: list[list[str]], batch_size: int, within: float, pause: float = 0.0) -> list[float]:
        self._pipe.send(("seconds", calls, batch_size, pause))
        found: list[float] = self._receive(within)
        return found

    def _receive(self, timeout: float) -> Any:
        try:
            if self._pipe.poll(timeout):
                return self._pipe.recv()
        except EOFError:
            raise PartyError("sentence-transformers: its process ended; is the package installed?") from None
        raise TimeoutError(f"sentence-transformers: no answer after {timeout:.0f} s")


def _sentence_transformers(pipe: Connection, folder: str, device: str, dtype: str) -> None:
    """The other process: takes calls until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder, device=device, model_kwargs={"dtype": getattr(torch, dtype)})
    pipe.send(torch.get_num_threads())
    with suppress(EOFError):
        while True:
            what, calls, batch_size, pause = pipe.recv()
            taken = []
            for texts in calls:
                started = time.perf_counter()
                vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
                taken.append(time.perf_counter() - started)
                time.sleep(pause)
            pipe.send(np.asarray(vectors, dtype=np.float32) if what == "vectors" else taken)


@contextmanager
def process(name: str, command: list[str], environment: dict[str, str] | None = None) -> Iterator[tuple[Any, Path]]:
    """A server as a child process, and the file it writes to; ended with the block.

    It has a session of its own: Ctrl-C is for this script, which ends it afterwards.
    """
    with tempfile.TemporaryDirectory(prefix="embedserve-bench-") as folder:
        log = Path(folder) / "log"
        with log.open("wb") as file:
            try:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                )
            except OSError as error:
                raise PartyError(f"{name}: cannot start {command[0]}: {error}") from error
        try:
            yield child, log
        finally:
            child.terminate()
            try:
                child.wait(15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(15)


def wait_ready(name: str, url: str, child: Any, log: Path) -> None:
    """Poll `url` until it answers 200."""
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and child.poll() is None:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
            if answer.status == 200:
                return
        time.sleep(0.1)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
    raise PartyError(f"{name} was not ready within {READY_SECONDS:.0f} s, or ended; the last it wrote:\n{tail}")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@contextmanager
def embedserve(options: argparse.Namespace) -> Iterator[Server]:
    """This server, with `--rate-limit 0` and otherwise as anyone would start it."""
    port = free_port()
    more = shlex.split(options.embedserve_options)
    command = [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", str(port), "--rate-limit", "0"]
    command += ["--model", options.model, "--device", options.device, "--dtype", options.dtype]
    if options.models_dir:
        command += ["--models-dir", str(options.models_dir)]
    with process("embedserve", [*command, *more]) as (child, log):
        wait_ready("embedserve", f"http://127.0.0.1:{port}/ready", child, log)
        server = _server("embedserve", f"http://127.0.0.1:{port}/v1", options, {"options": " ".join(more)})
        if options.shape:
            # A folder is served under its own name.
            server.target = replace(server.target, model=options.shape)
        yield server


@contextmanager
def infinity(options: argparse.Namespace, folder: Path, more: str) -> Iterator[Server]:
    """Infinity from its own environment, with these options more."""
    port = free_port()
    python = options.infinity / "bin" / "python"
    command = [str(options.infinity / "bin" / "infinity_emb"), "v2", "--model-id", str(folder)]
    command += ["--served-model-name", options.model, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", options.device, "--dtype", options.dtype, *shlex.split(more)]
    # No look at the model hub, no telemetry.
    offline = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    with process("infinity", command, offline) as (child, log):
        wait_ready("infinity", f"http://127.0.0.1:{port}/models", child, log)
        ask = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
        names = ["infinity-emb", "torch", "transformers", "sentence-transformers", "uvicorn"]
        versions = json.loads(subprocess.check_output([str(python), "-c", ask % names], timeout=60, text=True))
        batch_size = re.search(r"--batch-size[ =](\d+)", more)
        name = f"infinity, batches of {batch_size[1]}" if batch_size else "infinity"
        yield _server(name, f"http://127.0.0.1:{port}", options, {"options": more, "versions": versions})


def _server(name: str, url: str, options: argparse.Namespace, facts: dict[str, Any]) -> Server:
    return Server(name, Target(url, options.model, None, options.encoding_format), options.timeout, facts)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(
        prog="python -m embedserve.benchmarks.peers",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--embedserve-options", default="", help="more of this server's options, in one string")
    parser.add_argument("--infinity", type=Path, metavar="ENVIRONMENT", help="start Infinity from this environment")
    parser.add_argument(
        "--infinity-options",
        nargs="+",
        default=INFINITY,
        metavar="OPTIONS",
        help="its options in one string; several strings are several parties",
    )
    parser.add_argument("--sentence-transformers", action="store_true", help="include the library, in process")
    parser.add_argument("--model", default=MODEL, help="id of the model")
    parser.add_argument("--shape", choices=shapes.SHAPES, help="random weights of a shape, instead of --model")
    parser.add_argument("--models-dir", type=Path, help="where the models' folders lie")
    parser.add_argument("--device", default="cpu", help="of all parties: cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of all parties")
    parser.add_argument("--encoding-format", choices=["base64", "float"], default="base64", help="of the answers")
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, help="what to measure")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each party, if the time is enough")
    parser.add_argument("--limit", type=float, default=480, help="seconds of the rounds and what is before them")
    parser.add_argument("--clients", type=int, help="instead of the scenarios' own, where there are many")
    parser.add_argument("--scale", type=float, default=1.0, help="times the requests a round")
    parser.add_argument("--timeout", type=float, default=60.0, help="of a request, in seconds")
    parser.add_argument("-o", "--output", default=str(RESULTS), help="file that the lines are appended to, - for none")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Scenario]:
    """The scenarios, as the options change them."""
    found = []
    for scenario in SCENARIOS:
        if scenario.name in options.scenarios:
            clients = options.clients if options.clients and scenario.clients > 1 else scenario.clients
            requests = math.ceil(scenario.requests * options.scale)
            found.append(replace(scenario, clients=clients, requests=requests))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the tables, write the lines. The exit status."""
    options = parse(arguments)
    # A polite end is an interruption: what was measured is kept, what was started is ended.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    todo = chosen(options)
    others = machine.Others()
    time.sleep(1.0)
    described = machine.describe() | {"cores_busy_before": others.cores()}
    try:
        with ExitStack() as stack:
            progress = stack.enter_context(Progress(0))
            folder = _folder(options, stack)
            parties: list[Party] = []
            reference = None
            if options.sentence_transformers:
                # Loads while the servers start.
                reference = SentenceTransformers(folder, options)
                stack.callback(reference.close)
            progress.step("starting embedserve")
            parties.append(stack.enter_context(embedserve(options)))
            for more in options.infinity_options if options.infinity else ():
                progress.step(f"starting Infinity {more}")
                parties.append(stack.enter_context(infinity(options, folder, more)))
            if reference is not None:
                progress.step("loading sentence-transformers")
                reference.wait_ready()
                parties.append(reference)
            run = Run(options, common_words(), described, progress)
            run.measure(parties, todo)
            return 1 if run.out else 0
    except KeyboardInterrupt:
        return bench.interrupted()
    except (PartyError, ModelError, OSError, TimeoutError) as error:
        print(f"peers: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)


def _folder(options: argparse.Namespace, stack: ExitStack) -> Path:
    """Of the model. A shape is written into one that goes with the stack, and is served as that folder."""
    if not options.shape:
        folder: Path = locate(options.model, options.models_dir)
        return folder
    parent = stack.enter_context(tempfile.TemporaryDirectory(prefix="embedserve-bench-"))
    folder = Path(parent) / options.shape
    shapes.write(folder, shapes.SHAPES[options.shape])
    options.model = str(folder)
    return folder


if __name__ == "__main__":
    sys.exit(main())
