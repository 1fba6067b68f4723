"""The engine process: pulls batches from the broker, runs them on its device, sends the vectors back.

One process a device, the only one that imports torch. The event loop speaks with the broker and gives signs of life;
the batches run on teams of threads beside it (`teams.py`), by a schedule that says which and when (`schedule.py`).

A batch is pulled late: when a team is idle, or when one is about to be by its estimate. So a text that arrives
meanwhile still joins the next batch, and the device sees no gap.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from embedserve.models.config import ModelConfig
from embedserve.models.errors import BatchError, ModelError
from embedserve.server import wire
from embedserve.server.arrays import pack
from embedserve.server.device import DeviceError, OutOfMemoryError
from embedserve.server.process import Liveness
from embedserve.server.runner import Embedded, Runner
from embedserve.server.schedule import Estimates, Kind, Offer
from embedserve.server.teams import Team, Teams, make_teams
from embedserve.server.threads import available_cores

__all__ = ["EngineOptions", "serve"]

log = logging.getLogger("embedserve.engine")

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

    def kind(self, share: float) -> Kind:
        return Kind(self.run.model, self.run.modality, share, int(self.lengths.max()).bit_length())


@dataclass(frozen=True)
class _Running:
    """A batch that a team has: since when, and until when by the estimate, if there is one."""

    batch: _Batch
    since: float
    until: float | None


class _Ran(NamedTuple):
    """What came of a batch, and from when to when it was the team's."""

    result: Embedded | Exception
    started: float
    ended: float


class Engine:
    """The event loop's side of an engine whose models are loaded. Clocks are `time.monotonic`."""

    def __init__(self, runners: Mapping[str, Runner], teams: Teams) -> None:
        self._runners = runners
        self._teams = teams
        self._schedule = teams.schedule
        self._bound: deque[_Batch] = deque()
        self._running: dict[int, _Running] = {}
        """By the number of the team."""
        self._last_end = 0.0
        self._estimates = Estimates()
        self._pulled = False
        """Whether a batch was asked for that has not come."""
        self._pull_later: asyncio.TimerHandle | None = None
        self._crowd = 0.0
        """Tokens that have come lately while a batch ran."""
        self._spent = False
        """Whether the device can be used no more by this process."""

    async def keep_connected(self, address: str) -> None:
        """Serve the broker at this address, and its successors, until cancelled, or the device is spent."""
        while not self._spent:
            connection = await wire.connect(address, lambda: wire.FramedConnection(self._on_frame, self._on_close))
            connection.send(wire.Hello("engine", os.getpid()))
            models = [ready for name in self._runners for ready in self._announce(name)]
            connection.send(wire.EngineReady(models, self._schedule.concurrency))
            self._connection = connection
            self._pulled = False
            self._pull_in_time()
            await connection.lost.wait()

    def _announce(self, name: str) -> list[wire.ModelReady]:
        info, bound = self._runners[name].info, self._teams.bounds[name]
        return [
            wire.ModelReady(name, modality, bound, info.cost, info.device, info.dtype, info.backend)
            for modality in info.modalities
        ]

    def is_lost(self) -> bool:
        """Whether only another process can go on: the device is spent, or a batch runs for far too long."""
        now = time.monotonic()
        return self._spent or any(now - one.since > self._allowed(team, one) for team, one in self._running.items())

    def _allowed(self, team: int, running: _Running) -> float:
        """Seconds after which a batch counts as hung."""
        kind = running.batch.kind(self._schedule.share(team))
        expected = self._estimates.at_most(kind, running.batch.tokens)
        return _STUCK_AT_FIRST if expected is None else _STUCK_AFTER + 10 * expected

    def _on_close(self, connection: wire.FramedConnection) -> None:
        # The broker has put these back into its queue, or has died with it.
        self._bound = deque(batch for batch in self._bound if batch.connection is not connection)

    def _on_frame(self, connection: wire.FramedConnection, message: wire.Message, payload: bytes) -> None:
        if not isinstance(message, wire.Run):
            raise wire.FrameError(f"{type(message).__name__} from the broker")
        lengths, dimensions, outputs = np.frombuffer(payload, dtype="<i4", count=3 * message.rows).reshape(3, -1)
        items = np.frombuffer(payload, dtype=np.uint8, offset=12 * message.rows)
        batch = _Batch(connection, message, lengths, dimensions, outputs, items)
        self._crowd = 0.7 * self._crowd + 0.3 * (batch.tokens + message.waiting if self._running else 0)
        self._pulled = False
        self._bound.append(batch)
        self._start()
        self._pull_in_time()

    def _expected(self) -> dict[int, float | None]:
        return {team: running.until for team, running in self._running.items()}

    def _pull_in_time(self) -> None:
        """Ask for the next batch: now if a team is free or about to be, else when one will be."""
        if self._pull_later is not None:
            self._pull_later.cancel()
            self._pull_later = None
        if self._pulled or self._bound or self._spent:
            return
        now = time.monotonic()
        free_at = self._schedule.free_at(self._expected(), now)
        if free_at is None:
            return
        wait = free_at - self._schedule.lead - now
        if wait <= 0:
            self._pulled = True
            self._connection.send(wire.Pull())
        else:
            self._pull_later = asyncio.get_running_loop().call_later(wait, self._pull_in_time)

    def _start(self) -> None:
        """Begin with the batches that are here, in their order, where the schedule has a team for them."""
        while self._bound and not self._spent:
            batch, now, expected = self._bound[0], time.monotonic(), self._expected()
            offer = Offer(batch.run.model, batch.tokens, batch.run.waiting + self._crowd, now)
            team = self._schedule.place(expected, offer)
            if team is None:
                return
            self._bound.popleft()
            estimate = self._estimates.seconds(batch.kind(self._schedule.share(team)), batch.tokens)
            begins = (
                max([now, *(end for end in expected.values() if end is not None)]) if self._schedule.in_turn else now
            )
            self._running[team] = _Running(batch, now, None if estimate is None else begins + estimate)
            work = partial(self._work, asyncio.get_running_loop(), team, batch)
            self._teams.members[team].submit(work)

    def _work(self, loop: asyncio.AbstractEventLoop, team: int, batch: _Batch) -> None:
        """In a team's thread."""
        started = time.monotonic()
        runner = self._runners[batch.run.model]
        result: Embedded | Exception
        try:
            if batch.run.modality == "image":
                result = runner.run_images(batch.items, batch.dimensions)
            else:
                result = runner.run(batch.items.view("<i4"), batch.lengths, batch.dimensions, batch.outputs)
        except Exception as error:
            result = error
        # When the engine ends, its event loop is closed first.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(self._finish, team, _Ran(result, started, time.monotonic()))

    def _finish(self, team: int, ran: _Ran) -> None:
        batch = self._running.pop(team).batch
        info, share = self._runners[batch.run.model].info, self._schedule.share(team)
        # Where batches run in turn, this one has waited on the device for the one before it.
        begun = max(ran.started, self._last_end) if self._schedule.in_turn else ran.started
        # Two that end at once may come here the other way round.
        seconds, self._last_end = max(0.0, ran.ended - begun), ran.ended
        answer: wire.BatchDone | wire.BatchFailed
        payload: list[wire.Buffer] = []
        if isinstance(ran.result, Exception):
            # The exception's text may hold values of the batch, its place in the code does not.
            facts = {"model": batch.run.model, "texts": batch.run.rows}
            log.error("a batch failed", exc_info=ran.result, extra=facts)
            # After an error of CUDA nothing runs any more in this process.
            self._spent = self._spent or (info.device != "cpu" and not isinstance(ran.result, BatchError))
            code = "out_of_memory" if isinstance(ran.result, OutOfMemoryError) else "internal"
            answer = wire.BatchFailed(batch.run.batch, code)
        else:
            self._estimates.learn(batch.kind(share), batch.tokens, seconds)
            not_finite = np.flatnonzero(~ran.result.finite).tolist()
            names, buffers = pack(ran.result.arrays)
            computed = ran.result.computed_tokens
            answer = wire.BatchDone(batch.run.batch, names, share * seconds, computed, not_finite)
            payload = [*buffers]
        if self._spent:
            # The end of the connection is the answer. To another one the broker might send this engine its next batch,
            # of a request that it would then hold to blame for the end.
            self._connection.close()
            return
        # The next one first: it only takes a hand-over, and then the team is busy while this one is sent.
        self._start()
        batch.connection.send(answer, payload)
        self._pull_in_time()


