"""A stand-in for an upstream: it answers like OpenAI's embeddings API, or misbehaves as a test tells it to."""

import base64
import contextlib
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

__all__ = ["Behaviour", "Call", "Upstream", "closed_port", "good", "reply", "vector_of"]

Item = str | list[int]


def vector_of(item: Item, dimensions: int) -> npt.NDArray[np.float32]:
    """The stand-in's vector of a text or a token array: float32 [dimensions], another for each."""
    digest = hashlib.sha256(json.dumps(item).encode()).digest()
    return np.random.default_rng(list(digest)).standard_normal(dimensions).astype(np.float32)


class Call:
    """A request that came in, and the way to answer it."""

    def __init__(self, handler: "_Handler", body: bytes) -> None:
        self.path = handler.path
        self.headers = {name.lower(): value for name, value in handler.headers.items()}
        self.body: dict[str, Any] = json.loads(body)
        self.began = time.monotonic()
        self.gone = threading.Event()
        self._handler = handler

    @property
    def rows(self) -> int:
        return len(self.body["input"])

    def send(self, data: bytes) -> None:
        self._handler.wfile.write(data)
        self._handler.wfile.flush()

    def answer(self, status: int, body: bytes, headers: Iterable[tuple[str, str]] = ()) -> None:
        lines = [("content-type", "application/json"), ("content-length", str(len(body))), *headers]
        head = "".join(f"{name}: {value}\r\n" for name, value in lines)
        self.send(f"HTTP/1.1 {status} Whatever\r\n{head}\r\n".encode() + body)

    def hang(self) -> None:
        """Say nothing until the caller has gone."""
        with contextlib.suppress(ConnectionResetError):
            self._handler.connection.recv(1)
        self.gone.set()
        self.close()

    def close(self) -> None:
        self._handler.close_connection = True

    def reset(self) -> None:
        """End the connection as a crash would."""
        linger = struct.pack("ii", 1, 0)
        self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._handler.connection.close()
        self.close()


Behaviour = Callable[[Call], None]


def good(call: Call, *, dimensions: int | None = None) -> dict[str, Any]:
    """The body of the answer that OpenAI would give, a token for each character or id."""
    inputs: list[Item] = call.body["input"]
    size = dimensions or call.body.get("dimensions") or SIZES[call.body["model"]]
    as_base64 = call.body.get("encoding_format") == "base64"

    def shown(item: Item) -> object:
        vector = vector_of(item, size)
        return base64.b64encode(vector.tobytes()).decode() if as_base64 else vector.tolist()

    return {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": shown(item)} for i, item in enumerate(inputs)],
        "model": call.body["model"],
        "usage": {"prompt_tokens": sum(map(len, inputs)), "total_tokens": sum(map(len, inputs))},
    }


SIZES: Mapping[str, int] = {
    "text-embedding-3-small": 1536, "text-embedding-3-large": 3072, "text-embedding-ada-002": 1536,
    "Baichuan-Text-Embedding": 1024, "embedding-2": 1024, "little": 4, "hasty": 4, "dawdling": 4, "hanging": 4,
}  # fmt: skip


def reply(status: int, body: object = b"", **headers: str) -> Behaviour:
    """Answers with this, whatever was asked. An underscore in a header's name is a dash."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return lambda call: call.answer(status, content, lines)


class Upstream:
    """The stand-in, on a free port of loopback. Use it with `with`."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._script: list[Behaviour] = []
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"upstream": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def script(self, *behaviours: Behaviour) -> None:
        """Forget what was, and do these with the next calls, one each; then answer as one should."""
        self.calls.clear()
        self._script[:] = behaviours

    def handle(self, call: Call) -> None:
        with self._lock:
            self.calls.append(call)
            behave = self._script.pop(0) if self._script else None
        if behave is None:
            call.answer(200, json.dumps(good(call)).encode())
        else:
            behave(call)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    upstream: ClassVar[Upstream]

    def do_POST(self) -> None:
        call = Call(self, self.rfile.read(int(self.headers["content-length"])))
        try:
            self.upstream.handle(call)
        except OSError:  # the caller has gone
            self.close_connection = True

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        pass


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
