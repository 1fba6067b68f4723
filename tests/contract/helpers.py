"""What the contract tests share: bodies, vectors, envelopes, and a connection that sends whatever it is given."""

import base64
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import httpx
import numpy as np
import numpy.typing as npt
import orjson
import psutil

from embedserve.models.catalog import locate
from tests.support import MODEL, RunningServer

__all__ = [
    "BODY_LIMIT",
    "KEY",
    "MODEL",
    "Answer",
    "Connection",
    "checkpoint",
    "envelope",
    "eventually",
    "http_request",
    "one_from_each",
    "vectors",
]

KEY = "sk-contract-0123456789-wxyz"
BODY_LIMIT = 65_536
"""Of the server behind the fixture `small`, in bytes."""

Floats = npt.NDArray[np.float32]
T = TypeVar("T")


def checkpoint() -> Path:
    """The folder with MiniLM's files."""
    return locate(MODEL, None)


def vectors(response: httpx.Response) -> Floats:
    """The vectors of a successful answer, float32 [rows, dimensions]; its shape is checked on the way."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    rows = [item["embedding"] for item in data]
    if rows and isinstance(rows[0], str):
        return np.stack([np.frombuffer(base64.b64decode(row, validate=True), dtype="<f4") for row in rows])
    return np.array(rows, dtype=np.float32)


def envelope(response: "httpx.Response | Answer", status: int) -> dict[str, Any]:
    """The error that an answer of this status holds. JSON, with all four members and nothing else."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = orjson.loads(response.content)
    assert list(body) == ["error"]
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)
    return error


def eventually(question: Callable[[], T], seconds: float = 10.0) -> T:
    """The first true answer to a question."""
    until = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)
    return answer


def http_request(
    body: bytes = b"", *, method: str = "POST", path: str = "/v1/embeddings", headers: Mapping[str, str] | None = None
) -> bytes:
    """An HTTP request, byte by byte. A Content-Length is added unless `headers` has a word on the length."""
    lines = {"host": "localhost", **(headers or {})}
    if not {"content-length", "transfer-encoding"} & {name.lower() for name in lines}:
        lines["content-length"] = str(len(body))
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


@dataclass(frozen=True)
class Answer:
    """An answer as it came over a socket."""

    status_code: int
    headers: httpx.Headers
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode(errors="replace")


class Connection:
    """A connection to a server for requests that no HTTP client would send. Use it with `with`."""

    def __init__(self, url: str, seconds: float = 30.0) -> None:
        parts = urlsplit(url)
        assert parts.hostname
        assert parts.port
        self._socket = socket.create_connection((parts.hostname, parts.port), timeout=seconds)
        self._file = self._socket.makefile("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def port(self) -> int:
        """Our end's."""
        port: int = self._socket.getsockname()[1]
        return port

    def send(self, data: bytes) -> None:
        """Send, unless the server has answered and closed already."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(data)

    def answer(self, method: str = "POST") -> Answer:
        """Read the next answer."""
        line = self._file.readline()
        assert line, "the server closed the connection without an answer"
        protocol, status = line.split()[:2]
        assert protocol == b"HTTP/1.1"
        headers = []
        while (line := self._file.readline().rstrip(b"\r\n")) != b"":
            name, _, value = line.partition(b":")
            headers.append((name.decode("latin-1"), value.strip().decode("latin-1")))
        found = httpx.Headers(headers)
        length = 0 if method == "HEAD" else int(found["content-length"])
        content = self._file.read(length)
        assert len(content) == length
        return Answer(int(status), found, content)

    def interim(self) -> int:
        """Read a status that comes before the answer."""
        status = int(self._file.readline().split()[1])
        assert self._file.readline() == b"\r\n"
        return status

    def ends(self) -> bool:
        """Whether the server closes the connection, with nothing more to say."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def one_from_each(server: RunningServer, count: int = 1) -> list[list[Connection]]:
    """`count` connections to each front end of a server. While one is made, the other front ends stand still."""
    processes = server.children("front end")
    return [_connections_to(server, process, count) for process in processes]


def _connections_to(server: RunningServer, process: psutil.Process, count: int) -> list[Connection]:
    others = [other for other in server.children("front end") if other.pid != process.pid]
    try:
        for other in others:
            os.kill(other.pid, signal.SIGSTOP)
        connections = [Connection(server.url) for _ in range(count)]
        for connection in connections:
            # An answer shows that the connection was accepted, which only this process could do.
            connection.send(http_request(method="GET", path="/health"))
            assert connection.answer().status_code == 200
    finally:
        for other in others:
            os.kill(other.pid, signal.SIGCONT)
    return connections
