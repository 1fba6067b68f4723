"""Frames survive every way of being cut up, and nonsense ends the connection."""

import asyncio
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedserve.server import wire

MESSAGES = st.one_of(
    st.builds(wire.Cancel, st.integers(0, 1 << 40)),
    st.builds(wire.Pull),
    st.builds(
        wire.Submit,
        st.integers(0, 1 << 40),
        st.text(),
        st.sampled_from(["text", "image"]),
        st.integers(0, 4096),
        st.integers(0, 4096),
        st.integers(0, 7),
    ),
    st.builds(wire.WorkFailed, st.integers(0, 9), st.text(), st.floats(0, 60), st.none() | st.integers(0, 9)),
)


def receive(chunks: list[bytes]) -> tuple[list[tuple[wire.Message, bytes]], wire.FramedConnection]:
    got: list[tuple[wire.Message, bytes]] = []
    connection = wire.FramedConnection(lambda _c, message, payload: got.append((message, payload)), lambda _c: None)
    connection.connection_made(Mock(spec=asyncio.Transport))
    for chunk in chunks:
        if not connection.closed:
            connection.data_received(chunk)
    return got, connection


@given(st.data(), st.lists(st.tuples(MESSAGES, st.binary(max_size=200)), max_size=6))
def test_frames_arrive_whole_however_the_stream_is_cut(
    data: st.DataObject, frames: list[tuple[wire.Message, bytes]]
) -> None:
    stream = b"".join(b"".join(wire.pack_frame(message, [payload])) for message, payload in frames)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    chunks = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)], strict=True)]
    got, connection = receive(chunks)
    assert got == frames
    assert not connection.closed


@given(st.binary(min_size=8, max_size=300))
def test_nonsense_never_raises(noise: bytes) -> None:
    receive([noise])


@pytest.mark.parametrize(
    "noise",
    [b"\xff" * 16, b"\x05\0\0\0\0\0\0\0hello", b"\x02\0\0\0\0\0\0\0\x91\xa3"],
    ids=["too large", "not msgpack", "no such message"],
)
def test_nonsense_ends_the_connection(noise: bytes) -> None:
    _, connection = receive([noise])
    assert connection.closed
