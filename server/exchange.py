"""One request and its answer: the id, the durations, the headers, the log line, the count."""

import asyncio
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embedserve.server.errors import (
    APIError,
    BodyTooLargeError,
    ContentEncodingError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
)
from embedserve.server.gunzip import GzipError, GzipTooLargeError, gunzip
from embedserve.server.wire import Charged, RequestReport

__all__ = [
    "ClientGoneError",
    "Exchange",
    "ExchangeMiddleware",
    "error_response",
    "new_request_id",
    "read_body",
    "unless_gone",
]

log = logging.getLogger("embedserve.request")

_REQUEST_ID = re.compile(r"[!-~]{1,128}")
"""A caller's own request id is kept when it is short, visible ASCII: it goes into logs and headers."""

_WATCH_AFTER = 0.02
"""Seconds after which it is worth to notice that a client has hung up."""

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client hung up before it had its answer."""


@dataclass(eq=False)
class Exchange:
    """What is known of a request so far. Durations in seconds. `model` is an id, `name` what its client called it."""

    id: str
    started: float = field(default_factory=time.perf_counter)
    route: str = ""
    key: str = ""
    user: str = ""
    model: str = ""
    name: str = ""
    texts: int = 0
    tokens: int = 0
    truncated: int = 0
    status: int = 0
    code: str = ""
    tokenize: float = 0.0
    queue: float = 0.0
    run: float = 0.0
    encode: float = 0.0
    limit: int = 0
    charged: Charged | None = None

    @staticmethod
    def of(request: Request) -> "Exchange":
        """The exchange of a request that came through `ExchangeMiddleware`."""
        exchange: Exchange = request.scope["exchange"]
        return exchange

    @property
    def seconds(self) -> float:
        """Since the request came in."""
        return time.perf_counter() - self.started

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What every answer carries, and what this one does besides."""
        headers = [(b"x-request-id", self.id.encode())]
        if self.model and self.status < 400:
            headers += [
                (b"openai-processing-ms", b"%d" % round(self.seconds * 1000)),
                (b"openai-version", b"2020-10-01"),
                (b"openai-model", self.name.encode("latin-1")),
            ]
        if self.truncated:
            headers.append((b"x-truncated-inputs", b"%d" % self.truncated))
        if self.charged is not None:
            headers += [
                (b"x-ratelimit-limit-requests", b"%d" % self.limit),
                (b"x-ratelimit-remaining-requests", b"%d" % self.charged.remaining),
                (b"x-ratelimit-reset-requests", _duration(self.charged.reset).encode()),
            ]
        return headers

    def report(self) -> RequestReport:
        """The exchange as the broker counts it."""
        return RequestReport(
            model=self.model,
            status=self.status,
            code=self.code,
            texts=self.texts,
            tokens=self.tokens,
            total=self.seconds,
            tokenize=self.tokenize,
            queue=self.queue,
            run=self.run,
            encode=self.encode,
        )

    def log_fields(self) -> dict[str, object]:
        """The fields of the log line: never a text, never a key."""
        fields: dict[str, object] = {"id": self.id, "status": self.status, "ms": round(self.seconds * 1000, 1)}
        named = {"code": self.code, "key": self.key, "user": self.user, "model": self.model}
        if self.name != self.model:
            named["alias"] = self.name
        fields |= {name: value for name, value in named.items() if value}
        if self.texts:
            fields |= {"texts": self.texts, "tokens": self.tokens}
            for stage in ("tokenize", "queue", "run", "encode"):
                fields[f"{stage}_ms"] = round(getattr(self, stage) * 1000, 1)
        return fields


def new_request_id() -> str:
    """The id of a request whose caller gave none."""
    return f"req_{secrets.token_hex(16)}"


def _duration(seconds: float) -> str:
    milliseconds = math.ceil(seconds * 1000)
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


class ExchangeMiddleware:
    """Gives each request its `Exchange`, puts the headers on its answer, logs it, and reports it where it is counted.

    It is the outermost layer of our own: errors that escape from the others become answers here, an envelope or a 500.
    """

    def __init__(self, app: ASGIApp, report: Callable[[RequestReport], None]) -> None:
        self._app = app
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = Headers(scope=scope).get("x-request-id", "")
        exchange = Exchange(own if _REQUEST_ID.fullmatch(own) else new_request_id())
        scope["exchange"] = exchange

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] += exchange.headers()
                if exchange.status >= 400 and "expect" in Headers(scope=scope):
                    # The client waits with its body for a word that it does not get: what it sends next is no body.
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except APIError as error:
            await error_response(exchange, error)(scope, receive, send_with_headers)
        except ClientGoneError:
            exchange.status, exchange.code = 499, "client_gone"
        except asyncio.CancelledError:
            # The server is being stopped, and the time for requests in flight is over.
            if exchange.status:
                raise
            await error_response(exchange, OverloadedError("shutting_down"))(scope, receive, send_with_headers)
        except Exception:
            log.exception("a request failed", extra={"id": exchange.id})
            if exchange.status:
                raise  # the answer had begun: all that is left is to cut the connection
            await error_response(exchange, InternalError(exchange.id))(scope, receive, send_with_headers)
        finally:
            if exchange.route:
                self._report(exchange.report())
            level = logging.INFO if exchange.route else logging.DEBUG
            if log.isEnabledFor(level):
                # The path of an unknown URL is the client's own text; the routes are ours.
                log.log(level, "%s", exchange.route or scope["method"], extra=exchange.log_fields())


def error_response(exchange: Exchange, error: APIError) -> JSONResponse:
    """An error as its answer."""
    exchange.status, exchange.code = error.status, error.code or error.type
    return JSONResponse(error.body, status_code=error.status, headers=error.headers)


async def read_body(request: Request, limit: int) -> bytes:
    """The body, unpacked, of at most `limit` bytes.

    Raises `BodyTooLargeError`, `ContentEncodingError`, `InvalidRequestError` or `ClientGoneError`.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip", "x-gzip", ""):
        raise ContentEncodingError(encoding[:64])
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise BodyTooLargeError(limit)
    pieces, size = [], 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            raise BodyTooLargeError(limit)
        if not message.get("more_body", False):
            break
    body = b"".join(pieces)
    if encoding in ("gzip", "x-gzip"):
        # Off the event loop: it takes 0.13 s to unpack the largest body, and needs no lock of Python's meanwhile.
        try:
            body = await asyncio.to_thread(gunzip, body, limit)
        except GzipTooLargeError:
            raise BodyTooLargeError(limit) from None
        except GzipError as error:
            raise InvalidRequestError(f"The body of the request {error}") from None
    return body


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. When the client hangs up, `work` is cancelled, and `ClientGoneError` raised.

    The body must have been read: what comes after it is the end of the connection.
    """
    # To watch a connection takes a task; most requests are answered before it would be worth one.
    watch = _HangUp(request)
    handle = asyncio.get_running_loop().call_later(_WATCH_AFTER, watch.start)
    try:
        return await work
    except asyncio.CancelledError:
        if watch.happened:
            watch.cancelled_task.uncancel()
            raise ClientGoneError from None
        raise
    finally:
        handle.cancel()
        watch.stop()


class _HangUp:
    """Cancels the current task when the client of a request hangs up."""

    def __init__(self, request: Request) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.cancelled_task = task
        self.happened = False
        self._request = request
        self._watcher: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._watcher = asyncio.ensure_future(self._watch())

    def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.happened = True
        self.cancelled_task.cancel()
