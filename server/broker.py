"""The broker process: the one place with state.

It owns all that must be one: the queue of all front ends, the rate limits, the counters. Front ends send it texts
as token ids and images as pixels, engines pull batches; it imports no torch and knows nothing of HTTP.

Texts that are equal in all that their vector depends on (digests.py) run once, and with a cache (cache.py) those that
came before do not run at all. Both are decided here and nowhere else: front ends and engines know nothing of it.

When an engine's connection ends, its batches go back to the front of the queue; when a front end's ends, its requests
are dropped. Requests whose engine stays away for `ENGINE_PATIENCE` seconds are answered with a 503.
"""

import asyncio
import logging
import os
import socket
import time
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, pairwise

import numpy as np

from embedserve.server import wire
from embedserve.server.arrays import Rows, array_names, pack, unpack
from embedserve.server.batcher import Batch, Batcher, Bound, Cost, Finished, Lane, QueueFullError
from embedserve.server.cache import ResultCache
from embedserve.server.digests import Kind, digests
from embedserve.server.limits import RateLimiter
from embedserve.server.metrics import Metrics
from embedserve.server.process import Liveness

__all__ = ["ENGINE_PATIENCE", "Broker", "serve"]

log = logging.getLogger("embedserve.broker")

ENGINE_PATIENCE = 30.0
"""Seconds that requests wait for an engine to come back."""


@dataclass(eq=False, slots=True)
class _Request:
    """A request of a front end that has not been answered in full."""

    front_end: "_FrontEnd"
    id: int
    dimensions: int
    outputs: int
    positions: Mapping[bytes, int]
    """Where each text stands in the request, by its digest."""
    items: memoryview
    offsets: Sequence[int]
    """Where each item starts in `items`, and the end."""
    added: float
    started: float | None = None

    def slices(self, texts: Sequence[bytes]) -> list[memoryview]:
        """The content of some of its texts, in as few pieces as there are runs of neighbours."""
        if len(texts) == len(self.positions):
            return [self.items]
        pieces = []
        start = stop = self.positions[texts[0]]
        for text in texts:
            position = self.positions[text]
            if position != stop:
                pieces.append(self.items[self.offsets[start] : self.offsets[stop]])
                start = position
            stop = position + 1
        pieces.append(self.items[self.offsets[start] : self.offsets[stop]])
        return pieces


@dataclass(eq=False)
class _FrontEnd:
    """A connected front end and its requests."""

    connection: wire.FramedConnection
    requests: dict[int, _Request] = field(default_factory=dict)


@dataclass(eq=False)
class _Engine:
    """A connected engine: what it can run, how many batches at once, how many it asked for in vain, and those that it
    has, oldest first."""

    connection: wire.FramedConnection
    bounds: dict[Lane, Bound] = field(default_factory=dict)
    concurrency: int = 1
    pulls: int = 0
    batches: OrderedDict[int, Batch[_Request, bytes]] = field(default_factory=OrderedDict)


