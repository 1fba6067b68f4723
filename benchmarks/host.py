"""What does a request cost each process of the server, in microseconds of CPU?

A real server in all but its engine: front ends, broker and supervisor are those of `embedserve serve`, and a stub
speaks `server/wire.py` as an engine does, and answers every batch at once with constant vectors of `--width` floats. So
what is measured is what stands between an HTTP client and a device that takes no time. The texts are random words, 8 to
16 each; every client waits for its answer before it asks again.

CPU time is the kernel's, of all threads of a process, between the first request and the last answer; what other work
on the machine takes does not enter it, though a busy neighbour's use of the caches does. Requests a second are those of
this machine, where the client, the stub and everything else share the cores; `front_end_limit` is what one core could
do if front ends had it to themselves: a million over their microseconds.

    python -m embedserve.benchmarks.host
    python -m embedserve.benchmarks.host --loads 16x1 --rounds 7 --label "before" --output -

A load is CLIENTSxTEXTS, or CLIENTSxTEXTSf for JSON floats instead of base64. Ends in one JSON line a load, appended to
benchmarks/results/host.jsonl.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import signal
import socket
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection as Pipe
from pathlib import Path

import numpy as np

from embedserve.benchmarks import jsonl
from embedserve.benchmarks.load import Request, Target, ask_once, closed_loop
from embedserve.benchmarks.machine import describe
from embedserve.benchmarks.texts import SEED, vocabulary
from embedserve.server import config, log, wire
from embedserve.server.arrays import Rows, pack
from embedserve.server.process import Liveness, run
from embedserve.server.served import find_models
from embedserve.server.supervisor import Supervisor

RESULTS = jsonl.FOLDER / "host.jsonl"

LOADS = ("1x1", "16x1", "64x1", "16x1f", "16x32", "16x64", "16x64f")

WORDS = (8, 16)

BATCH_TOKENS = 16_384
"""The stub's bound of a batch: about what a GPU takes."""


class StubEngine:
    """An engine to the broker, but no text is read: all vectors are the same, all batches take no time."""

    def __init__(self, model: str, width: int) -> None:
        self._model = model
        self._vector = np.linspace(-1, 1, width, dtype="<f4")

    async def serve(self, address: str, alive: Liveness) -> None:
        """Serve the broker at `address` until the supervisor has gone."""
        connection = await wire.connect(address, lambda: wire.FramedConnection(self._on_frame, lambda _: None))
        connection.send(wire.Hello("engine", os.getpid()))
        ready = wire.ModelReady(self._model, "text", BATCH_TOKENS, "packed", "none", "float32", "stub")
        connection.send(wire.EngineReady([ready]))
        connection.send(wire.Pull())
        alive.ready()
        while await alive.beat():
            pass

    def _on_frame(self, connection: wire.FramedConnection, message: wire.Message, payload: bytes) -> None:
        assert isinstance(message, wire.Run)
        lengths = np.frombuffer(payload, dtype="<i4", count=message.rows)
        vectors = Rows(np.full(message.rows, len(self._vector), np.int32), np.tile(self._vector, message.rows))
        names, buffers = pack({"dense": vectors})
        connection.send(wire.BatchDone(message.batch, names, 1e-6, int(lengths.sum()), []), buffers)
        connection.send(wire.Pull())


class StubbedSupervisor(Supervisor):
    """The processes of a server, its engines stubs whose vectors have `width` floats."""

    width = 384

    def _engine(self, _device: str, _cores: set[int], alive: Liveness, _again: bool) -> None:
        stub = StubEngine(self._models.local[0].id, self.width)
        run(partial(stub.serve, self._broker_address, alive))


def _serve(pipe: Pipe, width: int, front_ends: int) -> None:
    """In a process of its own: a server on a free port, until it is told to end."""
    settings = config.load({"rate_limit": 0, "front_ends": front_ends, "log_level": "info"}, environment={})
    # The lines of the log are written, as they are by a server, to where they disturb nobody.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    log.set_up("json", settings.log_level)
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    models = find_models(settings)
    pipe.send((listener.getsockname()[1], models.local[0].id, str(models.local[0].config.folder)))
    supervisor = StubbedSupervisor(settings, models, listener)
    supervisor.width = width
    supervisor.run()


@dataclass(frozen=True)
class Server:
    """A running server: where to ask, a folder with the tokenizer, and the ids of its processes by kind."""

    target: Target
    folder: Path
    processes: dict[str, list[int]]

    def cpu_seconds(self) -> dict[str, float]:
        """What the processes of each kind have used so far."""
        return {kind: sum(map(_cpu_seconds, ids)) for kind, ids in self.processes.items()}


