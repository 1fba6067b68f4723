"""The client of the load and its arithmetic, against a stub: no figure is asserted, only what it is counted from."""

import asyncio
import itertools
import json
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from embedserve.benchmarks.jsonl import spread
from embedserve.benchmarks.load import (
    Round,
    Sample,
    Target,
    ask_once,
    closed_loop,
    open_loop,
    percentile,
    poisson_schedule,
)
from embedserve.benchmarks.parties import Scenario
from embedserve.benchmarks.rounds import ratios
from embedserve.benchmarks.stub import Stub
from embedserve.benchmarks.texts import WORDS, texts_of

LIMITS = {"timeout": 10.0, "within": 30.0}


@pytest.fixture(scope="module")
def stub() -> Iterator[Stub]:
    with Stub(dimension=4) as running:
        yield running


class Gate:
    """A server that holds every answer back until it is opened, or `expected` requests are waiting for theirs."""

    def __init__(self) -> None:
        self.expected = 0
        self.waiting = 0
        self.most_waiting = 0
        self.status = "200 OK"
        self.open = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while head := await reader.readuntil(b"\r\n\r\n"):
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            self.waiting += 1
            self.most_waiting = max(self.most_waiting, self.waiting)
            if self.waiting == self.expected:
                self.open.set()
            await self.open.wait()
            self.waiting -= 1
            # Chunked, as proxies answer.
            body = b'{"data": [{"embedding": ""}], "usage": {"prompt_tokens": 7}}'
            head = f"HTTP/1.1 {self.status}\r\ntransfer-encoding: chunked\r\n\r\n{len(body):x}\r\n".encode()
            writer.write(head + body + b"\r\n0\r\n\r\n")


@contextmanager
def gate() -> Iterator[tuple[Gate, Target, asyncio.AbstractEventLoop]]:
    loop = asyncio.new_event_loop()
    held = Gate()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await held.serve(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    server = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield held, Target(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "any"), loop
    finally:

        async def stop() -> None:
            server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def sample(due: float, finished: float, status: int = 200, texts: int = 1, sent: float | None = None) -> Sample:
    return Sample(due, due if sent is None else sent, finished, status, texts, 10 * texts)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.5, 50), (0.9, 90), (0.99, 99), (0.991, 100), (1.0, 100), (0.0, 1), (0.001, 1)]
)
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_percentile_of_one_value_is_that_value() -> None:
    assert [percentile([3.5], share) for share in (0.01, 0.5, 0.99)] == [3.5] * 3


def test_round_counts_only_what_was_answered() -> None:
    found = Round([sample(0.0, 1.0, texts=3), sample(0.0, 3.0, texts=5), sample(0.0, 0.001, status=503)], 4.0, 0.1)
    assert (found.texts_per_second, found.tokens_per_second, found.requests_per_second) == (2.0, 20.0, 0.5)
    assert (found.latency(0.5), found.latency(0.99), found.errors) == (1.0, 3.0, {"503": 1})


def test_round_without_an_answer_has_no_latency() -> None:
    found = Round([sample(0.0, 1.0, status=500)], 1.0, 0.1)
    assert spread([found.latency(0.5)], 1) is None


def test_latency_counts_from_when_a_request_was_due() -> None:
    found = Round([sample(due=1.0, sent=4.0, finished=5.0)], 5.0, 0.1)
    assert (found.latency(0.5), found.lateness(0.5)) == (4.0, 3.0)


def test_poisson_schedule_has_its_rate_and_its_spread() -> None:
    due = poisson_schedule(100, 200, seed=1)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert due == sorted(due)
    assert due == poisson_schedule(100, 200, seed=1)
    assert due[-1] < 200
    assert statistics.mean(gaps) == pytest.approx(0.01, rel=0.03)
    # Exponential gaps: as wide as their mean.
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.05)


