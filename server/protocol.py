"""HTTP/1.1 on a connection: uvicorn's httptools protocol, and what it lets through that we do not."""

import asyncio
import json
from typing import Any, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from embedserve.server.errors import InvalidRequestError
from embedserve.server.exchange import new_request_id

__all__ = ["HTTPProtocol"]

MAX_HEAD_BYTES = 64 << 10
"""The request line and all headers."""

MAX_PIPELINED = 16
"""Requests that a connection may send before the answer to the first."""


class HTTPProtocol(HttpToolsProtocol):
    """uvicorn's HTTP, with our envelope where it would answer in plain text, and a bound on what it keeps of a head.

    Offers of another protocol are passed over: Java's HTTP client makes one (h2c) with its first request, and the
    parser would not take the body behind it for ours.
    """

    _head_bytes = 0
    _in_trailers = False
    _progress = False
    """Whether a piece of a body, or the end of a head or a request, came out of the parser."""
    _kept_bytes = 0
    """Received since then: the parser hands over whole lines, and keeps what it has of one."""
    _broken = False
    """What came last is no HTTP, and an answer to what came before it is still to be sent."""

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._broken:
            return
        self._unset_keepalive_if_required()
        self._progress = False
        try:
            self._feed(data)
            self._kept_bytes = 0 if self._progress else self._kept_bytes + len(data)
            if self._kept_bytes > MAX_HEAD_BYTES:
                raise httptools.HttpParserError("a line without an end")
        except httptools.HttpParserError:
            self.logger.debug("Invalid HTTP request received.")
            self.send_400_response("")

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                data = self._head_without_offer() + data[offer.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does

    def _head_without_offer(self) -> bytes:
        lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())]
        for name, value in self.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() != b"upgrade")
            if name != b"upgrade":
                lines.append(name + b": " + value)
        return b"\r\n".join([*lines, b"", b""])

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        # Of the answer to HEAD the head is all there is.
        if cycle.scope["method"] != "HEAD":
            cycle.transport = cast(asyncio.Transport, _AnswerInOnePiece(cycle))
        super()._start_asgi_task(cycle, app)

    def on_message_begin(self) -> None:
        """Called by the parser: a head begins."""
        self._head_bytes = 0
        self._in_trailers = False
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Called by the parser: part of the request line has come."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser: one header has come, or a trailer, which must not pass for one."""
        self._count(len(name) + len(value))
        if not self._in_trailers:
            super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser turns it into its own error, and the answer is a 400

    def on_headers_complete(self) -> None:
        """Called by the parser: the head is whole."""
        self._progress = self._in_trailers = True
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests that do not wait for their answers")
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")
        if not self.parser.should_upgrade():  # else the same head comes once more, without the offer
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Called by the parser: the request is whole."""
        self._progress = True
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_body(self, body: bytes) -> None:
        """Called by the parser: part of the body has come."""
        self._progress = True
        super().on_body(body)

    def on_response_complete(self) -> None:
        """Called when an answer has been sent."""
        if self._broken:
            self.transport.close()
        else:
            super().on_response_complete()

    def send_400_response(self, _msg: str) -> None:
        """Answer what is no HTTP, in our envelope, and hang up."""
        cycle = self.cycle
        if self.pipeline or (cycle is not None and not cycle.response_complete and not cycle.more_body):
            # The next answer on this connection belongs to a request before: it shall have it, and nothing follows.
            self._broken = True
            self.pipeline.clear()
            return
        error = InvalidRequestError(
            "The request is not valid HTTP: its request line, its headers or the framing of its body cannot be read, "
            f"or the line and headers together are longer than {MAX_HEAD_BYTES} bytes."
        )
        body = json.dumps(error.body).encode()
        self.transport.write(
            b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n%b" % (new_request_id().encode(), len(body), body)
        )
        self.transport.close()


class _AnswerInOnePiece:
    """The transport as one answer sees it: its head waits for the body, which uvicorn writes apart.

    One write to a TCP socket takes 12 us, two 17, and the first wakes the client, who can do nothing with a head alone.
    """

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._transport = cycle.transport
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """See `asyncio.Transport`."""
        if not self._cycle.response_started:  # "100 Continue": the client waits with its body for that
            self._transport.write(data)
        elif self._head is None:
            self._head = data
        else:
            self._transport.writelines([self._head, data] if self._head else [data])
            self._head = b""

    def close(self) -> None:
        """See `asyncio.Transport`."""
        if self._head:
            self._transport.write(self._head)
        self._transport.close()

    def is_closing(self) -> bool:
        """See `asyncio.Transport`."""
        return self._transport.is_closing()
