"""Which rate (texts/s, tokens/s) and which latency (p50, p90, p99) does a server with OpenAI's embeddings API give?

Parties take turns, A B A B, on the same texts, in one run: this server, Infinity, any OpenAI-shaped URL, and
sentence-transformers in its own process without HTTP. A round is a fixed amount of work, new texts each round, and its
clock runs from the first request to the last answer; a figure is the median of the rounds with the lowest and highest,
and a ratio is taken inside each round, between neighbours in time. Scenarios:

    short, mixed, long   many texts a request from a few clients, each waiting for its answer: the rate
    single               one short text a request from 8 clients
    chain                one text of 14 words a request, one after another from one client
    one                  the same with a pause between: the latency of an idle server, whose threads and caches are cold
    open                 single short texts in Poisson arrivals, at 80 % of the rate that 32 clients reached on that
                         server before; latency counts from the time a request was due (no coordinated omission)

All of it, servers started and ended by the script, in about five minutes:

    python -m embedserve.benchmarks.http_load --embedserve --infinity .venv-infinity --sentence-transformers

Servers that run already, the first one compared with each of the others; a URL is what OpenAI's client calls base_url:

    python -m embedserve.benchmarks.http_load ours=http://127.0.0.1:8000/v1 theirs=http://127.0.0.1:7997 \\
        --scenarios short single

sentence-transformers gets all texts of a round in one call, so that it sorts them by length, at the best of several
batch sizes, tried beforehand for each kind of text. Infinity lives in an environment of its own, which is made with

    python3.11 -m venv .venv-infinity
    .venv-infinity/bin/pip install torch==2.13.0
    .venv-infinity/bin/pip install "infinity-emb[server,torch,optimum]==0.0.78" torch==2.13.0 "transformers<5"

and is started as INFINITY says below, offline and with its telemetry off; by hand that is

    HF_HUB_OFFLINE=1 DO_NOT_TRACK=1 .venv-infinity/bin/infinity_emb v2 --model-id FOLDER --engine torch \\
        --host 127.0.0.1 --port 7997 --dtype float32 --device cpu …

The client is this process (benchmarks/load.py); what it costs is measured against a stub and printed as its limit.
Tokens are the first server's `usage.prompt_tokens`, for all parties, as the texts are the same; ratios are of texts.
Ctrl-C, or the end of the time, keeps the rounds that are whole. Ends in one JSON line a scenario, appended to
benchmarks/results/http.jsonl.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from embedserve.benchmarks import jsonl, machine
from embedserve.benchmarks.jsonl import spread
from embedserve.benchmarks.load import (
    Request,
    Round,
    Sample,
    Stub,
    Target,
    ask_once,
    closed_loop,
    open_loop,
    poisson_schedule,
)
from embedserve.benchmarks.texts import SEED, WORDS, texts_of, vocabulary
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
# Clients that ask for the rate an open loop takes its share of.
CROWD = 32
READY_SECONDS = 120.0


@dataclass(frozen=True)
class Limits:
    """Seconds that a request may take, and all of what is done now."""

    request: float
    all: float


class BenchmarkError(Exception):
    """The run cannot go on. The message says what was wrong, and what to do."""


@dataclass(frozen=True)
class Scenario:
    """A kind of load.

    kind: of the texts. clients: 0 is an open loop. size: texts a request. requests: a round. pause: seconds between an
    answer and the same client's next request.
    """

    name: str
    kind: str
    clients: int
    size: int
    requests: int
    pause: float = 0.0

    @property
    def is_rate(self) -> bool:
        """Whether it is compared by texts a second, and not by latency."""
        return self.clients > 1


SCENARIOS = (
    Scenario("short", "short", clients=4, size=32, requests=24),
    Scenario("mixed", "mixed", clients=4, size=32, requests=6),
    Scenario("long", "long", clients=4, size=8, requests=8),
    Scenario("single", "short", clients=8, size=1, requests=240),
    Scenario("chain", "one", clients=1, size=1, requests=60),
    Scenario("one", "one", clients=1, size=1, requests=30, pause=0.02),
    Scenario("open", "short", clients=0, size=1, requests=0),
)


class Party(ABC):
    """One side of the comparison.

    name: in the table. facts: versions and options that its figures depend on, with no paths.
    """

    name: str
    facts: dict[str, Any]

    @abstractmethod
    def vectors(self, texts: list[str], limits: Limits) -> np.ndarray[Any, Any]:
        """[texts, dimension], float32: to see that all parties do the same work."""

    @abstractmethod
    def prepare(self, scenario: Scenario, texts: list[list[str]], limits: Limits) -> None:
        """Warm up on `texts`, a list a request, outside all clocks."""

    @abstractmethod
    def run(self, scenario: Scenario, texts: list[list[str]], limits: Limits) -> Round | None:
        """One round on `texts`; None where this scenario means nothing to this party."""


class Server(Party):
    """A server with OpenAI's embeddings API."""

    def __init__(
        self, name: str, target: Target, options: argparse.Namespace, facts: dict[str, Any] | None = None
    ) -> None:
        self.name, self.target, self.facts = name, target, {"model": Path(target.model).name, **(facts or {})}
        self._options = options

    def vectors(self, texts: list[str], limits: Limits) -> np.ndarray[Any, Any]:
        """Ask, and decode base64 or numbers. Raises BenchmarkError with what the server said."""
        status, body = ask_once(self.target, texts, timeout=limits.request)
        if status != 200:
            raise BenchmarkError(f"{self.name}: expected 200, got {status}: {body[:300].decode(errors='replace')}")
        rows = sorted(json.loads(body)["data"], key=lambda row: int(row["index"]))
        if isinstance(rows[0]["embedding"], str):
            return np.stack([np.frombuffer(base64.b64decode(row["embedding"]), dtype="<f4") for row in rows])
        return np.asarray([row["embedding"] for row in rows], dtype=np.float32)

    def prepare(self, scenario: Scenario, texts: list[list[str]], limits: Limits) -> None:
        """A few requests; before an open loop, a crowd that finds the rate to take a share of."""
        if scenario.clients == 0:
            requests = self._requests(texts)
            crowd = self._closed(requests, CROWD, limits)
            self._fail_without_answer(crowd)
            rate = self._options.rate or self._options.load * crowd.requests_per_second
            self.facts["crowd_requests_per_second"] = round(crowd.requests_per_second, 1)
            self.facts["rate"] = round(rate, 1)
        else:
            requests = self._requests(texts[: max(2, scenario.clients)])
            self._fail_without_answer(self._closed(requests, scenario.clients, limits))

    def run(self, scenario: Scenario, texts: list[list[str]], limits: Limits) -> Round | None:
        """One round over HTTP."""
        if scenario.clients:
            requests = self._requests(texts)
            return self._closed(requests, scenario.clients, limits, scenario.pause)
        # Another schedule each round, as the texts are others.
        due = poisson_schedule(self.facts["rate"], self._options.open_seconds, f"{SEED} {texts[0][0]}")
        # The texts of a round in turn, as many as the rate asks for.
        requests = self._requests([texts[place % len(texts)] for place in range(len(due))])
        return open_loop(self.target, requests, due, timeout=limits.request, within=limits.all)

    def _closed(self, requests: Sequence[Request], clients: int, limits: Limits, pause: float = 0.0) -> Round:
        return closed_loop(self.target, requests, clients, timeout=limits.request, within=limits.all, pause=pause)

    def _requests(self, texts: Sequence[list[str]]) -> list[Request]:
        return [self.target.request(each) for each in texts]

    def _fail_without_answer(self, round_: Round) -> None:
        if not round_.answered:
            raise BenchmarkError(f"{self.name}: no request of the warm-up was answered: {round_.errors}")


