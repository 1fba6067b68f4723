"""The front end process: HTTP in, token ids to the broker, vectors back, HTTP out. None of them has torch."""

import asyncio
import contextlib
import json
import signal
import socket
from collections.abc import Iterator

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from embedserve.server.app import create_app
from embedserve.server.client import BrokerClient
from embedserve.server.config import ServerConfig
from embedserve.server.errors import InvalidRequestError
from embedserve.server.exchange import new_request_id
from embedserve.server.process import Liveness
from embedserve.server.routes import Endpoints
from embedserve.server.served import ServedModels
from embedserve.server.token_arrays import Vocabulary
from embedserve.server.tokenizer import TokenizerPool

__all__ = ["serve"]

KEEP_ALIVE_SECONDS = 90
"""Longer than the pools of HTTP clients keep a connection: the one that closes first must not be us."""

MAX_HEAD_BYTES = 64 << 10
"""The request line and all headers."""

READ_BYTES = 256 << 10
"""What uvloop receives at once, at most."""

TOKENIZER_THREADS = 2
"""Of one front end, for long texts; the short ones are tokenised in the event loop."""


class _Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, with our envelope where it would answer in plain text, and a bound on what it keeps of a head.

    Offers of another protocol are passed over: Java's HTTP client makes one (h2c) with its first request, and the
    parser would not take the body behind it for ours.
    """

    _head_bytes = 0
    _in_head = True
    _kept_bytes = 0
    """Received while a head has not ended. The parser hands over whole lines and keeps what it has of one."""

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
            self._kept_bytes = self._kept_bytes + len(data) if self._in_head else 0
            if self._kept_bytes > MAX_HEAD_BYTES + READ_BYTES:  # the first read may have held other things
                raise httptools.HttpParserError("the head is too large")
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
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

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head is too large")  # the parser turns it into its own error, and the answer is a 400

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._kept_bytes = 0
        if self.parser.get_method() == b"CONNECT":
            raise ValueError("this is no proxy")
        if not self.parser.should_upgrade():  # else the same head comes once more, without the offer
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head = True
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def send_400_response(self, _msg: str) -> None:
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


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours to handle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._finish)
        yield

    def _finish(self) -> None:
        """Stop to admit, let the requests in flight end."""
        self.should_exit = True


async def serve(
    config: ServerConfig, models: ServedModels, listener: socket.socket, broker: str, alive: Liveness
) -> None:
    """Serve HTTP on a listening socket until SIGTERM; `broker` is the address of the broker's socket."""
    client = BrokerClient(broker)
    await client.start()
    tokenizers = TokenizerPool(TOKENIZER_THREADS)
    endpoints = Endpoints(config, models, client, tokenizers, Vocabulary(config.cl100k_file))
    server = _Server(
        uvicorn.Config(
            create_app(endpoints, client),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # uvicorn would believe any process of this host; `limits.client_address` believes whom the operator names.
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=max(1, round(config.shutdown_seconds)),
        )
    )
    beats = asyncio.create_task(_beat(server, alive))
    alive.ready()  # the socket listens since before this process began
    await server.serve(sockets=[listener])
    beats.cancel()
    await client.stop()
    tokenizers.close()


async def _beat(server: _Server, alive: Liveness) -> None:
    while await alive.beat():
        pass
    server.should_exit = True
