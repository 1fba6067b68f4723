"""What the front end calls to get vectors, and the implementation that asks the broker.

The protocol knows token ids, pixels and named arrays, nothing of sockets: another implementation may stand behind it.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from embedserve.server import wire
from embedserve.server.arrays import OUTPUTS, Rows, join, output_bits, unpack
from embedserve.server.errors import APIError, OverloadedError

__all__ = ["BrokerClient", "EngineClient", "Images", "NotFiniteError", "Result", "RunError", "Texts"]

log = logging.getLogger("embedserve.client")

BROKER_PATIENCE = 10.0
"""Seconds that a request waits for a broker that is being restarted."""


@dataclass(frozen=True)
class Texts:
    """Tokenised texts: `ids` int32 [total], one text behind the other; `lengths` int32 [rows]."""

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Images:
    """Prepared images: `pixels` uint8 [rows, size, size, 3], red, green, blue; `tokens` that the model makes of one."""

    pixels: npt.NDArray[np.uint8]
    tokens: int


@dataclass(frozen=True)
class Result:
    """What the engine made of a request.

    `arrays` has the names of `arrays.ARRAYS`, as far as they were asked for; each has a row for each item, in order.
    `queue` is the seconds until the first item began to run, `run` those from then until the last had.
    """

    arrays: Mapping[str, Rows]
    queue: float
    run: float


class RunError(Exception):
    """The engine could not run the request, and a second try ended the same way."""


class NotFiniteError(Exception):
    """What the model made of item `index` holds a NaN or an infinity."""

    def __init__(self, index: int) -> None:
        super().__init__(f"the vector of item {index} is not finite")
        self.index = index


class EngineClient(Protocol):
    """Runs texts or images through a model, wherever it lives."""

    async def run(
        self, model: str, items: Texts | Images, *, dimensions: int, outputs: Sequence[str] = ("dense",)
    ) -> Result:
        """What `outputs` names of each item; dense vectors of `dimensions` components. When the caller is cancelled,
        what has not run yet does not.

        Raises `OverloadedError` when it cannot be done now, `NotFiniteError` and `RunError` when it cannot be done.
        """
        ...


class _BrokerLostError(Exception):
    """The connection ended before the answer came."""


@dataclass(eq=False, slots=True)
class _Pending:
    """A submitted request of so many rows, and what has arrived: positions of rows, and their arrays by name.

    `row_of` int32 [inputs]: which row answers each input, where some are equal.
    """

    done: asyncio.Future[Result]
    rows: int
    outputs: Sequence[str]
    row_of: npt.NDArray[np.int32] | None
    parts: list[tuple[npt.NDArray[np.int32], Mapping[str, Rows]]] = field(default_factory=list)


class BrokerClient:
    """The front end's connection to the broker; made anew whenever the broker is."""

    def __init__(self, address: str) -> None:
        """`address`: the broker's Unix socket, in the abstract namespace where it begins with NUL."""
        self._address = address
        self._connection: wire.FramedConnection | None = None
        self._connected = asyncio.Event()
        self._last_id = 0
        self._runs: dict[int, _Pending] = {}
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._reports: list[wire.RequestReport] = []
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to keep the connection up."""
        self._keeper = asyncio.create_task(self._keep_connected())

    async def stop(self) -> None:
        """Send what is left to report, and close the connection."""
        self._send_reports()
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            self._connection.close()

    # -------------------------------------------------------------------------------------------------- questions

    async def run(
        self, model: str, items: Texts | Images, *, dimensions: int, outputs: Sequence[str] = ("dense",)
    ) -> Result:
        """See `EngineClient.run`. A request whose broker dies is submitted once more to its successor."""
        try:
            return await self._run(model, items, dimensions, outputs)
        except _BrokerLostError:
            log.warning("the broker was lost; a request is submitted again", extra={"model": model})
        try:
            return await self._run(model, items, dimensions, outputs)
        except _BrokerLostError:
            raise OverloadedError("engine_restarting") from None

    async def charge(self, address: str) -> wire.Charged:
        """Count a request of a client address. Raises `OverloadedError` while there is no broker to count."""
        reply: wire.Charged = await self._ask(wire.Charge(self._next_id(), address))
        return reply

    async def status(self) -> list[wire.ModelState]:
        """The state of every model; raises `OverloadedError` while there is no broker."""
        reply: wire.StatusReply = await self._ask(wire.StatusRequest(self._next_id()))
        return reply.models

    async def metrics(self) -> bytes:
        """The exposition text, this front end's latest requests included."""
        self._send_reports()
        text: bytes = await self._ask(wire.MetricsRequest(self._next_id()))
        return text

    def report(self, report: wire.RequestReport) -> None:
        """Have a finished request counted. Reports of one turn of the event loop travel together."""
        if not self._reports:
            asyncio.get_running_loop().call_soon(self._send_reports)
        self._reports.append(report)

    # -------------------------------------------------------------------------------------------------- connection

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    async def _keep_connected(self) -> None:
        while True:
            connection = await wire.connect(
                self._address, lambda: wire.FramedConnection(self._on_frame, self._on_close)
            )
            if not connection.closed:
                connection.send(wire.Hello("front_end", os.getpid()))
                self._connection = connection
                self._connected.set()
            await connection.lost.wait()

    def _on_close(self, _connection: wire.FramedConnection) -> None:
        self._connected.clear()
        self._connection = None
        # Answers would come over the connection that ended; none of them will.
        for pending in self._runs.values():
            if not pending.done.done():
                pending.done.set_exception(_BrokerLostError())
        for question in self._questions.values():
            if not question.done():
                question.set_exception(_BrokerLostError())

    async def _connect(self) -> wire.FramedConnection:
        try:
            async with asyncio.timeout(BROKER_PATIENCE):
                while self._connection is None:
                    await self._connected.wait()
        except TimeoutError:
            raise OverloadedError("engine_restarting") from None
        return self._connection

    async def _ask(self, question: wire.Charge | wire.StatusRequest | wire.MetricsRequest) -> Any:
        connection = self._connection or await self._connect()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._questions[question.id] = answer
        try:
            connection.send(question)
            return await answer
        except _BrokerLostError:
            raise OverloadedError("engine_restarting") from None
        finally:
            del self._questions[question.id]

    async def _run(self, model: str, items: Texts | Images, dimensions: int, outputs: Sequence[str]) -> Result:
        connection = self._connection or await self._connect()
        if isinstance(items, Texts):
            modality, lengths, content = "text", items.lengths, items.ids.data.cast("B")
        else:
            lengths = np.full(len(items.pixels), items.tokens, np.int32)
            modality, content = "image", items.pixels.reshape(-1).data
        inputs, row_of = len(lengths), None
        if inputs > 1 and (found := _equal(content, 4 * lengths if modality == "text" else None, inputs)) is not None:
            contents, row_of = found
            # The first input of each row: np.unique names them in the order of the rows.
            lengths, content = lengths[np.unique(row_of, return_index=True)[1]], memoryview(b"".join(contents))
        rows = len(lengths)
        request_id = self._next_id()
        pending = _Pending(asyncio.get_running_loop().create_future(), rows, outputs, row_of)
        self._runs[request_id] = pending
        submit = wire.Submit(request_id, model, modality, rows, dimensions, output_bits(outputs), inputs - rows)
        connection.send(submit, [lengths.data.cast("B"), content])
        try:
            return await pending.done
        except asyncio.CancelledError:
            connection.send(wire.Cancel(request_id))
            raise
        finally:
            del self._runs[request_id]

    def _send_reports(self) -> None:
        # Taken first: were one of them in the way, the next would still be sent.
        reports, self._reports = self._reports, []
        # Without a broker they are lost, as are the counters that they would have gone into.
        if reports and self._connection is not None:
            self._connection.send(wire.Report(reports))

    # ----------------------------------------------------------------------------------------------------- answers

    def _on_frame(self, _connection: wire.FramedConnection, message: wire.Message, payload: bytes) -> None:
        match message:
            case wire.Parts():
                self._take_parts(message, payload)
            case wire.WorkFailed():
                if (pending := self._runs.get(message.id)) is not None and not pending.done.done():
                    pending.done.set_exception(_work_error(message, pending.row_of))
            case wire.MetricsReply():
                self._answer(message.id, payload)
            case wire.Charged() | wire.StatusReply():
                self._answer(message.id, message)
            case _:
                raise wire.FrameError(f"{type(message).__name__} from the broker")

    def _take_parts(self, message: wire.Parts, payload: bytes) -> None:
        answered = sum(answer.rows for answer in message.answers)
        positions, places = np.frombuffer(payload, dtype="<i4", count=2 * answered).reshape(2, answered)
        arrays = unpack(message.arrays, message.rows, payload, start=8 * answered)
        first = 0
        for answer in message.answers:
            own = slice(first, first + answer.rows)
            first += answer.rows
            pending = self._runs.get(answer.id)
            if pending is not None and not pending.done.done():
                rows = {name: array.take(places[own]) for name, array in arrays.items()}
                pending.parts.append((positions[own], rows))
                if not answer.left:
                    _finish(pending, answer.queue, answer.run)

    def _answer(self, question_id: int, answer: Any) -> None:
        question = self._questions.get(question_id)
        if question is not None and not question.done():
            question.set_result(answer)