class SentenceTransformers(Party):
    """The library in a process of its own, without HTTP: its clock runs there, around `encode` alone."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.name = "sentence-transformers"
        self._best: dict[str, int] = {}
        self.facts = {"in_process": True, "batch_size": self._best, "dtype": options.dtype, "device": options.device}
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

    def vectors(self, texts: list[str], limits: Limits) -> np.ndarray[Any, Any]:
        """One call."""
        self._pipe.send(("vectors", [texts], 32, 0.0))
        found: np.ndarray[Any, Any] = self._receive(limits.all)
        return found

    def prepare(self, scenario: Scenario, texts: list[list[str]], limits: Limits) -> None:
        """Find the best batch size for this kind of text."""
        if scenario.is_rate and scenario.size > 1:
            # Half a round's texts at each batch size, after a first call that does not count.
            flat = list(chain.from_iterable(texts[: max(1, len(texts) // 2)]))
            self._seconds([flat[:32]], 32, limits)
            taken = {size: self._seconds([flat], size, limits)[0] for size in BATCH_SIZES}
            self._best[scenario.name] = min(taken, key=taken.__getitem__)
        elif scenario.clients == 1:
            self._seconds(texts[:3], 1, limits)

    def run(self, scenario: Scenario, texts: list[list[str]], limits: Limits) -> Round | None:
        """All texts in one call, or one call a text where a scenario asks for latency."""
        if scenario.is_rate and scenario.size > 1:
            calls, batch_size = [list(chain.from_iterable(texts))], self._best[scenario.name]
        elif scenario.clients == 1:
            calls, batch_size = texts, 1
        else:
            return None
        seconds = self._seconds(calls, batch_size, limits, scenario.pause)
        samples = [Sample(0.0, 0.0, took, 200, len(call), 0) for call, took in zip(calls, seconds, strict=True)]
        return Round(samples, sum(seconds), 0.0)

    def _seconds(self, calls: list[list[str]], batch_size: int, limits: Limits, pause: float = 0.0) -> list[float]:
        self._pipe.send(("seconds", calls, batch_size, pause))
        found: list[float] = self._receive(limits.all)
        return found

    def _receive(self, timeout: float) -> Any:
        try:
            if self._pipe.poll(timeout):
                return self._pipe.recv()
        except EOFError:
            raise BenchmarkError("sentence-transformers: its process ended; is the package installed?") from None
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


# ------------------------------------------------------------------------------------------------ servers of our own


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
                raise BenchmarkError(f"{name}: cannot start {command[0]}: {error}") from error
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
    raise BenchmarkError(f"{name} was not ready within {READY_SECONDS:.0f} s, or ended; the last it wrote:\n{tail}")


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
        yield Server(
            "embedserve", _target(f"http://127.0.0.1:{port}/v1", options), options, {"options": " ".join(more)}
        )


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
        target = _target(f"http://127.0.0.1:{port}", options)
        batch_size = re.search(r"--batch-size[ =](\d+)", more)
        name = f"infinity, batches of {batch_size[1]}" if batch_size else "infinity"
        yield Server(name, target, options, {"options": more, "versions": versions})


def running(spec: str, options: argparse.Namespace) -> Server:
    """`NAME=URL`: a server that runs already. Its model is the first it lists, unless one is named."""
    name, _, url = spec.partition("=")
    model = options.model
    target = _target(url, options)
    if not options.model_given:
        request = urllib.request.Request(f"{url.rstrip('/')}/models")
        if target.key:
            request.add_header("Authorization", f"Bearer {target.key}")
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                model = str(json.load(answer)["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise BenchmarkError(f"{name}: {url} lists no models ({error}); name one with --model") from error
    return Server(name, dataclasses.replace(target, model=model), options)


def _target(url: str, options: argparse.Namespace) -> Target:
    key = os.environ.get(options.api_key_env) if options.api_key_env else None
    if options.api_key_env and not key:
        raise BenchmarkError(f"--api-key-env: the variable {options.api_key_env} is not set")
    return Target(url.rstrip("/"), options.model, key, options.encoding_format)


# ------------------------------------------------------------------------------------------------------------- figures

Figures = dict[str, list[Round]]


def summary(party: Party, scenario: Scenario, rounds: Sequence[Round], tokens_a_text: float) -> dict[str, Any]:
    """The figures of one party in one scenario.

    tokens_a_text: what the first party counted; servers that count characters instead would look fast.
    """
    errors: dict[str, int] = {}
    for round_ in rounds:
        for name, count in round_.errors.items():
            errors[name] = errors.get(name, 0) + count
    found: dict[str, Any] = {"requests": sum(len(round_.samples) for round_ in rounds), "errors": errors}
    # Pauses between requests make a rate meaningless.
    if not scenario.pause:
        found["texts_per_second"] = spread([round_.texts_per_second for round_ in rounds], 1)
        found["tokens_per_second"] = spread([round_.texts_per_second * tokens_a_text for round_ in rounds], 0)
    # One call of everything has no latency worth the name.
    if any(len(round_.samples) > 1 for round_ in rounds):
        for share in (50, 90, 99):
            found[f"p{share}_ms"] = spread([round_.latency(share / 100) * 1e3 for round_ in rounds], 2)
    if isinstance(party, Server):
        found["prompt_tokens_a_text"] = counted_tokens(rounds)
        # How busy the client was, of one core: near 1 it is the client that was measured.
        found["client_cores"] = spread([round_.cpu_seconds / round_.seconds for round_ in rounds], 3)
        found["sent_late_p99_ms"] = spread([round_.lateness(0.99) * 1e3 for round_ in rounds], 2)
    return found


def counted_tokens(rounds: Sequence[Round]) -> float:
    """Tokens a text, as the party counts them; 0 if it does not."""
    answered = [sample for round_ in rounds for sample in round_.answered]
    return round(sum(sample.tokens for sample in answered) / max(1, sum(sample.texts for sample in answered)), 2)


def ratios(scenario: Scenario, figures: Figures) -> dict[str, dict[str, float] | None]:
    """How many times better the first party is than each other: texts a second, or median latency."""
    (first, ours), *others = figures.items()
    found = {}
    for name, theirs in others:
        # An open loop has its own rate for each party.
        if scenario.clients == 0:
            continue
        pairs = list(zip(ours, theirs, strict=True))
        if scenario.is_rate:
            values = [a.texts_per_second / b.texts_per_second if b.answered else math.nan for a, b in pairs]
        else:
            values = [b.latency(0.5) / a.latency(0.5) for a, b in pairs]
        found[f"{first} / {name}"] = spread(values, 2)
    return found


def table(line: dict[str, Any]) -> str:
    """A scenario for people."""
    loop = (
        f"{line['clients']} clients, {line['texts_a_request']} texts a request, "
        f"{line['requests_a_round']} requests a round"
        if line["clients"]
        else f"Poisson arrivals of single texts, {line['seconds_a_round']:g} s a round"
    )
    rows = [f"{line['scenario']}: {loop}, {line['tokens_a_text']} tokens a text, {line['rounds']} rounds"]
    heads = ("texts/s", "tokens/s", "p50 ms", "p90 ms", "p99 ms")
    rows.append(f"  {'':26}" + "".join(f"{name:>24}" for name in heads) + "  errors")
    for party, found in line["parties"].items():
        names = ("texts_per_second", "tokens_per_second", "p50_ms", "p90_ms", "p99_ms")
        cells = [_cell(found.get(name)) for name in names]
        errors = ", ".join(f"{count} x {name}" for name, count in found["errors"].items()) or "-"
        rows.append(f"  {party:26}" + "".join(f"{cell:>24}" for cell in cells) + f"  {errors}")
        if not line["clients"]:
            rows.append(
                f"  {'':26}  at {found['rate']} requests/s of {found['crowd_requests_per_second']} that it reached"
            )
    for pair, found in line["times_better"].items():
        rows.append(f"  {pair}: {_cell(found)} x")
    limit = line["client_limit"]
    rows.append(
        f"  the client's limit: {limit['texts_per_second']:,.0f} texts/s, p50 {limit['p50_ms']} ms, "
        f"{limit['cpu_us_a_request']} us a request"
    )
    return "\n".join(rows)


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return "-"
    digits = 0 if found["highest"] >= 1000 else 1 if found["highest"] >= 50 else 2
    median, lowest, highest = (f"{found[name]:,.{digits}f}" for name in ("median", "lowest", "highest"))
    return f"{median} ({lowest}–{highest})"


# ----------------------------------------------------------------------------------------------------------- the run


class Progress:
    """Where the run is, on standard error: one line that changes on a terminal, a line a step elsewhere."""

    def __init__(self, seconds: float) -> None:
        self._started, self._seconds = time.monotonic(), seconds

    @property
    def left(self) -> float:
        """Seconds of the run's budget."""
        return self._started + self._seconds - time.monotonic()

    def say(self, text: str) -> None:
        """What is done now."""
        line = f"{time.monotonic() - self._started:4.0f} s of at most {self._seconds:.0f}: {text}"
        if sys.stderr.isatty():
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def end(self) -> None:
        """Make room for the table."""
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class Run:
    """The rounds, and what they gave so far."""

    def __init__(self, options: argparse.Namespace, scenarios: Sequence[Scenario], progress: Progress) -> None:
        self.figures: dict[str, Figures] = {scenario.name: {} for scenario in scenarios}
        self.limits: dict[str, dict[str, float]] = {}
        self.lowest_cosine: float | None = None
        self.rounds = 0
        self._options, self._scenarios, self._progress = options, scenarios, progress

    def measure(self, parties: Sequence[Party], words: list[str]) -> None:
        """Warm up, then rounds until all are done or one more would not fit into the budget."""
        self._compare_vectors(parties, words)
        self._measure_client()
        for scenario in self._scenarios:
            for party in parties:
                self._progress.say(f"warm-up, {scenario.name}, {party.name}")
                party.prepare(scenario, self._texts(scenario, words, "warm-up"), self._limits())
        longest = 0.0
        for number in range(1, self._options.rounds + 1):
            if self._progress.left < longest:
                self._progress.say(f"no time for round {number} of {self._options.rounds}")
                return
            started = time.monotonic()
            for scenario in self._scenarios:
                texts = self._texts(scenario, words, number)
                found: dict[str, Round] = {}
                for party in parties:
                    self._progress.say(f"round {number} of {self._options.rounds}, {scenario.name}, {party.name}")
                    if (round_ := party.run(scenario, texts, self._limits())) is not None:
                        found[party.name] = round_
                # Only now: a round is whole or not there.
                for name, round_ in found.items():
                    self.figures[scenario.name].setdefault(name, []).append(round_)
            self.rounds = number
            longest = max(longest, time.monotonic() - started)

    def lines(self, parties: Sequence[Party], described: dict[str, Any]) -> list[dict[str, Any]]:
        """A line a scenario that has at least one whole round."""
        lines = []
        for scenario in self._scenarios:
            figures = self.figures[scenario.name]
            if not figures:
                continue
            counts = [counted_tokens(rounds) for rounds in figures.values()]
            tokens_a_text = next((count for count in counts if count), 0.0)
            found = {}
            for party in parties:
                if party.name in figures:
                    facts = dict(party.facts)
                    if isinstance(facts.get("batch_size"), dict):
                        facts["batch_size"] = facts["batch_size"].get(scenario.name, 1)
                    if scenario.clients:
                        facts = {name: fact for name, fact in facts.items() if name not in RATE_FACTS}
                    found[party.name] = {**facts, **summary(party, scenario, figures[party.name], tokens_a_text)}
            first = next(iter(figures.values()))
            lines.append(
                {
                    "benchmark": "http",
                    "scenario": scenario.name,
                    "texts": scenario.kind,
                    "words": WORDS[scenario.kind],
                    "loop": "closed" if scenario.clients else "open",
                    "clients": scenario.clients,
                    "texts_a_request": scenario.size,
                    "requests_a_round": scenario.requests,
                    "seconds_a_round": None if scenario.clients else self._options.open_seconds,
                    "encoding_format": self._options.encoding_format,
                    "rounds": len(first),
                    "tokens_a_text": tokens_a_text,
                    "parties": found,
                    "times_better": ratios(scenario, figures),
                    "lowest_cosine": self.lowest_cosine,
                    "client_limit": self.limits[scenario.name],
                    "machine": described,
                }
            )
        return lines

    def _texts(self, scenario: Scenario, words: list[str], number: int | str) -> list[list[str]]:
        # New texts each round, so that no cache of results is measured.
        count = scenario.requests or 20 * CROWD
        flat = texts_of(scenario.kind, count * scenario.size, words, f"{SEED} {scenario.name} {number}")
        return [flat[start : start + scenario.size] for start in range(0, len(flat), scenario.size)]

    def _limits(self) -> Limits:
        return Limits(self._options.timeout, max(0.1, self._progress.left))

    def _compare_vectors(self, parties: Sequence[Party], words: list[str]) -> None:
        texts = texts_of("mixed", 8, words)
        found = {}
        for party in parties:
            self._progress.say(f"vectors of {party.name}")
            vectors = party.vectors(texts, self._limits())
            found[party.name] = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        first, *others = found.items()
        for name, vectors in others:
            cosine = float((first[1] * vectors).sum(axis=1).min()) if vectors.shape == first[1].shape else -1.0
            self.lowest_cosine = round(min(cosine, 1.0 if self.lowest_cosine is None else self.lowest_cosine), 6)
            if cosine < 0.999:
                print(f"\n{first[0]} and {name} do not do the same work: cosine {cosine:.4f}", file=sys.stderr)

    def _measure_client(self) -> None:
        self._progress.say("the client's own limit")
        with Stub(dimension=384) as stub:
            for scenario in self._scenarios:
                target = stub.target(scenario.size, self._options.encoding_format)
                requests = [target.request(["a few words of text"] * scenario.size)] * max(200, 4000 // scenario.size)
                found = closed_loop(target, requests, scenario.clients or CROWD, timeout=30, within=60)
                self.limits[scenario.name] = {
                    "texts_per_second": round(found.texts_per_second),
                    "p50_ms": round(found.latency(0.5) * 1e3, 3),
                    "cpu_us_a_request": round(found.cpu_seconds / len(requests) * 1e6, 1),
                }


RATE_FACTS = ("rate", "crowd_requests_per_second")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""

    def spec(value: str) -> str:
        name, _, url = value.partition("=")
        if not name or urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise argparse.ArgumentTypeError(f"expected NAME=URL, as in ours=http://127.0.0.1:8000/v1, not {value!r}")
        return value

    def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
        def parse_(value: str) -> float:
            number = kind(value)
            if not number > 0:
                raise argparse.ArgumentTypeError(f"expected more than 0, not {value}")
            return number

        return parse_

    names = [scenario.name for scenario in SCENARIOS]
    parser = argparse.ArgumentParser(
        prog="python -m embedserve.benchmarks.http_load",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("servers", nargs="*", type=spec, metavar="NAME=URL", help="a server that runs, by its base_url")
    parser.add_argument("--embedserve", action="store_true", help="start this server, the first party")
    parser.add_argument("--embedserve-options", default="", help="more of its options, in one string")
    parser.add_argument("--infinity", type=Path, metavar="ENVIRONMENT", help="start Infinity from this environment")
    parser.add_argument(
        "--infinity-options",
        nargs="+",
        default=INFINITY,
        metavar="OPTIONS",
        help="its options in one string; several strings are several parties",
    )
    parser.add_argument("--sentence-transformers", action="store_true", help="include the library, in process")
    parser.add_argument("--model", help="id of the model; otherwise what a running server lists first, or MiniLM")
    parser.add_argument("--models-dir", type=Path, help="where the models' folders lie")
    parser.add_argument("--device", default="cpu", help="of the parties that this script starts: cpu or cuda")
    parser.add_argument("--dtype", default="float32", help="of the parties that this script starts")
    parser.add_argument("--encoding-format", choices=["base64", "float"], default="base64", help="of the answers")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="variable with a key, sent to all servers")
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, help="what to measure")
    parser.add_argument("--rounds", type=positive(int), default=5, help="turns of each party, if the time is enough")
    parser.add_argument("--seconds", type=positive(float), default=300, help="budget of the whole run")
    parser.add_argument("--clients", type=positive(int), help="instead of the scenarios' own, where there are many")
    parser.add_argument("--texts", type=positive(int), help="a request, instead of the scenarios' own, where many")
    parser.add_argument("--scale", type=positive(float), default=1.0, help="times the requests a round")
    parser.add_argument("--load", type=positive(float), default=0.8, help="of an open loop: share of the rate reached")
    parser.add_argument("--rate", type=positive(float), help="of an open loop: requests a second, instead of --load")
    parser.add_argument("--open-seconds", type=positive(float), default=5.0, help="of an open loop, a round")
    parser.add_argument("--timeout", type=positive(float), default=60.0, help="of a request, in seconds")
    parser.add_argument("--output", default=str(RESULTS), help="file that the lines are appended to, - for none")
    options = parser.parse_args(arguments)
    if not (options.servers or options.embedserve or options.infinity or options.sentence_transformers):
        parser.error("nothing to measure: name a server as NAME=URL, or --embedserve")
    options.model_given = options.model is not None
    options.model = options.model or MODEL
    return options


