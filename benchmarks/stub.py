"""A server that answers every embeddings request with a constant at once: what is measured against it is the client."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import re
import signal
import socket
from multiprocessing.connection import Connection as Pipe
from typing import cast

import uvloop

from embedserve.benchmarks.load import Target

__all__ = ["Stub"]


class Stub:
    """A process that answers every request with a constant, at once. Use it with `with`.

    Its answer has as many vectors as the first part of the path says, so that reading it costs what a real one does.
    """

    def __init__(self, dimension: int) -> None:
        ours, theirs = multiprocessing.Pipe()
        self._pipe = ours
        # Spawned, not forked: a new process has none of this one's threads and files.
        context = multiprocessing.get_context("spawn")
        self._process = context.Process(target=_serve_stub, args=(theirs, dimension), daemon=True)
        self._process.start()
        theirs.close()
        if not ours.poll(30):
            self.__exit__()
            raise RuntimeError("the stub server did not start within 30 s")
        self._port = ours.recv()

    def __enter__(self) -> Stub:
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.terminate()
        self._process.join(10)

    def target(self, texts: int, encoding_format: str = "base64") -> Target:
        """Where requests of this many texts are answered."""
        return Target(f"http://127.0.0.1:{self._port}/{texts}", "stub", encoding_format=encoding_format)


class _StubConnection(asyncio.Protocol):
    _length = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)

    def __init__(self, dimension: int, answers: dict[bytes, bytes]) -> None:
        self._dimension, self._answers = dimension, answers
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        found = self._length.search(self._received, 0, end) if end >= 0 else None
        if found and len(self._received) >= end + 4 + int(found[1]):
            self._transport.write(self._answer(self._received.split(b"/", 2)[1]))
            self._received = b""

    def _answer(self, texts: bytes) -> bytes:
        floats = b'"float"' in self._received[-40:]
        key = texts + b" floats" * floats
        if key not in self._answers:
            vector: object = [0.0123456789] * self._dimension if floats else "A" * math.ceil(self._dimension * 16 / 3)
            rows = [{"object": "embedding", "index": row, "embedding": vector} for row in range(int(texts))]
            usage = {"prompt_tokens": len(rows), "total_tokens": len(rows)}
            body = json.dumps({"object": "list", "data": rows, "model": "stub", "usage": usage}).encode()
            head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            self._answers[key] = head.encode() + body
        return self._answers[key]


def _serve_stub(pipe: Pipe, dimension: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        answers: dict[bytes, bytes] = {}
        listener = socket.create_server(("127.0.0.1", 0))
        await loop.create_server(lambda: _StubConnection(dimension, answers), sock=listener)
        over = asyncio.Event()
        # Readable when the other end is closed, by whatever end of that process.
        loop.add_reader(pipe.fileno(), over.set)
        pipe.send(listener.getsockname()[1])
        await over.wait()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())
