"""The engine process: pulls batches from the broker, runs them on its device, sends the vectors back.

One process a device, the only one that imports torch. Two threads: the event loop speaks with the broker and gives
signs of life, the device thread loads the models and runs the batches.

A batch is pulled late: when the device is idle, or when the running batch is about to end by its estimate. So a text
that arrives meanwhile still joins the next batch, and the device sees no gap.
"""

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from embedserve.models.config import ModelConfig
from embedserve.models.errors import BatchError, ModelError
from embedserve.server import wire
from embedserve.server.arrays import pack
from embedserve.server.process import Liveness
from embedserve.server.runner import DeviceError, Embedded, Runner

__all__ = ["EngineOptions", "serve"]

log = logging.getLogger("embedserve.engine")

_PULL_LEAD = 0.003
"""Seconds before the estimated end of the running batch at which the next one is pulled: a round trip to the broker."""

_STUCK_AFTER = 60.0
"""Seconds, beyond ten times its estimate, after which a running batch counts as hung."""

_STUCK_AT_FIRST = 600.0
"""The same where there is no estimate: the first batch may be a book on a slow CPU."""


@dataclass(frozen=True)
class EngineOptions:
    """What an engine serves and where: model name → its checkpoint; see `config.ServerConfig` for the others."""

    models: Mapping[str, ModelConfig]
    device: str
    dtype: str
    backend: str
    threads: int | None
    max_batch_tokens: int | None


@dataclass(frozen=True)
class _Batch:
    """A batch as it came from the broker, and over which connection: only that one may have the answer."""

    connection: wire.FramedConnection
    run: wire.Run
    lengths: npt.NDArray[np.int32]
    dimensions: npt.NDArray[np.int32]
    outputs: npt.NDArray[np.int32]
    items: npt.NDArray[np.uint8]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


class _Estimates:
    """How long a batch will run, by what a token has cost lately in batches of like texts.

    Apart by model, by modality, and by the length of the longest text, for attention costs its square: a token of a
    text of 8192 costs many times what one of a short text does.
    """

    def __init__(self) -> None:
        self._seconds_per_token: dict[tuple[str, str, int], float] = {}

    def seconds(self, batch: _Batch) -> float | None:
        """None before the first batch of its kind."""
        cost = self._seconds_per_token.get(_kind(batch))
        return None if cost is None else cost * batch.tokens

    def at_most(self, batch: _Batch) -> float | None:
        """A bound for a batch of any kind: shorter texts' cost, as if all of it grew with the length. None at first."""
        model, modality, length = _kind(batch)
        shorter = [
            cost * 2 ** (length - other[2])
            for other, cost in self._seconds_per_token.items()
            if other[:2] == (model, modality) and other[2] <= length
        ]
        return max(shorter) * batch.tokens if shorter else None

    def learn(self, batch: _Batch, seconds: float) -> None:
        kind, sample = _kind(batch), seconds / batch.tokens
        known = self._seconds_per_token.get(kind)
        self._seconds_per_token[kind] = sample if known is None else 0.8 * known + 0.2 * sample


def _kind(batch: _Batch) -> tuple[str, str, int]:
    """Texts are alike where their longest is within a factor of two."""
    return batch.run.model, batch.run.modality, int(batch.lengths.max()).bit_length()