class Broker:
    """The broker's state, and what each message does to it. Runs in one event loop."""

    def __init__(
        self,
        models: Sequence[str],
        *,
        max_queue_tokens: int,
        rate_limit: int,
        cache_bytes: int = 0,
        resumed: bool = False,
    ) -> None:
        """`models`: the names that engines will announce. `resumed`: this broker takes the place of one that died."""
        self._batcher = Batcher[_Request, bytes](max_queue_tokens)
        self._cache = ResultCache(cache_bytes) if cache_bytes else None
        self._limiter = RateLimiter(rate_limit) if rate_limit else None
        self._front_ends: dict[wire.FramedConnection, _FrontEnd] = {}
        self._engines: dict[wire.FramedConnection, _Engine] = {}
        self._known = dict.fromkeys(models, resumed)
        """Model → whether an engine has had it ready before."""
        self._last_states: dict[str, wire.ModelReady] = {}
        self._editions: dict[str, int] = defaultdict(int)
        """Model → how often an engine has had it ready. Each has read the folder anew; other weights may lie there."""
        self._variants: dict[str, set[tuple[str, str, str]]] = defaultdict(set)
        """Model → the kinds of device, dtypes and backends that compute it."""
        self._away_since: dict[str, float] = dict.fromkeys(models, time.monotonic())
        """Models without an engine, and since when."""
        self._dispatching = False
        self._rate = 0.0
        """Tokens a second of one engine, lately."""
        self._metrics = Metrics()
        self._metrics.observe("queue_texts", lambda: self._batcher.waiting_texts)
        self._metrics.observe("queue_tokens", lambda: self._batcher.waiting_tokens)
        self._metrics.observe("engines", lambda: len([e for e in self._engines.values() if e.bounds]))
        if (cache := self._cache) is not None:
            self._metrics.observe("cache_bytes", lambda: cache.bytes)
            self._metrics.observe("cache_evictions", lambda: cache.evictions)

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
        request, texts = self._read(front_end, message, payload)
        found = self._look_up(message.model, texts)
        for text in found:
            del texts[text]
        if texts:
            try:
                work = self._batcher.add(request, Lane(message.model, message.modality), texts)
            except QueueFullError as error:
                front_end.connection.send(wire.WorkFailed(message.id, "overloaded", self._time_for(error.waiting)))
                return
            front_end.requests[message.id] = request
            if len(work.waiting) < len(texts):
                request.started = request.added  # a batch that runs has some of its texts
            if work.waiting:
                self._dispatch_soon()
        self._metrics.count_repeats(message.model, message.repeats)
        if found:
            self._send_found(request, found, left=len(texts))

    def _read(self, front_end: _FrontEnd, message: wire.Submit, payload: bytes) -> tuple[_Request, dict[bytes, int]]:
        """A request from its frame, and the tokens of its texts by digest."""
        if not 0 < message.rows <= len(payload) // 4:
            raise wire.FrameError(f"{message.rows} lengths in {len(payload)} bytes")
        view = memoryview(payload)
        lengths = view[: 4 * message.rows].cast("i").tolist()
        items = view[4 * message.rows :]
        # Images are of one size; a text takes four bytes a token.
        image_bytes = len(items) // message.rows
        sizes = [4 * length for length in lengths] if message.modality == "text" else [image_bytes] * message.rows
        offsets = [0, *accumulate(sizes)]
        if min(lengths) < 1 or offsets[-1] != len(items):
            raise wire.FrameError("lengths that do not add up")
        kind = Kind(message.model, self._editions[message.model], message.modality, message.dimensions, message.outputs)
        keys = digests(kind, [items[start:stop] for start, stop in pairwise(offsets)])
        positions = dict(zip(keys, range(message.rows), strict=True))
        if len(positions) != message.rows:
            raise wire.FrameError("equal items in one request")
        request = _Request(
            front_end,
            message.id,
            message.dimensions,
            message.outputs,
            positions,
            items,
            offsets,
            added=time.monotonic(),
        )
        return request, dict(zip(keys, lengths, strict=True))

    def _can_keep(self, model: str) -> bool:
        """Engines that differ give vectors that differ in their last digits: none answers for the others."""
        return len(self._variants[model]) == 1

    def _look_up(self, model: str, texts: Mapping[bytes, int]) -> dict[bytes, Sequence[bytes]]:
        """Those of the texts whose result is in the cache, with it."""
        if self._cache is None or not self._can_keep(model):
            return {}
        found = {text: result for text in texts if (result := self._cache.get(text)) is not None}
        self._metrics.count_look_ups(model, len(found), len(texts) - len(found))
        return found

    def _send_found(self, request: _Request, found: Mapping[bytes, Sequence[bytes]], left: int) -> None:
        rows = len(found)
        positions = [request.positions[text] for text in found]
        payload: list[wire.Buffer] = [np.array([*positions, *range(rows)], dtype="<i4").tobytes()]
        for arrays in zip(*found.values(), strict=True):
            payload.append(np.array([len(array) // 4 for array in arrays], dtype="<i4").tobytes())
            payload += arrays
        answer = wire.Answer(request.id, rows, left, queue=0.0, run=0.0)
        request.front_end.connection.send(wire.Parts(rows, array_names(request.outputs), [answer]), payload)

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
                engine.concurrency = message.concurrency
                for model in message.models:
                    self._editions[model.name] += 1
                    self._variants[model.name].add((model.device.partition(":")[0], model.dtype, model.backend))
                    if self._cache is not None and not self._can_keep(model.name):
                        log.warning("its engines differ, so its results are not cached", extra={"model": model.name})
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
                self._lose_batch(engine.batches.pop(message.batch), ran=True, code=message.code)
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
            # Beside a batch that must run alone there is no other on its engine.
            while engine.pulls and not any(batch.alone for batch in engine.batches.values()):
                batch = self._batcher.take(engine.bounds, idle=not engine.batches)
                if batch is None:
                    break
                engine.pulls -= 1
                self._send_batch(engine, batch)

    def _send_batch(self, engine: _Engine, batch: Batch[_Request, bytes]) -> None:
        now = time.monotonic()
        for work in batch.claims:
            if work.key.started is None:
                work.key.started = now
        dimensions: list[int] = []
        outputs: list[int] = []
        pieces: list[memoryview] = []
        for work, texts in batch.segments:
            request = work.key
            dimensions += [request.dimensions] * len(texts)
            outputs += [request.outputs] * len(texts)
            pieces += request.slices(texts)
        facts = np.array([*batch.lengths, *dimensions, *outputs], dtype="<i4")
        engine.batches[batch.id] = batch
        waiting = self._batcher.waiting_tokens
        run = wire.Run(batch.id, batch.lane.model, batch.lane.modality, len(batch.lengths), waiting)
        engine.connection.send(run, [facts.tobytes(), *pieces])

    def _batch_done(self, engine: _Engine, message: wire.BatchDone, payload: bytes) -> None:
        batch = engine.batches[message.batch]
        model, rows = batch.lane.model, len(batch.lengths)
        asked = {name for outputs in {work.key.outputs for work, _ in batch.segments} for name in array_names(outputs)}
        try:
            arrays = unpack(message.arrays, rows, payload)
            if not asked <= arrays.keys():
                raise ValueError(f"arrays {message.arrays}, not {sorted(asked)}")
        except ValueError as error:
            # The connection ends, and the batch, which is still the engine's, goes back into the queue.
            raise wire.FrameError(str(error)) from None
        del engine.batches[message.batch]
        tokens = sum(batch.lengths)
        self._metrics.count_batch(model, rows, tokens, message.computed_tokens, message.seconds)
        rate = tokens / max(message.seconds, 1e-6)
        self._rate = 0.9 * self._rate + 0.1 * rate if self._rate else rate

        row_of = dict(zip(chain.from_iterable(texts for _, texts in batch.segments), range(rows), strict=True))
        bad_rows = set(message.not_finite)
        not_finite = {text for text, row in row_of.items() if row in bad_rows} if bad_rows else set()
        if self._cache is not None and self._can_keep(model):
            self._keep(self._cache, batch, arrays, row_of, not_finite)
        answers: dict[_FrontEnd, list[Finished[_Request, bytes]]] = defaultdict(list)
        answered = 0
        for finished in self._batcher.finish(batch.id):
            answered += len(finished.texts)
            request = finished.work.key
            bad = [request.positions[text] for text in finished.texts if text in not_finite] if not_finite else None
            if bad:
                self._batcher.cancel(request)
                self._fail(request, "not_finite", index=min(bad))
            else:
                answers[request.front_end].append(finished)
        self._metrics.count_repeats(model, max(0, answered - rows))
        for front_end, parts in answers.items():
            self._send_parts(front_end, parts, arrays, row_of)
        if engine.pulls and self._batcher.waiting_texts:
            self._dispatch_soon()  # what must run alone waits for an engine that has nothing else

    def _send_parts(
        self,
        front_end: _FrontEnd,
        parts: Sequence[Finished[_Request, bytes]],
        arrays: Mapping[str, Rows],
        row_of: Mapping[bytes, int],
    ) -> None:
        """Answer the requests of one front end from a batch, in one frame."""
        now = time.monotonic()
        answers, positions, places = [], [], []
        for work, texts, left in parts:
            request = work.key
            assert request.started is not None, "it was in a batch"
            if not left:
                front_end.requests.pop(request.id, None)
            positions += [request.positions[text] for text in texts]
            places += [row_of[text] for text in texts]
            answers.append(
                wire.Answer(request.id, len(texts), left, request.started - request.added, now - request.started)
            )
        needed = sorted(set(places))
        if len(needed) < len(row_of):
            # The other rows are another front end's, or nobody's any more.
            index = np.array(needed, dtype=np.int32)
            arrays = {name: rows.take(index) for name, rows in arrays.items()}
            new_place = {row: place for place, row in enumerate(needed)}
            places = [new_place[row] for row in places]
        names, payload = pack(arrays)
        where = np.array([*positions, *places], dtype="<i4").tobytes()
        front_end.connection.send(wire.Parts(len(needed), names, answers), [where, *payload])

    def _keep(
        self,
        cache: ResultCache,
        batch: Batch[_Request, bytes],
        arrays: Mapping[str, Rows],
        row_of: Mapping[bytes, int],
        not_finite: set[bytes],
    ) -> None:
        """Put the rows of a batch into the cache."""
        for work, texts in batch.segments:
            own = [arrays[name] for name in array_names(work.key.outputs)]
            for text in texts:
                if text not in not_finite:
                    cache.put(text, tuple(rows[row_of[text]].tobytes() for rows in own))

    def _lose_engine(self, engine: _Engine) -> None:
        now = time.monotonic()
        # Those that were bound and cannot have begun come back as they were.
        for number, batch in reversed(list(enumerate(engine.batches.values()))):
            self._lose_batch(batch, ran=number < engine.concurrency, code="engine_restarting")
        for lane in engine.bounds:
            if not any(lane in other.bounds for other in self._engines.values()):
                self._away_since[lane.model] = now
        self._dispatch_soon()

    def _lose_batch(self, batch: Batch[_Request, bytes], *, ran: bool, code: str) -> None:
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