async def serve(options: EngineOptions, address: str, alive: Liveness) -> None:
    """Load the models, then serve the broker at `address` until the supervisor has gone.

    Raises `ModelError` where a checkpoint or the device cannot be used.
    """
    cores = available_cores()
    wide = Team("device")
    beats = asyncio.create_task(_beat_while_loading(alive))
    try:
        runners = await asyncio.wrap_future(wide.call(lambda: _load(options, alive)))
        teams = await asyncio.to_thread(
            make_teams,
            runners,
            wide,
            models=options.models,
            cores=cores,
            max_batch_tokens=options.max_batch_tokens,
            progress=alive.progress,
        )
    except ModelError:
        raise
    except Exception as error:
        # Out of memory, a driver that is too old: no request is involved, so the text of the error can be shown.
        raise DeviceError(f"the models cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        beats.cancel()
    engine = Engine(runners, teams)
    connection = asyncio.create_task(engine.keep_connected(address))
    alive.ready()
    while await alive.beat():
        if engine.is_lost():
            # A thread or a CUDA context cannot be ended, only the process. The supervisor starts another.
            log.error("the device hangs or has failed: giving up this process")
            break
    connection.cancel()


def _load(options: EngineOptions, alive: Liveness) -> dict[str, Runner]:
    """In the first team's thread: load every model, then let each answer once beside the others' weights."""

    def say(name: str) -> Callable[[str], None]:
        return lambda message: alive.progress(f"{name}: {message}")

    runners = {
        name: Runner.load(
            config.folder,
            config=config,
            device=options.device,
            dtype=options.dtype,
            backend=options.backend,
            threads=options.threads,
            pin=True,
            progress=say(name),
        )
        for name, config in options.models.items()
    }
    for name, runner in runners.items():
        runner.warm_up(say(name), max_batch_tokens=options.max_batch_tokens)
    return runners


async def _beat_while_loading(alive: Liveness) -> None:
    while await alive.beat():
        pass