def chosen(options: argparse.Namespace) -> list[Scenario]:
    """The scenarios, as the options change them."""
    found = []
    for scenario in SCENARIOS:
        if scenario.name not in options.scenarios:
            continue
        changes: dict[str, Any] = {"requests": math.ceil(scenario.requests * options.scale)}
        if options.clients and scenario.clients > 1:
            changes["clients"] = options.clients
        if options.texts and scenario.size > 1:
            changes["size"] = options.texts
        found.append(dataclasses.replace(scenario, **changes))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison, print the tables, write the lines. The exit status."""
    options = parse(arguments)
    # A polite end is an interruption: what was measured is kept, what was started is ended.
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    scenarios = chosen(options)
    progress = Progress(options.seconds)
    run = Run(options, scenarios, progress)
    others = machine.Others()
    time.sleep(1.0)
    described = machine.describe() | {"cores_busy_before": others.cores()}
    parties: list[Party] = []
    status = 0
    try:
        with ExitStack() as stack:
            # MiniLM's words, whatever is served: all vocabularies know them.
            words = vocabulary(locate(MODEL, options.models_dir))
            reference = None
            if options.sentence_transformers or options.infinity:
                folder = locate(options.model, options.models_dir)
            if options.sentence_transformers:
                # Loads while the servers start.
                reference = SentenceTransformers(folder, options)
                stack.callback(reference.close)
            if options.embedserve:
                progress.say("starting embedserve")
                parties.append(stack.enter_context(embedserve(options)))
            parties += [running(spec, options) for spec in options.servers]
            for more in options.infinity_options if options.infinity else ():
                progress.say(f"starting Infinity {more}")
                parties.append(stack.enter_context(infinity(options, folder, more)))
            if reference is not None:
                progress.say("loading sentence-transformers")
                reference.wait_ready()
                parties.append(reference)
            if len({party.name for party in parties}) < len(parties):
                raise BenchmarkError("two parties have the same name: name the servers, or their batch sizes, apart")
            run.measure(parties, words)
    except KeyboardInterrupt:
        status = 130
    except TimeoutError:
        progress.say(f"the {options.seconds:.0f} s are over")
        status = 0 if run.rounds else 1
    except (BenchmarkError, ModelError, OSError) as error:
        progress.end()
        print(f"http_load: {error}", file=sys.stderr)
        status = 1
    finally:
        signal.signal(signal.SIGTERM, before)
    progress.end()
    lines = run.lines(parties, described)
    for line in lines:
        print(table(line), end="\n\n")
        jsonl.append(line, options.output)
    if lines and options.output != "-":
        print(f"{len(lines)} lines appended to {Path(options.output).name}")
    return status


if __name__ == "__main__":
    sys.exit(main())
