"""Frames between the processes, over Unix stream sockets.

A frame is eight bytes (two little-endian uint32: the header's length, the payload's), a msgpack header, which is one of
the messages below, and the payload: raw little-endian arrays, one behind the other, whose sizes the header tells. No
pickle: a frame can hold nothing but these messages.

Stream sockets and not a message queue, because the death of a peer must be visible at once: the connection ends. What
was sent over it ends with it, and nothing reaches the peer's successor by accident.
"""

import asyncio
import socket
import struct
from collections.abc import Callable, Sequence
from typing import cast

import msgspec

__all__ = [
    "Answer",
    "BatchDone",
    "BatchFailed",
    "Cancel",
    "Charge",
    "Charged",
    "EngineReady",
    "FrameError",
    "FramedConnection",
    "Hello",
    "Message",
    "MetricsReply",
    "MetricsRequest",
    "ModelReady",
    "ModelState",
    "Parts",
    "Pull",
    "Report",
    "RequestReport",
    "Run",
    "StatusReply",
    "StatusRequest",
    "Submit",
    "WorkFailed",
    "connect",
    "pack_frame",
]

_CREDENTIALS = struct.Struct("iII")
_PREFIX = struct.Struct("<II")
_CONNECT_SECONDS = 0.05
"""Between two tries to connect."""
MAX_HEADER_BYTES = 16 << 20
"""Thirty bytes for each request of the largest batch are well below."""
MAX_PAYLOAD_BYTES = 1 << 30


class _Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of all messages: a tagged msgpack array."""


# ---------------------------------------------------------------------------------------------- any peer → broker


class Hello(_Message, frozen=True):
    """The first frame of a connection: who speaks. `role` is ``front_end`` or ``engine``."""

    role: str
    pid: int


# --------------------------------------------------------------------------------------------- front end → broker


class Submit(_Message, frozen=True):
    """A request's texts, or its images, no two of them equal. Payload: lengths int32 [rows], then the items.

    `modality` is ``text``, and the items are token ids int32 [sum of lengths]; or ``image``, and they are pixels,
    uint8, as many of each image, while the lengths are the tokens that the model makes of them. `dimensions` is the
    size of the vectors asked for, `outputs` see `arrays.output_bits`. `id` is the front end's own and comes back in
    every answer. `repeats` more inputs were equal to one of these, for the counters.
    """

    id: int
    model: str
    modality: str
    rows: int
    dimensions: int
    outputs: int
    repeats: int = 0


class Cancel(_Message, frozen=True):
    """The client of request `id` has gone; its waiting texts need not run."""

    id: int


class Charge(_Message, frozen=True):
    """Count one request of this client address against its rate limit."""

    id: int
    address: str


class RequestReport(msgspec.Struct, frozen=True, array_like=True):
    """What became of one HTTP request, for the counters. Durations in seconds; `model` is empty when it was unknown."""

    model: str
    status: int
    code: str
    texts: int
    tokens: int
    total: float
    tokenize: float
    queue: float
    run: float
    encode: float


class Report(_Message, frozen=True):
    """Finished requests; nobody answers this."""

    requests: list[RequestReport]


class MetricsRequest(_Message, frozen=True):
    """Asks for the text of /metrics."""

    id: int


class StatusRequest(_Message, frozen=True):
    """Asks which models can be used right now."""

    id: int


# --------------------------------------------------------------------------------------------- broker → front end


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What `Parts` hold for request `id`: `rows` of its rows, while `left` are still to come.

    `queue` and `run` are seconds: until the first of the request's rows began to run, and from then until these were
    done.
    """

    id: int
    rows: int
    left: int
    queue: float
    run: float


class Parts(_Message, frozen=True):
    """What one batch has for the requests of one front end: one frame, however many requests.

    Payload: two int32 for each row of each answer, first all positions (indices into the request's items), then all
    places (indices into the rows of this frame; equal items of two requests have the same); then `arrays` of `rows`
    rows, as `arrays.pack` has them.
    """

    rows: int
    arrays: list[str]
    answers: list[Answer]


class WorkFailed(_Message, frozen=True):
    """Request `id` gets no vectors. `code` is a key of `errors.OverloadedError.MESSAGES`, ``internal``, or
    ``not_finite``, and then `index` is the guilty text."""

    id: int
    code: str
    retry_after: float
    index: int | None = None


class Charged(_Message, frozen=True):
    """The answer to `Charge`: whether the request may go on, and what is left. Times in seconds."""

    id: int
    allowed: bool
    remaining: int
    reset: float
    retry_after: float


class MetricsReply(_Message, frozen=True):
    """Payload: the exposition text, UTF-8."""

    id: int


class ModelState(msgspec.Struct, frozen=True, array_like=True):
    """A model as the broker sees it. `state` is ``ready``, ``loading`` or ``restarting``."""

    name: str
    state: str
    device: str
    dtype: str
    backend: str


class StatusReply(_Message, frozen=True):
    """The answer to `StatusRequest`: one entry for every model that engines are to serve."""

    id: int
    models: list[ModelState]


# ------------------------------------------------------------------------------------------------ broker → engine


class Run(_Message, frozen=True):
    """A batch. Payload: lengths, dimensions and outputs, int32 [rows] each, then the items; see `Submit`.

    `waiting`: tokens that are still in the queue, for an engine that can run one batch fast or several at once.
    """

    batch: int
    model: str
    modality: str
    rows: int
    waiting: int = 0


# ------------------------------------------------------------------------------------------------ engine → broker


