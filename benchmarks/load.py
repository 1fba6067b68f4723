"""HTTP load on an OpenAI-shaped embeddings API: a client that costs little.

Requests are bytes before the clock starts, connections are open before it starts and stay open, an answer is parsed by
C and its body only searched for the token count. What the client itself takes is measured against `stub.Stub`.

Whatever a server does becomes a sample: a refusal, a hang, a body that is no answer. None of them ends the load, and a
client that met one waits a little, so that a server which refuses at once is not asked a hundred thousand times.

Two ways of asking. `closed_loop`: N clients, each waiting for its answer before it asks again: the rate a server gives
to N callers. `open_loop`: requests leave at times drawn beforehand, whether or not earlier ones were answered, and
latency counts from the time a request was due: a server that stalls makes all who should have come meanwhile wait, and
they are counted (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import re
import selectors
import ssl
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import httptools
import uvloop

__all__ = [
    "Request",
    "Round",
    "Sample",
    "Target",
    "ask_once",
    "closed_loop",
    "get",
    "open_loop",
    "percentile",
    "poisson_schedule",
]

# An open loop does not open more: beyond it the requests wait at the client, with their clocks running.
MAX_CONNECTIONS = 512
# Seconds that a client waits after a request that failed.
ERROR_PAUSE = 0.05
# Bytes of an answer. 2048 vectors of 4096 numbers, in digits, take 170 MB.
LARGEST_ANSWER = 1 << 28
T = TypeVar("T")
_PROMPT_TOKENS = re.compile(rb'"prompt_tokens"\s*:\s*(\d+)')


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of all are not above (nearest rank): never one that was not measured."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def poisson_schedule(rate: float, seconds: float, seed: int | str) -> list[float]:
    """Seconds from the start at which requests are due: a Poisson process of `rate` a second."""
    chance = random.Random(seed)
    due: list[float] = []
    now = chance.expovariate(rate)
    while now < seconds:
        due.append(now)
        now += chance.expovariate(rate)
    return due


@dataclass(frozen=True)
class Request:
    """One request as it goes over the wire, and how many texts are in it; 0 where it does not ask for vectors."""

    data: bytes
    texts: int


@dataclass(frozen=True)
class Sample:
    """What became of a request. Times are seconds of `time.perf_counter`; `due` is where latency counts from.

    status: of HTTP, or 0 without an answer. tokens: `usage.prompt_tokens`, 0 where there is none.
    """

    due: float
    sent: float
    finished: float
    status: int
    texts: int
    tokens: int
    error: str = ""


@dataclass(frozen=True)
class Round:
    """One run of a load. seconds: from the first request's time to the last answer. cpu_seconds: the client's own."""

    samples: list[Sample]
    seconds: float
    cpu_seconds: float

    @property
    def answered(self) -> list[Sample]:
        """Those answered with 200."""
        return [sample for sample in self.samples if sample.status == 200]

    @property
    def errors(self) -> dict[str, int]:
        """What the others met, and how often."""
        met: dict[str, int] = {}
        for sample in self.samples:
            if sample.status != 200:
                name = sample.error or str(sample.status)
                met[name] = met.get(name, 0) + 1
        return met

    @property
    def requests_per_second(self) -> float:
        """Requests answered with 200, a second."""
        return len(self.answered) / self.seconds

    @property
    def texts_per_second(self) -> float:
        """Texts of requests answered with 200, a second."""
        return sum(sample.texts for sample in self.answered) / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens, as the server counts them, a second."""
        return sum(sample.tokens for sample in self.answered) / self.seconds

    def latency(self, share: float) -> float:
        """Percentile of the seconds from when a request was due to the end of its answer; NaN if none was answered."""
        answered = self.answered
        return percentile([sample.finished - sample.due for sample in answered], share) if answered else math.nan

    def lateness(self, share: float) -> float:
        """Percentile of the seconds by which requests left late: the client's fault, or no connection was free."""
        return percentile([sample.sent - sample.due for sample in self.samples], share) if self.samples else math.nan


