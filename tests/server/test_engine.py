"""Front end's client, broker and engine in one event loop, around a runner that does what a device may do."""

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedserve.server import wire
from embedserve.server.arrays import Rows
from embedserve.server.broker import Broker
from embedserve.server.client import BrokerClient, NotFiniteError, Result, RunError, Texts
from embedserve.server.engine import Engine, _Batch, _Estimates
from embedserve.server.errors import OverloadedError
from embedserve.server.runner import Embedded

FAILS, NAN, SLOW = 666, 13, 1000
"""Token ids that make a batch raise, their own vector not finite, or the batch take a while."""


@dataclass
class FakeRunner:
    """A vector is (first id, number of ids); batches are kept."""

    device: str = "cpu"
    batches: list[list[int]] = field(default_factory=list)

    @property
    def info(self) -> Any:
        return SimpleNamespace(
            max_batch_tokens=8,
            modalities=("text",),
            cost="packed",
            device=self.device,
            dtype="float32",
            backend="fake",
            dimension=2,
        )

    def run(self, ids: np.ndarray, lengths: np.ndarray, dimensions: np.ndarray, outputs: np.ndarray) -> Embedded:
        firsts = ids[np.cumsum(lengths) - lengths]
        self.batches.append(firsts.tolist())
        if FAILS in ids:
            raise RuntimeError("the device says no")
        if SLOW in ids:
            time.sleep(0.2)
        vectors = np.stack([firsts, lengths], axis=1).astype(np.float32)
        vectors[firsts == NAN] = np.nan
        return Embedded({"dense": Rows.of_matrix(vectors, dimensions)}, np.isfinite(vectors).all(axis=1), len(ids))


def dense(result: Result) -> list[list[float]]:
    rows = result.arrays["dense"]
    return [rows[row].tolist() for row in range(len(rows))]


@dataclass
class World:
    client: BrokerClient
    runner: FakeRunner
    engine: Engine

    async def run(self, *texts: list[int], dimensions: int = 2) -> Result:
        ids = np.array([token for text in texts for token in text], dtype=np.int32)
        lengths = np.array([len(text) for text in texts], dtype=np.int32)
        return await self.client.run("m", Texts(ids, lengths), dimensions=dimensions)


@contextlib.asynccontextmanager
async def world(runner: FakeRunner | None = None, *, max_queue_tokens: int = 1000) -> AsyncIterator[World]:
    runner = runner or FakeRunner()
    address = f"\0embedserve-test-{secrets.token_hex(8)}"
    broker = Broker(["m"], max_queue_tokens=max_queue_tokens, rate_limit=0)
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as device:
        listener.bind(address)
        listener.listen()
        server = await asyncio.get_running_loop().create_unix_server(broker.connection, sock=listener)
        engine = Engine({"m": runner}, device)  # type: ignore[dict-item]
        connected = asyncio.create_task(engine.keep_connected(address))
        client = BrokerClient(address)
        await client.start()
        async with asyncio.timeout(10):
            while not [state for state in await client.status() if state.state == "ready"]:
                await asyncio.sleep(0.01)
        try:
            yield World(client, runner, engine)
        finally:
            await client.stop()
            connected.cancel()
            engine._connection.close()
            server.close()
            await asyncio.sleep(0.05)


def story(told: Callable[[World], Any], runner: FakeRunner | None = None, **options: int) -> None:
    async def tell() -> None:
        async with asyncio.timeout(30), world(runner, **options) as there:
            await told(there)

    asyncio.run(tell())


def test_vectors_come_back_in_order_from_several_batches() -> None:
    async def told(there: World) -> None:
        texts = [[100 + i] * (1 + i % 5) for i in range(40)]
        result = await there.run(*texts)
        assert dense(result) == [[100 + i, 1 + i % 5] for i in range(40)]
        assert len(there.runner.batches) > 5
        assert result.queue >= 0
        assert result.run > 0

    story(told)


def test_requests_of_different_dimensions_share_a_batch() -> None:
    async def told(there: World) -> None:
        slow = asyncio.create_task(there.run([SLOW]))
        await asyncio.sleep(0.05)
        one, two = await asyncio.gather(there.run([5], dimensions=1), there.run([6], dimensions=2))
        await slow
        assert dense(one) == [[5]]
        assert dense(two) == [[6, 1]]
        assert [5, 6] in there.runner.batches

    story(told)


def test_a_vector_that_is_not_finite_fails_its_request_and_no_neighbour() -> None:
    async def told(there: World) -> None:
        slow = asyncio.create_task(there.run([SLOW]))
        await asyncio.sleep(0.05)
        good, bad = await asyncio.gather(there.run([1], [2]), there.run([3], [NAN]), return_exceptions=True)
        await slow
        assert isinstance(good, Result)
        assert isinstance(bad, NotFiniteError)
        assert bad.index == 1
        assert [1, 2, 3, NAN] in there.runner.batches, "they shared a batch"

    story(told)


