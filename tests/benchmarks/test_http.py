"""`embedserve bench http` against servers that answer well, and against those that do not."""

import argparse
import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedserve.benchmarks import bench
from embedserve.benchmarks.parties import Scenario, Texts
from embedserve.benchmarks.texts import common_words

QUICK = ["--clients", "2", "--shares", "--rounds", "2", "--seconds", "0.2", "--timeout", "1"]

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def read_request(reader: asyncio.StreamReader) -> tuple[str, dict[str, object]]:
    """Path and body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    length = next((int(line.split(":")[1]) for line in head.split("\r\n") if line.lower().startswith("content-l")), 0)
    body = await reader.readexactly(length)
    return head.split(" ")[1], json.loads(body) if body else {}


def answer(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body


def embeddings(asked: dict[str, object], vector: list[float]) -> bytes:
    texts = asked["input"]
    assert isinstance(texts, list)
    rows = [{"object": "embedding", "index": row, "embedding": vector} for row in range(len(texts))]
    return answer("200 OK", json.dumps({"data": rows, "usage": {"prompt_tokens": 5 * len(texts)}}).encode())


async def good(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, vector: tuple[float, ...] = (0.6, 0.8)
) -> None:
    while True:
        path, asked = await read_request(reader)
        if path.endswith("/models"):
            writer.write(answer("200 OK", b'{"data": [{"id": "tiny"}]}'))
        else:
            assert asked["model"] == "tiny"
            writer.write(embeddings(asked, list(vector)))


async def other_vectors(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await good(reader, writer, (0.8, -0.6))


async def refuses_requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(answer("503 Service Unavailable", b'{"error": {"message": "full"}}'))


async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def drips(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await read_request(reader)
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    while True:
        writer.write(b" ")
        await asyncio.sleep(0.05)


async def speaks_no_http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read(10)
    writer.write(b"\x00\xff what?\r\n\r\n")


async def speaks_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mail.example ESMTP\r\n")
    await asyncio.sleep(60)


async def is_a_web_page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(answer("200 OK", b"<html>Welcome</html>"))


async def gives_too_few_vectors(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        await read_request(reader)
        writer.write(answer("200 OK", b'{"data": [{"index": 0, "embedding": [1.0]}]}'))


def fails_sometimes() -> Handler:
    asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while True:
            _, body = await read_request(reader)
            asked += 1
            failed = asked > 3 and asked % 5 == 0
            writer.write(answer("429 Too Many Requests", b"{}") if failed else embeddings(body, [0.6, 0.8]))

    return handle


def dies_after(requests: int) -> Handler:
    asked = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        while True:
            _, body = await read_request(reader)
            asked += 1
            if asked > requests:
                return
            writer.write(embeddings(body, [0.6, 0.8]))

    return handle


@contextmanager
def serving(*handlers: Handler) -> Iterator[list[str]]:
    """Servers on a thread of their own; their URLs."""
    loop = asyncio.new_event_loop()

    def guarded(handler: Handler) -> Handler:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handler(reader, writer)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        return handle

    async def start() -> list[asyncio.Server]:
        return [await asyncio.start_server(guarded(handler), "127.0.0.1", 0) for handler in handlers]

    servers = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield [f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}" for server in servers]
    finally:

        async def stop() -> None:
            for server in servers:
                server.close()
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def run(output: Path, *arguments: str) -> tuple[int, list[dict]]:
    parser = argparse.ArgumentParser()
    bench.add_options(parser)
    status = bench.run(parser.parse_args(["http", "-o", str(output), *arguments]))
    lines = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    return status, lines


def test_two_servers_are_compared_in_turns(tmp_path: Path) -> None:
    with serving(good, good) as (a, b):
        options = ["--clients", "1", "4", "--shares", "0.01", "--rounds", "2", "--seconds", "0.2", "--texts", "3"]
        status, lines = run(tmp_path / "out", f"a={a}", f"b={b}/v1", *options)
    assert status == 0
    assert [(line["loop"], line["clients"]) for line in lines] == [("closed", 1), ("closed", 4), ("open", 0)]
    for line in lines:
        assert set(line["parties"]) == {"a", "b"}
        assert line["rounds"] == 2
        assert line["parties"]["a"]["errors"] == {}
        assert line["tokens_a_text"] == 5
        assert line["cosines"] == {"a / b": 1.0}
        assert line["parties"]["b"]["p99_ms"]["median"] >= line["parties"]["b"]["p50_ms"]["median"] > 0
    assert set(lines[1]["times_better"]) == {"a / b"}
    reached = lines[2]["parties"]["a"]["crowd_requests_per_second"]
    assert lines[2]["parties"]["a"]["rate"] == pytest.approx(reached / 100, abs=0.1)


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (refuses_requests, "503"),
        (hangs, "TimeoutError"),
        (drips, "TimeoutError"),
        (speaks_no_http, "HttpParserError"),
        (speaks_first, "Error"),
        (is_a_web_page, "200 without embeddings"),
        (gives_too_few_vectors, "holds no vectors"),
    ],
)
def test_server_that_gives_no_vectors_is_out_and_the_others_go_on(
    handler: Handler, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(handler, good) as (bad, fine):
        status, lines = run(tmp_path / "out", f"bad={bad}", f"fine={fine}", "--model", "tiny", *QUICK)
    assert status == 1
    assert [set(line["parties"]) for line in lines] == [{"fine"}]
    assert said in lines[0]["out"]["bad"]
    assert "bad could not be measured" in capsys.readouterr().err


def test_address_where_nobody_listens_is_said_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(good) as (fine,):
        status, lines = run(tmp_path / "out", "bad=http://127.0.0.1:9", f"fine={fine}", *QUICK)
    assert (status, len(lines)) == (1, 1)
    assert "ConnectionRefusedError" in capsys.readouterr().err


def test_no_server_at_all_ends_at_once(tmp_path: Path) -> None:
    assert run(tmp_path / "out", "http://127.0.0.1:9", *QUICK) == (1, [])


def test_errors_are_counted_by_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(fails_sometimes()) as (url,):
        status, (line,) = run(tmp_path / "out", f"a={url}", "--model", "tiny", *QUICK)
    found = line["parties"]["a"]
    assert status == 1
    assert set(found["errors"]) == {"429"}
    assert 0 < found["errors"]["429"] < found["requests"]
    assert "answered with errors" in capsys.readouterr().err


def test_server_that_dies_is_out_from_then_on(tmp_path: Path) -> None:
    # One request compares the vectors, the warm-up makes the others.
    with serving(dies_after(3), good) as (mortal, fine):
        status, (line,) = run(tmp_path / "out", f"mortal={mortal}", f"fine={fine}", "--model", "tiny", *QUICK)
    assert status == 1
    assert set(line["out"]) == {"mortal"}
    assert line["parties"]["fine"]["errors"] == {}


def test_servers_that_do_not_do_the_same_work_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(good, other_vectors) as (a, b):
        _, (line,) = run(tmp_path / "out", f"a={a}", f"b={b}", *QUICK)
    assert line["cosines"] == {"a / b": 0.0}
    assert "a and b do not do the same work" in capsys.readouterr().out


def test_interruption_keeps_the_scenarios_that_are_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with serving(good) as (url,):
        program = [sys.executable, "-m", "embedserve.server.cli", "bench", "http", url, "-o", str(output)]
        options = ["--clients", *map(str, range(1, 60)), "--seconds", "0.2", "--rounds", "1"]
        child = subprocess.Popen([*program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        while not (output.exists() and output.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=30)
    assert child.returncode == 130
    assert "interrupted" in said
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert 1 <= len(lines) < 59


def test_tool_for_servers_imports_no_torch() -> None:
    # It runs on machines that have none.
    code = "import sys, embedserve.benchmarks.http; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("text", ["127.0.0.1:8000", "ftp://a", "a=", "http://", "http://a:b"])
def test_what_is_no_url_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected"):
        bench._server(text)
    assert bench._server("a=http://b:1/v1/") == ("a", "http://b:1/v1")
    assert bench._server("http://b:1/v1?x=y") == ("b:1", "http://b:1/v1?x=y")


def test_texts_begin_alike_however_many_are_made() -> None:
    scenario = Scenario("any", "short", clients=4, size=3)
    few = Texts(scenario, common_words(), 1).requests(5)
    many = Texts(scenario, common_words(), 1).requests(500)
    assert few == many[:5]
    assert len(many) == 500
    assert {len(texts) for texts in many} == {3}
    assert Texts(scenario, common_words(), 2).requests(5) != few