@dataclass(frozen=True)
class Target:
    """Where to ask. url: as an OpenAI client's `base_url`, such as http://127.0.0.1:8000/v1."""

    url: str
    model: str
    key: str | None = None
    encoding_format: str = "base64"

    def request(self, texts: Sequence[str]) -> Request:
        """POST …/embeddings with these texts."""
        split = urlsplit(self.url)
        fields = {"model": self.model, "input": list(texts), "encoding_format": self.encoding_format}
        body = json.dumps(fields).encode()
        head = [
            f"POST {split.path.rstrip('/')}/embeddings HTTP/1.1",
            f"Host: {split.netloc.rpartition('@')[2]}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Accept: application/json",
        ]
        return Request(self._head(head) + body, len(texts))

    def get(self, path: str) -> Request:
        """GET a path below the URL."""
        split = urlsplit(self.url)
        head = [f"GET {split.path.rstrip('/')}{path} HTTP/1.1", f"Host: {split.netloc.rpartition('@')[2]}"]
        return Request(self._head(head), 0)

    def _head(self, lines: list[str]) -> bytes:
        if self.key:
            lines = [*lines, f"Authorization: Bearer {self.key}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()


class _Exchange(asyncio.Protocol):
    """A connection that carries one request at a time."""

    def __init__(self) -> None:
        self.closed = False
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[tuple[int, bytes, float]] | None = None
        self._parser: Any = None
        self._body: list[bytes] = []
        self._size = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's is none by its class.
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("closed without an answer"))

    def data_received(self, data: bytes) -> None:
        if self._parser is None:
            # An answer before the question.
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self._answer and not self._answer.done():
                self._answer.set_exception(error)
            self.close()

    # What httptools calls.

    def on_body(self, body: bytes) -> None:
        self._body.append(body)
        self._size += len(body)
        if self._size > LARGEST_ANSWER:
            if self._answer and not self._answer.done():
                self._answer.set_exception(OverflowError(f"an answer of more than {LARGEST_ANSWER} bytes"))
            self.close()

    def on_message_complete(self) -> None:
        finished = time.perf_counter()
        if not self._parser.should_keep_alive():
            self.close()
        if self._answer and not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), b"".join(self._body), finished))

    def send(self, data: bytes) -> asyncio.Future[tuple[int, bytes, float]]:
        """Write a request. The future holds status, body and the time at which the last byte came."""
        assert self._transport is not None
        if self.closed:
            raise ConnectionResetError("closed before it was asked")
        self._body, self._size = [], 0
        self._parser = httptools.HttpResponseParser(self)
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return self._answer

    def close(self) -> None:
        """End the connection."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()


class _Connections:
    """Connections to one address, used again in the order last in, first out."""

    def __init__(self, target: Target, timeout: float) -> None:
        split = urlsplit(target.url)
        assert split.hostname is not None
        self._tls = ssl.create_default_context() if split.scheme == "https" else None
        self._host, self._port = split.hostname, split.port or (443 if self._tls else 80)
        self._timeout = timeout
        self._free: list[_Exchange] = []
        self._all: list[_Exchange] = []
        self._room = asyncio.Semaphore(MAX_CONNECTIONS)

    async def open(self) -> _Exchange:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(self._timeout):
            _, exchange = await loop.create_connection(_Exchange, self._host, self._port, ssl=self._tls)
        self._all.append(exchange)
        return exchange

    async def prepare(self, count: int) -> None:
        """Open connections beforehand; those that cannot be opened are tried again by the requests."""
        opened = await asyncio.gather(*(self.open() for _ in range(count)), return_exceptions=True)
        self._free += [each for each in opened if isinstance(each, _Exchange)]

    async def post(self, request: Request, due: float | None = None) -> tuple[Sample, bytes]:
        """Send and wait for the answer, on a free connection or a new one. due: as the clock of latency starts."""
        status, body, error = 0, b"", ""
        sent = finished = time.perf_counter()
        async with self._room:
            try:
                exchange = self._free.pop() if self._free else await self.open()
                if exchange.closed:
                    exchange = await self.open()
                sent = time.perf_counter()
                try:
                    async with asyncio.timeout(self._timeout):
                        status, body, finished = await exchange.send(request.data)
                except BaseException:
                    exchange.close()
                    raise
                if not exchange.closed:
                    self._free.append(exchange)
            except (OSError, TimeoutError, OverflowError, httptools.HttpParserError) as caught:
                finished = time.perf_counter()
                error = type(caught).__name__
        # Near the beginning in every order of the fields but one, whose `usage` comes first.
        if status == 200 and request.texts and b'"embedding"' not in body[:4096]:
            status, error = 0, "200 without embeddings"
        # Most servers write the usage last.
        found = _PROMPT_TOKENS.search(body, max(0, len(body) - 512)) or _PROMPT_TOKENS.search(body)
        tokens = int(found[1]) if found else 0
        return Sample(sent if due is None else due, sent, finished, status, request.texts, tokens, error), body

    async def close(self) -> None:
        for exchange in self._all:
            exchange.close()
        # They end in the loop's next turn, and the loop may end before it.
        await asyncio.sleep(0)


def closed_loop(
    target: Target,
    requests: Sequence[Request],
    clients: int,
    *,
    timeout: float,
    within: float,
    pause: float = 0.0,
    seconds: float = math.inf,
) -> Round:
    """All requests, each once, from `clients` that each wait for an answer before the next, and `pause` seconds more.

    timeout: of each request, in seconds. within: of all of it; raises TimeoutError. seconds: none is sent after them.
    """

    async def load() -> Round:
        connections = _Connections(target, timeout)
        await connections.prepare(min(clients, len(requests)))
        waiting = iter(requests)
        samples: list[Sample] = []

        async def client() -> None:
            for request in waiting:
                sample, _ = await connections.post(request)
                samples.append(sample)
                if time.perf_counter() >= until:
                    return
                if pause or sample.status != 200:
                    await asyncio.sleep(pause or ERROR_PAUSE)

        try:
            with _undisturbed():
                cpu, started = time.process_time(), time.perf_counter()
                until = started + seconds
                await asyncio.gather(*(client() for _ in range(clients)))
                cpu = time.process_time() - cpu
        finally:
            await connections.close()
        return Round(samples, max(sample.finished for sample in samples) - started, cpu)

    return _run(load(), uvloop.new_event_loop, within)


def open_loop(
    target: Target, requests: Sequence[Request], due: Sequence[float], *, timeout: float, within: float
) -> Round:
    """Request number i leaves `due[i]` seconds after the start, whatever became of those before it.

    due: ascending. timeout: of each request, in seconds, from when it was sent. within: of all of it; raises
    TimeoutError.
    """

    async def load() -> Round:
        connections = _Connections(target, timeout)
        await connections.prepare(8)
        samples: list[Sample] = []
        tasks: set[asyncio.Task[None]] = set()

        async def ask(request: Request, due: float) -> None:
            sample, _ = await connections.post(request, due)
            samples.append(sample)

        try:
            with _undisturbed():
                cpu, started = time.process_time(), time.perf_counter()
                for request, offset in zip(requests, due, strict=True):
                    early = started + offset - time.perf_counter()
                    if early > 0:
                        await asyncio.sleep(early)
                    task = asyncio.create_task(ask(request, started + offset))
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
                await asyncio.gather(*tasks)
                cpu = time.process_time() - cpu
        finally:
            for task in tasks:
                task.cancel()
            await connections.close()
        return Round(samples, max(sample.finished for sample in samples) - started, cpu)

    # epoll and libuv wait in whole milliseconds, select() in microseconds.
    return _run(load(), lambda: asyncio.SelectorEventLoop(selectors.SelectSelector()), within)


def ask_once(target: Target, texts: Sequence[str], *, timeout: float) -> tuple[int, bytes]:
    """One request. Status (0 without an answer) and body, or what went wrong."""
    return _ask(target, target.request(texts), timeout)


def get(target: Target, path: str, *, timeout: float) -> tuple[int, bytes]:
    """GET a path below the target's URL, as `ask_once`."""
    return _ask(target, target.get(path), timeout)


def _ask(target: Target, request: Request, timeout: float) -> tuple[int, bytes]:
    async def ask() -> tuple[int, bytes]:
        connections = _Connections(target, timeout)
        try:
            sample, body = await connections.post(request)
        finally:
            await connections.close()
        if sample.status:
            return sample.status, body
        return 0, sample.error.encode() + (b": " + body if body else b"")

    return _run(ask(), uvloop.new_event_loop, 2 * timeout)


def _run(
    work: Coroutine[Any, Any, T], loop_factory: Callable[[], asyncio.AbstractEventLoop], within: float | None = None
) -> T:
    async def bounded() -> T:
        async with asyncio.timeout(within):
            return await work

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(bounded())


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection inside the clock."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