def _equal(
    content: memoryview, sizes: npt.NDArray[np.int32] | None, inputs: int
) -> tuple[list[bytes], npt.NDArray[np.int32]] | None:
    """The distinct items of a request, and which of them each input is; None where no two are equal.

    `sizes`: bytes of each item; of one size without it.
    """
    stops = (
        accumulate(sizes.tolist(), initial=0)
        if sizes is not None
        else range(0, len(content) + 1, len(content) // inputs)
    )
    rows: dict[bytes, int] = {}
    row_of = [rows.setdefault(content[start:stop].tobytes(), len(rows)) for start, stop in pairwise(stops)]
    return None if len(rows) == inputs else (list(rows), np.array(row_of, dtype=np.int32))


def _finish(pending: _Pending, queue: float, run: float) -> None:
    """All parts are there."""
    names = [name for output in pending.outputs for name in OUTPUTS[output]]
    arrays = {name: join(name, pending.rows, pending.parts) for name in names}
    if pending.row_of is not None:
        arrays = {name: rows.take(pending.row_of) for name, rows in arrays.items()}
    pending.done.set_result(Result(arrays, queue, run))


def _work_error(failed: wire.WorkFailed, row_of: npt.NDArray[np.int32] | None) -> APIError | NotFiniteError | RunError:
    if failed.code == "not_finite":
        assert failed.index is not None
        return NotFiniteError(failed.index if row_of is None else row_of.tolist().index(failed.index))
    if failed.code == "internal":
        return RunError()
    return OverloadedError(failed.code, failed.retry_after)
