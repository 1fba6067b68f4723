"""The broker process: the one place with state.

It owns all that must be one: the queue of all front ends, the rate limits, the counters. Front ends send it texts
as token ids and images as pixels, engines pull batches; it imports no torch and knows nothing of HTTP.

When an engine's connection ends, its batches go back to the front of the queue; when a front end's ends, its requests
are dropped. Requests whose engine stays away for `ENGINE_PATIENCE` seconds are answered with a 503.
"""

import asyncio
import logging
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from embedserve.server import wire
from embedserve.server.arrays import Rows, pack, unpack
from embedserve.server.batcher import Batch, Batcher, Bound, Cost, Finished, Lane, QueueFullError
from embedserve.server.limits import RateLimiter
from embedserve.server.metrics import Metrics
from embedserve.server.process import Liveness

__all__ = ["ENGINE_PATIENCE", "Broker", "serve"]

log = logging.getLogger("embedserve.broker")

ENGINE_PATIENCE = 30.0
"""Seconds that requests wait for an engine to come back."""


@dataclass(eq=False)
class _Request:
    """A request of a front end that has not been answered in full."""

    front_end: "_FrontEnd"
    id: int
    dimensions: int
    outputs: int
    items: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    """Where each item starts in `items`, and the end."""
    added: float
    started: float | None = None

    def slice(self, positions: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """Some of its items, in as few pieces as there are runs of neighbours."""
        pieces, first = [], 0
        for i in range(1, len(positions) + 1):
            if i == len(positions) or positions[i] != positions[i - 1] + 1:
                pieces.append(self.items[self.offsets[positions[first]] : self.offsets[positions[i - 1] + 1]])
                first = i
        return pieces


@dataclass(eq=False)
class _FrontEnd:
    """A connected front end and its requests."""

    connection: wire.FramedConnection
    requests: dict[int, _Request] = field(default_factory=dict)


@dataclass(eq=False)
class _Engine:
    """A connected engine: what it can run, how many batches it asked for in vain, and those it has, oldest first."""

    connection: wire.FramedConnection
    bounds: dict[Lane, Bound] = field(default_factory=dict)
    pulls: int = 0
    batches: OrderedDict[int, Batch[_Request]] = field(default_factory=OrderedDict)


class Broker:
    """The broker's state, and what each message does to it. Runs in one event loop."""

    def __init__(self, models: Sequence[str], *, max_queue_tokens: int, rate_limit: int, resumed: bool = False) -> None:
        """`models`: the names that engines will announce. `resumed`: this broker takes the place of one that died."""
        self._batcher = Batcher[_Request](max_queue_tokens)
        self._limiter = RateLimiter(rate_limit) if rate_limit else None
        self._front_ends: dict[wire.FramedConnection, _FrontEnd] = {}
        self._engines: dict[wire.FramedConnection, _Engine] = {}
        self._known = dict.fromkeys(models, resumed)
        """Model → whether an engine has had it ready before."""
        self._last_states: dict[str, wire.ModelReady] = {}
        self._away_since: dict[str, float] = dict.fromkeys(models, time.monotonic())
        """Models without an engine, and since when."""
        self._dispatching = False
        self._rate = 0.0
        """Tokens a second of one engine, lately."""
        self._metrics = Metrics()
        self._metrics.observe("queue_texts", lambda: self._batcher.waiting_texts)
        self._metrics.observe("queue_tokens", lambda: self._batcher.waiting_tokens)
        self._metrics.observe("engines", lambda: len([e for e in self._engines.values() if e.bounds]))

    # ------------------------------------------------------------------------------------------------- connections

    def connection(self) -> wire.FramedConnection:
        """A protocol for one more peer."""
        return wire.FramedConnection(self._on_frame, self._on_close, self._on_open)

    def _on_open(self, connection: wire.FramedConnection) -> None:
        # The socket's name lies in the abstract namespace, where file permissions guard nothing.
        if connection.peer_uid() != os.getuid():
            log.warning("refused a connection from another user's process")
            connection.close()

    def _on_frame(self, connection: wire.FramedConnection, message: wire.Message, payload: bytes) -> None:
        if (front_end := self._front_ends.get(connection)) is not None:
            self._on_front_end(front_end, message, payload)
        elif (engine := self._engines.get(connection)) is not None:
            self._on_engine(engine, message, payload)
        elif isinstance(message, wire.Hello) and message.role == "front_end":
            self._front_ends[connection] = _FrontEnd(connection)
        elif isinstance(message, wire.Hello) and message.role == "engine":
            self._engines[connection] = _Engine(connection)
        else:
            raise wire.FrameError(f"{type(message).__name__} before Hello")

    def _on_close(self, connection: wire.FramedConnection) -> None:
        if (front_end := self._front_ends.pop(connection, None)) is not None:
            for request in front_end.requests.values():
                self._batcher.cancel(request)
        elif (engine := self._engines.pop(connection, None)) is not None:
            self._lose_engine(engine)

    # -------------------------------------------------------------------------------------------------- front ends

    def _on_front_end(self, front_end: _FrontEnd, message: wire.Message, payload: bytes) -> None:
        match message:
            case wire.Submit():
                self._submit(front_end, message, payload)
            case wire.Cancel():
                if (request := front_end.requests.pop(message.id, None)) is not None:
                    self._batcher.cancel(request)
            case wire.Charge():
                self._charge(front_end, message)
            case wire.Report():
                for report in message.requests:
                    self._metrics.count_request(report)
            case wire.MetricsRequest():
                front_end.connection.send(wire.MetricsReply(message.id), [self._metrics.render()])
            case wire.StatusRequest():
                front_end.connection.send(wire.StatusReply(message.id, self._model_states()))
            case _:
                raise wire.FrameError(f"{type(message).__name__} from a front end")

    def _submit(self, front_end: _FrontEnd, message: wire.Submit, payload: bytes) -> None:
        if not self._known.get(message.model, False):
            front_end.connection.send(wire.WorkFailed(message.id, "model_loading", retry_after=1.0))
            return
        lengths = np.frombuffer(payload, dtype="<i4", count=message.rows)
        items = np.frombuffer(payload, dtype=np.uint8, offset=4 * message.rows)
        offsets = np.zeros(message.rows + 1, dtype=np.int64)
        # Images are of one size; a text takes four bytes a token.
        item_bytes = 4 * lengths if message.modality == "text" else np.full(message.rows, len(items) // message.rows)
        np.cumsum(item_bytes, out=offsets[1:])
        if offsets[-1] != len(items):
            raise wire.FrameError("lengths that do not add up")
        request = _Request(
            front_end, message.id, message.dimensions, message.outputs, items, offsets, added=time.monotonic()
        )
        try:
            self._batcher.add(request, Lane(message.model, message.modality), lengths.tolist())
        except QueueFullError as error:
            front_end.connection.send(wire.WorkFailed(message.id, "overloaded", self._time_for(error.waiting)))
            return
        front_end.requests[message.id] = request
        self._dispatch_soon()

    def _time_for(self, tokens: int) -> float:
        """Seconds until about half of `tokens` waiting tokens will have run: then there is room again."""
        engines = max(1, len(self._engines))
        return min(60.0, max(1.0, tokens / 2 / (self._rate * engines))) if self._rate else 1.0

    def _charge(self, front_end: _FrontEnd, message: wire.Charge) -> None:
        assert self._limiter is not None, "front ends charge only where a limit is set"
        charge = self._limiter.charge(message.address, time.monotonic())
        front_end.connection.send(
            wire.Charged(message.id, charge.allowed, charge.remaining, charge.reset, charge.retry_after)
        )

    def _model_states(self) -> list[wire.ModelState]:
        states = []
        for name, seen_before in self._known.items():
            ready = self._last_states.get(name)
            state = "ready" if name not in self._away_since else "restarting" if seen_before else "loading"
            states.append(
                wire.ModelState(name, state, ready.device, ready.dtype, ready.backend)
                if ready is not None
                else wire.ModelState(name, state, "", "", "")
            )
        return states

    def _fail(self, request: _Request, code: str, *, retry_after: float = 1.0, index: int | None = None) -> None:
        if request.front_end.requests.pop(request.id, None) is not None:
            request.front_end.connection.send(wire.WorkFailed(request.id, code, retry_after, index))

    # ----------------------------------------------------------------------------------------------------- engines

    def _on_engine(self, engine: _Engine, message: wire.Message, payload: bytes) -> None:
        match message:
            case wire.EngineReady():
                for model in message.models:
                    engine.bounds[Lane(model.name, model.modality)] = Bound(model.max_batch_tokens, Cost(model.cost))
                    self._known[model.name] = True
                    self._last_states[model.name] = model
                    self._away_since.pop(model.name, None)
            case wire.Pull():
                engine.pulls += 1
                self._dispatch_soon()
            case wire.BatchDone():
                self._batch_done(engine, message, payload)
            case wire.BatchFailed():
                self._lose_batch(engine.batches.pop(message.batch), ran=True, code="internal")
            case _:
                raise wire.FrameError(f"{type(message).__name__} from an engine")

    def _dispatch_soon(self) -> None:
        # Not at once: whatever else this turn of the event loop brings in shall be in the same batch.
        if not self._dispatching:
            self._dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch)

    def _dispatch(self) -> None:
        self._dispatching = False
        for engine in self._engines.values():
            while engine.pulls and (batch := self._batcher.take(engine.bounds)) is not None:
                engine.pulls -= 1
                self._send_batch(engine, batch)

    def _send_batch(self, engine: _Engine, batch: Batch[_Request]) -> None:
        now = time.monotonic()
        dimensions: list[int] = []
        outputs: list[int] = []
        pieces: list[npt.NDArray[np.uint8]] = []
        for segment in batch.segments:
            request = segment.work.key
            if request.started is None:
                request.started = now
            dimensions += [request.dimensions] * len(segment.positions)
            outputs += [request.outputs] * len(segment.positions)
            pieces += request.slice(segment.positions)
        facts = np.array([*batch.lengths, *dimensions, *outputs], dtype="<i4")
        engine.batches[batch.id] = batch
        waiting = self._batcher.waiting_tokens
        run = wire.Run(batch.id, batch.lane.model, batch.lane.modality, len(batch.lengths), waiting)
        engine.connection.send(run, [facts.data.cast("B"), np.concatenate(pieces).data])

    def _batch_done(self, engine: _Engine, message: wire.BatchDone, payload: bytes) -> None:
        batch = engine.batches[message.batch]
        try:
            arrays = unpack(message.arrays, len(batch.lengths), payload)
        except ValueError as error:
            # The connection ends, and the batch, which is still the engine's, goes back into the queue.
            raise wire.FrameError(str(error)) from None
        del engine.batches[message.batch]
        tokens = sum(batch.lengths)
        self._metrics.count_batch(
            batch.lane.model, len(batch.lengths), tokens, message.computed_tokens, message.seconds
        )
        rate = tokens / max(message.seconds, 1e-6)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate
        not_finite = set(message.not_finite)
        for finished in self._batcher.finish(batch.id):
            segment, first = finished.segment, finished.first_row
            bad = next((i for i in range(len(segment.positions)) if first + i in not_finite), None)
            if bad is not None:
                self._batcher.cancel(segment.work.key)
                self._fail(segment.work.key, "not_finite", index=segment.positions[bad])
            else:
                last = first + len(segment.positions)
                own = {name: rows.between(first, last) for name, rows in arrays.items()}
                # Arrays that only others in the batch asked for are empty here.
                self._send_part(finished, {name: rows for name, rows in own.items() if len(rows.elements)})

    def _send_part(self, finished: Finished[_Request], arrays: Mapping[str, Rows]) -> None:
        segment = finished.segment
        request = segment.work.key
        assert request.started is not None, "it was in a batch"
        if not finished.left:
            request.front_end.requests.pop(request.id, None)
        names, payload = pack(arrays)
        part = wire.Part(
            request.id,
            len(segment.positions),
            names,
            finished.left,
            queue=request.started - request.added,
            run=time.monotonic() - request.started,
        )
        positions = np.array(segment.positions, dtype="<i4").data.cast("B")
        request.front_end.connection.send(part, [positions, *payload])

    def _lose_engine(self, engine: _Engine) -> None:
        now = time.monotonic()
        # Batches that were bound and had not begun come back as they were: only the first one was running.
        for number, batch in reversed(list(enumerate(engine.batches.values()))):
            self._lose_batch(batch, ran=number == 0, code="engine_restarting")
        for lane in engine.bounds:
            if not any(lane in other.bounds for other in self._engines.values()):
                self._away_since[lane.model] = now
        self._dispatch_soon()

    def _lose_batch(self, batch: Batch[_Request], *, ran: bool, code: str) -> None:
        if ran:
            self._metrics.count_lost_batch(batch.lane.model)
        for work in self._batcher.give_back(batch.id, ran=ran):
            self._fail(work.key, code)
        self._dispatch_soon()

    def give_up_waiting(self) -> None:
        """Answer the requests whose engine has been away for too long. Called every now and then."""
        now = time.monotonic()
        for model, since in self._away_since.items():
            if now - since > ENGINE_PATIENCE:
                for modality in ("text", "image"):
                    for work in self._batcher.cancel_lane(Lane(model, modality)):
                        self._fail(work.key, "engine_restarting")


async def serve(listener: socket.socket, broker: Broker, alive: Liveness) -> None:
    """Accept front ends and engines on a listening Unix socket until the supervisor has gone."""
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(broker.connection, sock=listener)
    alive.ready()
    async with server:
        while await alive.beat():
            broker.give_up_waiting()