def test_closed_loop_sends_each_request_once(stub: Stub) -> None:
    target = stub.target(3)
    found = closed_loop(target, [target.request(["a", "b", "c"])] * 50, 4, **LIMITS)
    assert len(found.answered) == 50
    assert sum(each.texts for each in found.samples) == 150
    assert {each.tokens for each in found.samples} == {3}
    assert all(each.due == each.sent <= each.finished for each in found.samples)


@pytest.mark.parametrize(("encoding_format", "kind"), [("base64", str), ("float", list)])
def test_stub_answers_in_the_format_asked_for(stub: Stub, encoding_format: str, kind: type) -> None:
    status, body = ask_once(stub.target(2, encoding_format), ["a", "b"], timeout=10)
    assert status == 200
    assert [type(row["embedding"]) for row in json.loads(body)["data"]] == [kind, kind]


def test_closed_loop_waits_for_an_answer_before_it_asks_again() -> None:
    with gate() as (held, target, _):
        held.expected = 2
        found = closed_loop(target, [target.request(["a"])] * 6, 2, **LIMITS)
    assert held.most_waiting == 2
    assert len(found.answered) == 6
    assert {each.tokens for each in found.samples} == {7}


def test_open_loop_does_not_leave_out_who_should_have_come_during_a_stall() -> None:
    due = [0.0, 0.01, 0.02, 0.03, 0.04, 0.05]
    with gate() as (held, target, _):
        held.expected = len(due)
        found = open_loop(target, [target.request(["a"])] * len(due), due, **LIMITS)
    # The gate opens only because all six left without waiting for one another.
    assert len(found.answered) == 6
    starts = sorted(each.due for each in found.samples)
    assert [start - starts[0] for start in starts] == pytest.approx(due)
    assert all(each.sent >= each.due for each in found.samples)
    last_due = starts[-1]
    assert all(each.finished - each.due >= last_due - each.due for each in found.samples)


def test_refusals_and_dead_ports_are_errors_and_not_fast_answers() -> None:
    with gate() as (held, target, loop):
        held.status = "503 Service Unavailable"
        loop.call_soon_threadsafe(held.open.set)
        found = closed_loop(target, [target.request(["a"])] * 3, 1, **LIMITS)
    assert (found.errors, found.texts_per_second) == ({"503": 3}, 0.0)
    status, body = ask_once(target, ["a"], timeout=10)
    assert (status, body) == (0, b"ConnectionRefusedError")


def test_request_without_an_answer_is_given_up() -> None:
    with gate() as (_, target, _):
        found = closed_loop(target, [target.request(["a"])] * 2, 2, timeout=0.05, within=10)
    assert found.errors == {"TimeoutError": 2}


def test_load_that_does_not_end_in_time_is_given_up() -> None:
    with gate() as (_, target, _), pytest.raises(TimeoutError):
        closed_loop(target, [target.request(["a"])] * 2, 2, timeout=10, within=0.05)


def test_texts_are_the_same_for_the_same_seed_and_within_their_bounds() -> None:
    words = ["river", "stone", "old", "tree"]
    for kind, (lowest, highest) in WORDS.items():
        texts = texts_of(kind, 50, words)
        assert texts == texts_of(kind, 50, words)
        assert all(lowest <= len(text.split()) <= highest for text in texts)
    assert texts_of("short", 5, words, "round 1") != texts_of("short", 5, words, "round 2")


def test_ratios_are_taken_inside_each_round() -> None:
    def rounds(*texts_per_second: float) -> list[Round]:
        return [Round([sample(0.0, 1.0)], 1 / rate, 0.0) for rate in texts_per_second]

    # The machine became four times slower between the rounds; their relation did not change.
    figures = {"ours": rounds(400, 100), "theirs": rounds(200, 50)}
    found = ratios(Scenario("any", "short", clients=4, size=1), figures)
    assert found == {"ours / theirs": {"median": 2.0, "lowest": 2.0, "highest": 2.0}}