@contextmanager
def server(width: int, front_ends: int) -> Iterator[Server]:
    """A server with a stub for an engine. Raises `RuntimeError` where it does not answer within a minute."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs, width, front_ends))
    process.start()
    try:
        if not ours.poll(60):
            raise RuntimeError("the server did not start")
        port, model, folder = ours.recv()
        target = Target(f"http://127.0.0.1:{port}/v1", model)
        until = time.monotonic() + 60
        while ask_once(target, ["ready"], timeout=5)[0] != 200:
            if time.monotonic() > until:
                raise RuntimeError("the server did not answer")
            time.sleep(0.1)
        assert process.pid is not None
        yield Server(target, Path(folder), _processes(process.pid))
    finally:
        if process.pid is not None and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
        process.join(30)


def _processes(parent: int) -> dict[str, list[int]]:
    """The server's children by kind, as `ps` shows them."""
    found: dict[str, list[int]] = {"front end": [], "broker": [], "engine": []}
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        kind = Path(f"/proc/{child}/comm").read_text().strip().removeprefix("es ")
        if kind in found:
            found[kind].append(int(child))
    return found


def _cpu_seconds(process: int) -> float:
    """CPU time of another process, its threads included, to the nanosecond."""
    # clock_getcpuclockid(3), which Python has for threads alone: the process's id in the upper bits, 2 for CPU time.
    return time.clock_gettime_ns((~process << 3) | 2) / 1e9


def requests_of(server: Server, texts: int, encoding_format: str, count: int) -> list[Request]:
    """`count` different requests of so many texts."""
    words = vocabulary(server.folder)
    chance = random.Random(SEED)
    target = Target(server.target.url, server.target.model, encoding_format=encoding_format)
    return [
        target.request([" ".join(chance.choices(words, k=chance.randint(*WORDS))) for _ in range(texts)])
        for _ in range(count)
    ]


def measure(server: Server, requests: Sequence[Request], clients: int) -> dict[str, float]:
    """Requests a second, and microseconds of CPU a request of each kind of process."""
    before = server.cpu_seconds()
    round_ = closed_loop(server.target, requests, clients, timeout=30, within=120)
    after = server.cpu_seconds()
    if round_.errors:
        raise RuntimeError(f"the server answered {round_.errors}")
    micro = {kind: (after[kind] - before[kind]) / len(requests) * 1e6 for kind in after}
    return {"requests_per_second": round_.requests_per_second, "p50_ms": round_.latency(0.5) * 1e3, **micro}


def main() -> None:
    """Run the loads in turn, several rounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", nargs="+", default=LOADS, metavar="LOAD")
    parser.add_argument("--width", type=int, default=384, help="floats of a vector")
    parser.add_argument("--front-ends", type=int, default=1)
    parser.add_argument("--texts", type=int, default=8000, help="of a round, of loads with few texts a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--label", default="", help="to tell these lines from others")
    parser.add_argument("--output", type=Path, default=RESULTS, help="- for none")
    options = parser.parse_args()
    loads = {load: _parse(parser, load) for load in options.loads}

    found: dict[str, list[dict[str, float]]] = {load: [] for load in loads}
    with server(options.width, options.front_ends) as running:
        requests = {
            load: requests_of(running, texts, encoding, max(200, min(4000, options.texts // texts)))
            for load, (_, texts, encoding) in loads.items()
        }
        for load, (clients, _, _) in loads.items():
            measure(running, requests[load][:200], clients)
        for _ in range(options.rounds):
            for load, (clients, _, _) in loads.items():
                found[load].append(measure(running, requests[load], clients))

    print(f"{'load':>8} {'front end':>10} {'broker':>8} {'stub':>8} {'requests/s':>11} {'front_end_limit':>16}")
    for load, rounds in found.items():
        median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
        limit = 1e6 / median["front end"]
        print(
            f"{load:>8} {median['front end']:>7.0f} us {median['broker']:>5.0f} us {median['engine']:>5.0f} us "
            f"{median['requests_per_second']:>11.0f} {limit:>16.0f}"
        )
        clients, texts, encoding = loads[load]
        line = {
            "benchmark": "host",
            "label": options.label,
            "clients": clients,
            "texts": texts,
            "encoding_format": encoding,
            "width": options.width,
            "front_ends": options.front_ends,
            "rounds": options.rounds,
            "front_end_us": round(median["front end"], 1),
            "front_end_us_spread": [round(f(r["front end"] for r in rounds), 1) for f in (min, max)],
            "broker_us": round(median["broker"], 1),
            "stub_us": round(median["engine"], 1),
            "requests_per_second": round(median["requests_per_second"]),
            "p50_ms": round(median["p50_ms"], 2),
            "machine": describe(),
        }
        jsonl.append(line, options.output)


def _parse(parser: argparse.ArgumentParser, load: str) -> tuple[int, int, str]:
    """(clients, texts a request, encoding)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(f?)", load)
    if found is None:
        parser.error(f"{load!r} is no load; write CLIENTSxTEXTS, such as 16x1, and f behind it for floats")
    return int(found[1]), int(found[2]), "float" if found[3] else "base64"


if __name__ == "__main__":
    main()
