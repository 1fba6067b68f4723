"""Front end's client, broker and engine in one event loop, around a runner that does what a device may do."""

import asyncio
import contextlib
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from embedserve.server import wire
from embedserve.server.arrays import Rows
from embedserve.server.broker import Broker
from embedserve.server.client import BrokerClient, NotFiniteError, Result, RunError, Texts
from embedserve.server.device import OutOfMemoryError
from embedserve.server.engine import Engine
from embedserve.server.errors import OverloadedError
from embedserve.server.runner import Embedded
from embedserve.server.schedule import InTurn, Pace, Schedule, SideBySide
from embedserve.server.teams import Team, Teams

FAILS, TOO_LARGE, NAN, SLOW, GATE = 666, 777, 13, 1000, 2000
"""Token ids that make a batch raise, need too much memory, have a vector that is not finite, take a while, or wait at
the gate."""


@dataclass
class FakeRunner:
    """A vector is (first id, number of ids); batches are kept, and the names of the threads that ran them."""

    device: str = "cpu"
    batches: list[list[int]] = field(default_factory=list)
    threads: list[str] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)

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
        self.threads.append(threading.current_thread().name)
        if FAILS in ids:
            raise RuntimeError("the device says no")
        if TOO_LARGE in ids:
            raise OutOfMemoryError("a text of so many tokens does not fit")
        if SLOW in ids:
            time.sleep(0.2)
        if GATE in ids:
            assert self.gate.wait(10)
        vectors = np.stack([firsts, lengths], axis=1).astype(np.float32)
        vectors[firsts == NAN] = np.nan
        return Embedded({"dense": Rows.of_matrix(vectors, dimensions)}, np.isfinite(vectors).all(axis=1), len(ids))


ONE_TEAM = InTurn(1)

TWO_OR_WIDE = SideBySide(2, {"m": Pace(rate=1000.0, slower=1.75)})
"""Narrow teams "0" and "1", and the wide team "2"."""


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


def engine_of(runner: FakeRunner, schedule: Schedule) -> tuple[Engine, Teams]:
    """An engine whose teams are threads named after their numbers."""
    count = schedule.concurrency + isinstance(schedule, SideBySide)
    teams = Teams([Team(str(number)) for number in range(count)], schedule, {"m": 8})
    return Engine({"m": runner}, teams), teams  # type: ignore[dict-item]


@contextlib.asynccontextmanager
async def world(
    runner: FakeRunner | None = None, *, max_queue_tokens: int = 1000, schedule: Schedule = ONE_TEAM
) -> AsyncIterator[World]:
    runner = runner or FakeRunner()
    address = f"\0embedserve-test-{secrets.token_hex(8)}"
    broker = Broker(["m"], max_queue_tokens=max_queue_tokens, rate_limit=0)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = await asyncio.get_running_loop().create_unix_server(broker.connection, sock=listener)
        engine, teams = engine_of(runner, schedule)
        connected = asyncio.create_task(engine.keep_connected(address))
        client = BrokerClient(address)
        await client.start()
        async with asyncio.timeout(10):
            while not [state for state in await client.status() if state.state == "ready"]:
                await asyncio.sleep(0.01)
        try:
            yield World(client, runner, engine)
        finally:
            runner.gate.set()
            await client.stop()
            connected.cancel()
            engine._connection.close()
            server.close()
            await asyncio.sleep(0.05)
            teams.close()


def story(told: Callable[[World], Any], runner: FakeRunner | None = None, **options: Any) -> None:
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


def test_no_other_request_pays_for_an_error_of_a_gpu() -> None:
    async def told(there: World) -> None:
        await there.run([1])  # from now on there is an estimate, and the next batch is asked for while one runs
        good, bad = asyncio.create_task(there.run([2])), asyncio.create_task(there.run([FAILS]))
        await until(there.engine.is_lost)
        await asyncio.sleep(0.05)  # it lives on for a while, in which nothing may be sent to it
        there.engine._connection.close()
        engine, teams = engine_of(FakeRunner(), ONE_TEAM)
        connected = asyncio.create_task(engine.keep_connected(there.client._address))
        assert dense(await good) == [[2, 1]]
        with pytest.raises(RunError):
            await bad
        assert there.runner.batches == [[1], [2, FAILS]]
        connected.cancel()
        engine._connection.close()
        await asyncio.sleep(0.05)
        teams.close()

    story(told, FakeRunner(device="cuda:0"))


def test_a_text_for_which_memory_is_short_is_told_so_and_the_gpu_goes_on() -> None:
    async def told(there: World) -> None:
        good, bad = await asyncio.gather(there.run([1], [2]), there.run([TOO_LARGE]), return_exceptions=True)
        assert isinstance(good, Result)
        assert dense(good) == [[1, 1], [2, 1]]
        assert isinstance(bad, OverloadedError)
        assert (bad.status, bad.code) == (503, "out_of_memory")
        assert not there.engine.is_lost()

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
        waiting = asyncio.create_task(there.run(*[[text] * 5 for text in range(4)]))
        await asyncio.sleep(0.05)
        with pytest.raises(OverloadedError) as caught:
            await there.run([2])
        assert caught.value.code == "overloaded"
        assert int(caught.value.headers["retry-after"]) >= 1
        await asyncio.gather(running, waiting)

    story(told, max_queue_tokens=20)


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0.005)


