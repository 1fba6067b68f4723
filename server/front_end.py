"""The front end process: HTTP in, token ids to the broker, vectors back, HTTP out. None of them has torch."""

import asyncio
import contextlib
import gc
import socket
from collections.abc import Iterator

import uvicorn

from embedserve.server.app import create_app
from embedserve.server.client import BrokerClient
from embedserve.server.config import ServerConfig
from embedserve.server.embedding import Embedder
from embedserve.server.images import ImagePool
from embedserve.server.process import Liveness, on_sigterm
from embedserve.server.protocol import HTTPProtocol
from embedserve.server.routes import Endpoints
from embedserve.server.served import ServedModels
from embedserve.server.token_arrays import Vocabulary
from embedserve.server.tokenizer import TokenizerPool

__all__ = ["serve"]

KEEP_ALIVE_SECONDS = 90
"""Longer than the pools of HTTP clients keep a connection: the one that closes first must not be us."""

TOKENIZER_THREADS = 2
"""Of one front end, for long texts; the short ones are tokenised in the event loop."""

IMAGE_THREADS = 2
"""Of one front end, for decoding and scaling images; they are started with the first image."""


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are ours to handle."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        on_sigterm(self._finish)
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
    relay = None
    if models.relayed:
        from embedserve.server.relay import Relay  # brings an HTTP client, which few servers need

        relay = Relay(models.relayed)
    images = ImagePool(IMAGE_THREADS)
    embedder = Embedder(config, client, tokenizers, images, Vocabulary(config.cl100k_file), relay)
    endpoints = Endpoints(config, models, client, embedder)
    server = _Server(
        uvicorn.Config(
            create_app(endpoints, client),
            http=HTTPProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            # uvicorn would believe any process of this host; `limits.client_address` believes whom the operator names.
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=config.shutdown_seconds,
        )
    )
    # What is there by now stays: to look through its 40,000 objects took a full collection 28 ms, in which nothing was
    # answered; without them 0.04.
    gc.collect()
    gc.freeze()
    beats = asyncio.create_task(_beat(server, alive))
    alive.ready()  # the socket listens since before this process began
    await server.serve(sockets=[listener])
    beats.cancel()
    await client.stop()
    if relay is not None:
        await relay.close()
    tokenizers.close()
    images.close()


async def _beat(server: _Server, alive: Liveness) -> None:
    while await alive.beat():
        pass
    server.should_exit = True