class ModelReady(msgspec.Struct, frozen=True, array_like=True):
    """A model that has been loaded and has answered, for one modality. `cost` is ``packed`` or ``padded``, the bound in
    its tokens."""

    name: str
    modality: str
    max_batch_tokens: int
    cost: str
    device: str
    dtype: str
    backend: str


class EngineReady(_Message, frozen=True):
    """What an engine serves, an entry for each modality of a model; the second frame of its connection.

    `concurrency`: batches that it may run at once. It starts them in the order in which they came, so when it dies,
    that many of the oldest that it had may be the reason.
    """

    models: list[ModelReady]
    concurrency: int = 1


class Pull(_Message, frozen=True):
    """The engine is idle, or about to be: it takes one more batch."""


class BatchDone(_Message, frozen=True):
    """A batch's answer. Payload: `arrays` as `arrays.pack` has them. `not_finite` lists the rows that hold a NaN or an
    infinity.

    `seconds` is the time on the device, `computed_tokens` the tokens that were computed, padding included.
    """

    batch: int
    arrays: list[str]
    seconds: float
    computed_tokens: int
    not_finite: list[int]


class BatchFailed(_Message, frozen=True):
    """The batch raised an exception in the engine, which lives on. The engine has logged it. `code` as in `WorkFailed`,
    for a request that ran alone."""

    batch: int
    code: str


Message = (
    Hello
    | Submit
    | Cancel
    | Charge
    | Report
    | MetricsRequest
    | StatusRequest
    | Parts
    | WorkFailed
    | Charged
    | MetricsReply
    | StatusReply
    | Run
    | EngineReady
    | Pull
    | BatchDone
    | BatchFailed
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode

Buffer = bytes | bytearray | memoryview


class FrameError(Exception):
    """The peer sent something that is no frame. The connection is of no more use."""


def pack_frame(message: Message, payload: Sequence[Buffer] = ()) -> list[Buffer]:
    """The buffers of one frame, ready for `writelines`; the payload is not copied.

    Payload buffers must be flat byte buffers (``memoryview(array).cast("B")``).
    """
    header = _encode(message)
    size = sum(len(buffer) for buffer in payload)
    return [_PREFIX.pack(len(header), size) + header, *payload]


class FramedConnection(asyncio.Protocol):
    """One end of a connection that speaks frames.

    `on_frame(connection, message, payload)` is called for each frame, in order, from the event loop; the payload is a
    bytes object of its own. `on_close(connection)` is called once, when the peer has gone or sent nonsense.
    """

    def __init__(
        self,
        on_frame: Callable[["FramedConnection", Message, bytes], None],
        on_close: Callable[["FramedConnection"], None],
        on_open: Callable[["FramedConnection"], None] | None = None,
    ) -> None:
        self._on_frame = on_frame
        self._on_close = on_close
        self._on_open = on_open
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self.closed = False
        self.lost = asyncio.Event()
        """Set when the connection has ended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name
        if self._on_open is not None:
            self._on_open(self)

    def peer_uid(self) -> int:
        """The user id of the process at the other end, as the kernel has it."""
        assert self._transport is not None
        credentials = self._transport.get_extra_info("socket").getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        _pid, uid, _gid = _CREDENTIALS.unpack(credentials)
        return int(uid)

    def data_received(self, data: bytes) -> None:
        """Called by the event loop."""
        # What came is read where it lies; only a frame that is not whole yet is kept, and put together.
        if self._buffer:
            self._buffer += data
        stream: bytes | bytearray = self._buffer or data
        start, end = 0, len(stream)
        try:
            with memoryview(stream) as view:
                while end - start >= _PREFIX.size:
                    header_size, payload_size = _PREFIX.unpack_from(stream, start)
                    if header_size > MAX_HEADER_BYTES or payload_size > MAX_PAYLOAD_BYTES:
                        raise FrameError(f"a frame of {header_size} + {payload_size} bytes")
                    payload_at = start + _PREFIX.size + header_size
                    stop = payload_at + payload_size
                    if stop > end:
                        break
                    message = _decode(view[start + _PREFIX.size : payload_at])
                    start = stop
                    self._on_frame(self, message, bytes(view[payload_at:stop]))
                    if self.closed:
                        return
        except (FrameError, msgspec.DecodeError):
            self.close()
        else:
            if stream is self._buffer:
                del self._buffer[:start]
            else:
                self._buffer += data[start:]

    def connection_lost(self, _exc: Exception | None) -> None:
        """Called by the event loop."""
        self.closed = True
        self._buffer.clear()
        self.lost.set()
        self._on_close(self)

    def send(self, message: Message, payload: Sequence[Buffer] = ()) -> None:
        """Queue a frame for sending. A frame for a peer that has gone is dropped: its `on_close` tells."""
        if self._transport is None or self.closed:
            return
        # The transport keeps what it cannot send at once, so a caller must not change the payload afterwards.
        self._transport.writelines(pack_frame(message, payload))

    def close(self) -> None:
        """End the connection once what was sent has left; `on_close` follows from the event loop."""
        self.closed = True
        if self._transport is not None:
            self._transport.close()


async def connect(address: str, connection: Callable[[], FramedConnection]) -> FramedConnection:
    """Connect to a listening Unix socket, as often as it takes: its process may be about to come back."""
    while True:
        # uvloop cannot connect to an abstract address (its name begins with NUL), but takes a connected socket.
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        peer.setblocking(False)
        try:
            peer.connect(address)
        except OSError:
            peer.close()
            await asyncio.sleep(_CONNECT_SECONDS)
            continue
        _, connected = await asyncio.get_running_loop().create_unix_connection(connection, sock=peer)
        return connected