def eights(count: int) -> list[list[int]]:
    """Different texts that fill a batch each and wait at the gate."""
    return [[GATE, text, 0, 0, 0, 0, 0, 0] for text in range(count)]


def test_a_text_alone_has_all_cores_and_so_has_the_next_one() -> None:
    async def told(there: World) -> None:
        for text in range(5):
            await there.run([text])
        assert there.runner.threads == ["2"] * 5

    story(told, schedule=TWO_OR_WIDE)


def test_batches_of_a_large_request_run_side_by_side() -> None:
    async def told(there: World) -> None:
        asked = asyncio.create_task(there.run(*eights(6)))
        await until(lambda: len(there.runner.batches) == 2)
        assert sorted(there.runner.threads) == ["0", "1"], "both before either has ended"
        there.runner.gate.set()
        assert dense(await asked) == [[GATE, 8]] * 6
        # The last may find nothing beside or behind it.
        assert "2" not in there.runner.threads[:5]

    story(told, schedule=TWO_OR_WIDE)


def test_what_comes_while_all_cores_are_taken_waits_for_them_in_one_batch() -> None:
    async def told(there: World) -> None:
        first = asyncio.create_task(there.run([GATE]))
        await until(lambda: there.runner.threads == ["2"])
        others = [asyncio.create_task(there.run([text])) for text in (1, 2, 3)]
        await asyncio.sleep(0.05)
        assert len(there.runner.batches) == 1, "no team of some of the cores runs beside the one of all"
        there.runner.gate.set()
        await asyncio.gather(first, *others)
        assert there.runner.batches == [[GATE], [1, 2, 3]]

    story(told, schedule=TWO_OR_WIDE)


def test_a_batch_that_fails_on_one_team_leaves_the_other_teams_alone() -> None:
    async def told(there: World) -> None:
        good = asyncio.create_task(there.run(*eights(3)))
        await until(lambda: len(there.runner.batches) == 2)
        bad = asyncio.create_task(there.run([FAILS]))
        await asyncio.sleep(0.05)
        there.runner.gate.set()
        assert dense(await good) == [[GATE, 8]] * 3
        with pytest.raises(RunError):
            await bad
        assert not there.engine.is_lost()

    story(told, schedule=TWO_OR_WIDE)


def test_a_gpus_second_batch_is_launched_while_the_first_one_is_computed() -> None:
    async def told(there: World) -> None:
        await there.run([1] * 8)  # so that there is an estimate, which the launch exceeds
        asked = asyncio.create_task(there.run(*eights(4)))
        await until(lambda: len(there.runner.batches) == 3)
        assert sorted(there.runner.threads[1:]) == ["0", "1"]
        there.runner.gate.set()
        assert dense(await asked) == [[GATE, 8]] * 4

    story(told, FakeRunner(device="cuda:0"), schedule=InTurn(2, launch=10.0))


def test_one_hung_batch_of_two_is_enough_to_give_up_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    async def told(there: World) -> None:
        asked = asyncio.create_task(there.run(*eights(3)))
        await until(lambda: len(there.runner.batches) == 2)
        assert not there.engine.is_lost()
        started = there.engine._running[1].since
        monkeypatch.setattr(time, "monotonic", lambda: started + 601.0)
        assert there.engine.is_lost()
        monkeypatch.undo()
        there.runner.gate.set()
        await asked
        assert not there.engine.is_lost()

    story(told, schedule=TWO_OR_WIDE)


def test_both_running_batches_of_an_engine_that_is_gone_are_suspect() -> None:
    async def told(there: World) -> None:
        first = asyncio.create_task(there.run([GATE]))
        await until(lambda: len(there.runner.batches) == 1)
        others = [asyncio.create_task(there.run([text, GATE, GATE, GATE])) for text in (1, 2, 3, 4)]
        await asyncio.sleep(0.05)
        there.runner.gate.set()
        there.runner.gate.clear()
        await until(lambda: len(there.runner.batches) == 3)
        assert sorted(there.runner.batches[1:]) == [[1, 2], [3, 4]]
        there.engine._connection.close()
        await there.engine._connection.lost.wait()
        there.runner.gate.set()
        results = await asyncio.gather(first, *others)
        assert [dense(result) for result in results[1:]] == [[[text, 4]] for text in (1, 2, 3, 4)]
        assert sorted(there.runner.batches[3:]) == [[1], [2], [3], [4]], "each of its own"

    story(told, schedule=TWO_OR_WIDE)


def test_an_engine_that_answers_nonsense_is_cut_off_and_its_batch_runs_elsewhere() -> None:
    async def told() -> None:
        address = f"\0embedserve-test-{secrets.token_hex(8)}"
        broker = Broker(["m"], max_queue_tokens=100, rate_limit=0)
        with socket.socket(socket.AF_UNIX) as listener:
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
                engine, teams = engine_of(FakeRunner(), ONE_TEAM)
                connected = asyncio.create_task(engine.keep_connected(address))
                assert dense(await asked) == [[5, 1]]
            await client.stop()
            connected.cancel()
            engine._connection.close()
            server.close()
            await asyncio.sleep(0.05)
            teams.close()

    asyncio.run(told())