class Engine:
    """The event loop's side of an engine whose models are loaded."""

    def __init__(self, runners: Mapping[str, Runner], device: ThreadPoolExecutor) -> None:
        """`device`: the thread that alone calls the runners."""
        self._runners = runners
        self._device = device
        self._bound: deque[_Batch] = deque()
        self._running: _Batch | None = None
        self._running_since = 0.0
        self._estimates = _Estimates()
        self._pulled = False
        """Whether a batch was asked for that has not come."""
        self._spent = False
        """Whether the device can be used no more by this process."""

    async def keep_connected(self, address: str) -> None:
        """Serve the broker at this address, and its successors, until cancelled."""
        while True:
            connection = await wire.connect(address, lambda: wire.FramedConnection(self._on_frame, self._on_close))
            connection.send(wire.Hello("engine", os.getpid()))
            connection.send(wire.EngineReady([ready for name in self._runners for ready in self._announce(name)]))
            self._connection = connection
            self._pulled = False
            if self._running is None:
                self._pull()
            await connection.lost.wait()

    def _announce(self, name: str) -> list[wire.ModelReady]:
        info = self._runners[name].info
        return [
            wire.ModelReady(name, modality, info.max_batch_tokens, info.cost, info.device, info.dtype, info.backend)
            for modality in info.modalities
        ]

    def is_lost(self) -> bool:
        """Whether only another process can go on: the device is spent, or the batch runs for far too long."""
        if self._running is None or self._spent:
            return self._spent
        expected = self._estimates.at_most(self._running)
        allowed = _STUCK_AT_FIRST if expected is None else _STUCK_AFTER + 10 * expected
        return time.monotonic() - self._running_since > allowed

    def _on_close(self, connection: wire.FramedConnection) -> None:
        # The broker has put these back into its queue, or has died with it.
        self._bound = deque(batch for batch in self._bound if batch.connection is not connection)

    def _on_frame(self, connection: wire.FramedConnection, message: wire.Message, payload: bytes) -> None:
        if not isinstance(message, wire.Run):
            raise wire.FrameError(f"{type(message).__name__} from the broker")
        lengths, dimensions, outputs = np.frombuffer(payload, dtype="<i4", count=3 * message.rows).reshape(3, -1)
        items = np.frombuffer(payload, dtype=np.uint8, offset=12 * message.rows)
        self._pulled = False
        self._bound.append(_Batch(connection, message, lengths, dimensions, outputs, items))
        self._start_next()

    def _pull(self) -> None:
        if not self._pulled and not self._bound and not self._spent:
            self._pulled = True
            self._connection.send(wire.Pull())

    def _start_next(self) -> None:
        if self._running is not None or self._spent or not self._bound:
            return
        batch = self._running = self._bound.popleft()
        self._running_since = time.monotonic()
        loop = asyncio.get_running_loop()
        done = loop.run_in_executor(self._device, self._run, batch)
        estimate = self._estimates.seconds(batch)
        pull = None if estimate is None else loop.call_later(max(0.0, estimate - _PULL_LEAD), self._pull)
        done.add_done_callback(lambda future: self._finish(batch, pull, future))

    def _run(self, batch: _Batch) -> tuple[Embedded, float]:
        """In the device thread."""
        start = time.perf_counter()
        runner = self._runners[batch.run.model]
        if batch.run.modality == "image":
            embedded = runner.run_images(batch.items, batch.dimensions)
        else:
            embedded = runner.run(batch.items.view("<i4"), batch.lengths, batch.dimensions, batch.outputs)
        return embedded, time.perf_counter() - start

    def _finish(
        self,
        batch: _Batch,
        pull: asyncio.TimerHandle | None,
        future: asyncio.Future[tuple[Embedded, float]],
    ) -> None:
        if pull is not None:
            pull.cancel()
        self._running = None
        answer: wire.BatchDone | wire.BatchFailed
        payload: list[wire.Buffer] = []
        try:
            embedded, seconds = future.result()
        except Exception as error:
            # The exception's text may hold values of the batch, its place in the code does not.
            log.exception("a batch failed", extra={"model": batch.run.model, "texts": batch.run.rows})
            # After an error of CUDA nothing runs any more in this process.
            on_gpu = self._runners[batch.run.model].info.device != "cpu"
            self._spent = self._spent or (on_gpu and not isinstance(error, BatchError))
            answer = wire.BatchFailed(batch.run.batch)
        else:
            self._estimates.learn(batch, seconds)
            not_finite = np.flatnonzero(~embedded.finite).tolist()
            names, buffers = pack(embedded.arrays)
            answer = wire.BatchDone(batch.run.batch, names, seconds, embedded.computed_tokens, not_finite)
            payload = [*buffers]
        # The next one first: it only takes a hand-over, and then the device is busy while this one is sent.
        self._start_next()
        batch.connection.send(answer, payload)
        if self._running is None:
            self._pull()


async def serve(options: EngineOptions, address: str, alive: Liveness) -> None:
    """Load the models, then serve the broker at `address` until the supervisor has gone.

    Raises `ModelError` where a checkpoint or the device cannot be used.
    """
    loop = asyncio.get_running_loop()
    device = ThreadPoolExecutor(max_workers=1, thread_name_prefix="device")
    beats = asyncio.create_task(_beat_while_loading(alive))
    try:
        runners = await loop.run_in_executor(device, _load, options, alive)
    except ModelError:
        raise
    except Exception as error:
        # Out of memory, a driver that is too old: no request is involved, so the text of the error can be shown.
        raise DeviceError(f"the models cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        beats.cancel()
    engine = Engine(runners, device)
    connection = asyncio.create_task(engine.keep_connected(address))
    alive.ready()
    while await alive.beat():
        if engine.is_lost():
            # A thread or a CUDA context cannot be ended, only the process. The supervisor starts another.
            log.error("the device hangs or has failed: giving up this process")
            break
    connection.cancel()


def _load(options: EngineOptions, alive: Liveness) -> dict[str, Runner]:
    """In the device thread: load every model and let it answer once."""

    def progress(name: str) -> Callable[[str], None]:
        return lambda message: alive.progress(f"{name}: {message}")

    runners = {}
    for name, config in options.models.items():
        runners[name] = Runner.load(
            config.folder,
            config=config,
            device=options.device,
            dtype=options.dtype,
            backend=options.backend,
            threads=options.threads,
            pin=True,
            progress=progress(name),
        )
    # When the weights of all are there: a batch may have the memory that they leave.
    for name, runner in runners.items():
        runner.warm_up(progress(name), max_batch_tokens=options.max_batch_tokens)
    return runners


async def _beat_while_loading(alive: Liveness) -> None:
    while await alive.beat():
        pass