def test_a_request_whose_batch_raises_twice_fails_and_no_neighbour() -> None:
    async def told(there: World) -> None:
        slow = asyncio.create_task(there.run([SLOW]))
        await asyncio.sleep(0.05)
        good, bad = await asyncio.gather(there.run([1], [2]), there.run([FAILS]), return_exceptions=True)
        await slow
        assert isinstance(good, Result)
        assert dense(good) == [[1, 1], [2, 1]]
        assert isinstance(bad, RunError)
        assert there.runner.batches.count([FAILS]) == 1, "once alone, after once with the others"
        assert not there.engine.is_lost()

    story(told)


def test_after_an_error_of_a_gpu_the_engine_asks_to_be_replaced() -> None:
    async def told(there: World) -> None:
        failing = asyncio.create_task(there.run([FAILS]))
        while not there.engine.is_lost():
            await asyncio.sleep(0.01)
        assert there.runner.batches == [[FAILS]], "and takes nothing more"
        failing.cancel()

    story(told, FakeRunner(device="cuda:0"))


def test_what_waits_of_a_cancelled_request_does_not_run() -> None:
    async def told(there: World) -> None:
        slow = asyncio.create_task(there.run([SLOW]))
        await asyncio.sleep(0.05)
        gone = asyncio.create_task(there.run([7]))
        await asyncio.sleep(0.05)
        gone.cancel()
        await slow
        await there.run([8])
        assert [8] in there.runner.batches
        assert not any(7 in batch for batch in there.runner.batches)

    story(told)


def test_a_full_queue_refuses_and_says_when_to_come_back() -> None:
    async def told(there: World) -> None:
        running = asyncio.create_task(there.run([SLOW]))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(there.run(*[[1] * 5] * 4))
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError) as caught:
            await there.run([2])
        assert caught.value.code == "overloaded"
        assert int(caught.value.headers["retry-after"]) >= 1
        await asyncio.gather(running, waiting)

    story(told, max_queue_tokens=20)


def batch_of(*lengths: int) -> _Batch:
    row: Any = np.array(lengths, dtype=np.int32)
    connection: Any = None
    return _Batch(connection, wire.Run(1, "m", "text", len(lengths)), row, row, row, np.empty(0, np.uint8))


def test_long_texts_have_an_estimate_of_their_own() -> None:
    # Attention costs the square of the length: judged by short texts, a book would seem to end long before it does, and
    # the next batch would be bound behind it all the while.
    estimates = _Estimates()
    assert estimates.at_most(batch_of(8)) is None
    estimates.learn(batch_of(8, 8), 0.016)
    assert estimates.seconds(batch_of(9)) == pytest.approx(0.009)
    assert estimates.seconds(batch_of(8192)) is None
    assert estimates.at_most(batch_of(8192)) == pytest.approx(8192 * 0.001 * 2**10)
    estimates.learn(batch_of(8192), 4.0)
    assert estimates.seconds(batch_of(8192)) == pytest.approx(4.0)
    assert estimates.seconds(batch_of(10)) == pytest.approx(0.010)


def test_an_engine_that_answers_nonsense_is_cut_off_and_its_batch_runs_elsewhere() -> None:
    async def told() -> None:
        address = f"\0embedserve-test-{secrets.token_hex(8)}"
        broker = Broker(["m"], max_queue_tokens=100, rate_limit=0)
        with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as device:
            listener.bind(address)
            listener.listen()
            server = await asyncio.get_running_loop().create_unix_server(broker.connection, sock=listener)

            def answer(connection: wire.FramedConnection, message: wire.Message, _payload: bytes) -> None:
                assert isinstance(message, wire.Run)
                connection.send(wire.BatchDone(message.batch, ["nonsense"], 0.1, 1, []), [b"\0\0\0\0"])

            rogue = await wire.connect(address, lambda: wire.FramedConnection(answer, lambda _: None))
            rogue.send(wire.Hello("engine", 1))
            rogue.send(wire.EngineReady([wire.ModelReady("m", "text", 8, "packed", "cpu", "float32", "fake")]))
            rogue.send(wire.Pull())
            client = BrokerClient(address)
            await client.start()
            while not [state for state in await client.status() if state.state == "ready"]:
                await asyncio.sleep(0.01)
            texts = Texts(np.array([5], dtype=np.int32), np.array([1], dtype=np.int32))
            asked = asyncio.create_task(client.run("m", texts, dimensions=2))
            async with asyncio.timeout(10):
                await rogue.lost.wait()
                runner: Any = FakeRunner()
                engine = Engine({"m": runner}, device)
                connected = asyncio.create_task(engine.keep_connected(address))
                assert dense(await asked) == [[5, 1]]
            await client.stop()
            connected.cancel()
            engine._connection.close()
            server.close()
            await asyncio.sleep(0.05)

    asyncio.run(told())
