"""Front ends' clients and the broker in one event loop, with an engine that does what the test tells it to.

A text is its ids; its vector is (first id, number of ids). What counts is what reaches the engine, and who gets what.
"""

import asyncio
import contextlib
import random
import re
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import numpy as np
import pytest

from embedserve.server import wire
from embedserve.server.arrays import Rows, array_names, pack
from embedserve.server.broker import Broker
from embedserve.server.client import BrokerClient, Images, NotFiniteError, Result, Texts
from embedserve.server.errors import OverloadedError

NAN = 13
"""A text that begins with this has a vector that is not finite."""


@dataclass
class StubEngine:
    """An engine whose batches wait until they are answered by hand; `dies` ends its connection."""

    connection: wire.FramedConnection
    waiting: list[tuple[wire.Run, list[list[int]], list[int], list[int]]] = field(default_factory=list)
    seen: list[list[list[int]]] = field(default_factory=list)
    """The texts of every batch that has come."""
    came: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def connected(
        cls, address: str, *, bound: int = 1000, pulls: int = 1, concurrency: int = 1, dtype: str = "float32"
    ) -> "StubEngine":
        engine: StubEngine

        def on_frame(_: wire.FramedConnection, message: wire.Message, payload: bytes) -> None:
            assert isinstance(message, wire.Run)
            engine._take(message, payload)

        engine = cls(await wire.connect(address, lambda: wire.FramedConnection(on_frame, lambda _: None)))
        engine.connection.send(wire.Hello("engine", 1))
        ready = [
            wire.ModelReady("m", modality, bound, "packed", "cpu", dtype, "stub") for modality in ("text", "image")
        ]
        engine.connection.send(wire.EngineReady(ready, concurrency))
        for _ in range(pulls):
            engine.pull()
        return engine

    def pull(self) -> None:
        self.connection.send(wire.Pull())

    def _take(self, run: wire.Run, payload: bytes) -> None:
        lengths, dimensions, outputs = np.frombuffer(payload, "<i4", 3 * run.rows).reshape(3, -1)
        if run.modality == "image":
            items = np.frombuffer(payload, np.uint8, offset=12 * run.rows).reshape(run.rows, -1)
        else:
            items = np.split(np.frombuffer(payload, "<i4", offset=12 * run.rows), np.cumsum(lengths)[:-1])
        texts = [item.tolist() for item in items]
        self.waiting.append((run, texts, dimensions.tolist(), outputs.tolist()))
        self.seen.append(texts)
        self.came.set()

    async def batch(self) -> list[list[int]]:
        """Wait for a batch; its texts."""
        while not self.waiting:
            self.came.clear()
            await self.came.wait()
        return self.waiting[0][1]

    async def answer(self) -> list[list[int]]:
        """Wait for a batch, answer it and ask for another; its texts."""
        await self.batch()
        run, texts, dimensions, outputs = self.waiting.pop(0)
        vectors = [
            np.array([text[0], len(text), *text], "<f4")[:size] for text, size in zip(texts, dimensions, strict=True)
        ]
        arrays = {
            name: Rows.of(
                [v if name in array_names(bits) else v[:0] for v, bits in zip(vectors, outputs, strict=True)],
                "<i4" if name == "sparse_ids" else "<f4",
            )
            for name in array_names(int(np.bitwise_or.reduce(outputs)))
        }
        bad = [row for row, text in enumerate(texts) if text[0] == NAN]
        names, payload = pack(arrays)
        self.connection.send(wire.BatchDone(run.batch, names, 0.001, sum(map(len, texts)), bad), payload)
        self.pull()
        return texts

    async def keep_answering(self) -> None:
        while True:
            await self.answer()

    async def dies(self) -> None:
        self.connection.close()
        await self.connection.lost.wait()
        await asyncio.sleep(0.02)


@dataclass
class World:
    address: str
    broker: Broker
    client: BrokerClient
    other: BrokerClient
    """Of another front end."""
    engine: StubEngine

    async def metric(self, name: str) -> float:
        """A counter's value; 0 where nothing was counted yet."""
        found = re.search(rf"^embedserve_{name}(?:{{[^}}]*}})? (\S+)$", (await self.client.metrics()).decode(), re.M)
        return float(found[1]) if found else 0.0


@contextlib.asynccontextmanager
async def world(*, max_queue_tokens: int = 1000, cache_bytes: int = 0, **engine: int) -> AsyncIterator[World]:
    address = f"\0embedserve-test-{secrets.token_hex(8)}"
    broker = Broker(["m"], max_queue_tokens=max_queue_tokens, rate_limit=0, cache_bytes=cache_bytes)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        server = await asyncio.get_running_loop().create_unix_server(broker.connection, sock=listener)
        stub = await StubEngine.connected(address, **engine)
        clients = BrokerClient(address), BrokerClient(address)
        for client in clients:
            await client.start()
        while not [state for state in await clients[0].status() if state.state == "ready"]:
            await asyncio.sleep(0.01)
        there = World(address, broker, *clients, stub)
        try:
            yield there
        finally:
            for client in clients:
                await client.stop()
            there.engine.connection.close()
            server.close()
            await asyncio.sleep(0.02)


def story(told: Callable[[World], Awaitable[None]], **options: int) -> None:
    async def tell() -> None:
        async with asyncio.timeout(20), world(**options) as there:
            await told(there)

    asyncio.run(tell())


def texts_of(*texts: list[int]) -> Texts:
    return Texts(
        np.array([token for text in texts for token in text], dtype=np.int32),
        np.array([len(text) for text in texts], dtype=np.int32),
    )


async def run(
    client: BrokerClient, *texts: list[int], dimensions: int = 2, outputs: tuple[str, ...] = ("dense",)
) -> Result:
    return await client.run("m", texts_of(*texts), dimensions=dimensions, outputs=outputs)


def ask(client: BrokerClient, *texts: list[int], **options: int) -> asyncio.Task[Result]:
    return asyncio.create_task(run(client, *texts, **options))  # type: ignore[arg-type]


def dense(result: Result) -> list[list[float]]:
    rows = result.arrays["dense"]
    return [rows[row].tolist() for row in range(len(rows))]


async def settle() -> None:
    """Until all that was sent has come."""
    await asyncio.sleep(0.02)


# ------------------------------------------------------------------------------------------ equal texts, in one request


def test_equal_texts_of_a_request_are_one_row() -> None:
    async def told(there: World) -> None:
        asked = ask(there.client, [7], [8, 9], [7], [7], [8, 9], [5])
        assert await there.engine.answer() == [[7], [8, 9], [5]]
        assert dense(await asked) == [[7, 1], [8, 2], [7, 1], [7, 1], [8, 2], [5, 1]]
        assert await there.metric("repeated_texts_total") == 3

    story(told)


def test_n_equal_texts_are_one_row_of_one_batch() -> None:
    async def told(there: World) -> None:
        asked = ask(there.client, *[[4, 2]] * 500)
        await there.engine.answer()
        assert dense(await asked) == [[4, 2]] * 500
        assert there.engine.seen == [[[4, 2]]]

    story(told, max_queue_tokens=10)


def test_equal_images_are_one_row() -> None:
    async def told(there: World) -> None:
        pixels = np.stack([np.full((2, 2, 3), shade, np.uint8) for shade in (10, 20, 10)])
        asked = asyncio.create_task(there.client.run("m", Images(pixels, 5), dimensions=1))
        assert await there.engine.answer() == [[10] * 12, [20] * 12]
        assert dense(await asked) == [[10], [20], [10]]

    story(told)


def test_the_first_input_with_a_vector_that_is_not_finite_is_named() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [9])
        await there.engine.batch()
        one = ask(there.client, [1], [1], [2], [NAN], [NAN])
        two = ask(there.other, [NAN], [3])
        three = ask(there.other, [2], [3])
        await settle()
        await there.engine.answer()
        assert len(await there.engine.answer()) == 4
        with pytest.raises(NotFiniteError) as caught:
            await one
        assert caught.value.index == 3
        with pytest.raises(NotFiniteError) as caught:
            await two
        assert caught.value.index == 0
        assert dense(await three) == [[2, 1], [3, 1]]
        await first

    story(told)


# ----------------------------------------------------------------------------------------------- equal texts, in flight


def test_a_text_that_runs_for_another_is_waited_for() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [1])
        await there.engine.batch()
        second, third = ask(there.client, [1]), ask(there.other, [2], [1])
        await settle()
        await there.engine.answer()
        assert dense(await first) == dense(await second) == [[1, 1]]
        assert await there.engine.answer() == [[2]]
        result = await third
        assert dense(result) == [[2, 1], [1, 1]]
        assert result.queue >= 0
        assert await there.metric("repeated_texts_total") == 2

    story(told)


def test_texts_that_wait_are_run_once_for_all() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [9])
        await there.engine.batch()
        asked = [ask(client, [1], [2 + n % 2]) for n, client in enumerate([there.client, there.other] * 10)]
        await settle()
        await there.engine.answer()
        assert sorted(await there.engine.answer()) == [[1], [2], [3]]
        assert [dense(result) for result in await asyncio.gather(*asked)] == [[[1, 1], [2, 1]], [[1, 1], [3, 1]]] * 10
        assert len(there.engine.seen) == 2
        await first

    story(told)


def test_another_size_or_output_is_another_answer() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [9])
        await there.engine.batch()
        short = ask(there.client, [1, 5], dimensions=1)
        long = ask(there.client, [1, 5], dimensions=3)
        sparse = asyncio.create_task(run(there.other, [1, 5], outputs=("dense", "sparse")))
        await settle()
        await there.engine.answer()
        assert await there.engine.answer() == [[1, 5]] * 3
        assert dense(await short) == [[1]]
        assert dense(await long) == [[1, 2, 1]]
        assert sorted((await sparse).arrays) == ["dense", "sparse_ids", "sparse_weights"]
        await first

    story(told)


def test_who_hangs_up_takes_nothing_from_who_asked_for_the_same() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [9])
        await there.engine.batch()
        gone, stays = ask(there.client, [1], [2]), ask(there.other, [1])
        await settle()
        gone.cancel()
        await settle()
        await there.engine.answer()
        assert await there.engine.answer() == [[1]], "and what only the other wanted does not run"
        assert dense(await stays) == [[1, 1]]
        await first

    story(told)


def test_a_request_split_over_batches_comes_back_in_order() -> None:
    async def told(there: World) -> None:
        answering = asyncio.create_task(there.engine.keep_answering())
        many = [[100 + i % 30] * (1 + i % 5) for i in range(80)]
        results = await asyncio.gather(
            *(run(client, *many[n:]) for n in range(5) for client in (there.client, there.other))
        )
        for n, result in enumerate(results):
            assert dense(result) == [[text[0], len(text)] for text in many[n // 2 :]]
        assert max(len(batch) for batch in there.engine.seen) <= 8
        answering.cancel()

    story(told, bound=8)


# --------------------------------------------------------------------------------------------------------------- losses


async def another_engine(there: World, **options: int) -> None:
    await there.engine.dies()
    there.engine = await StubEngine.connected(there.address, **options)
    await settle()


def test_a_text_that_kills_takes_no_request_with_an_equal_innocent_text() -> None:
    async def told(there: World) -> None:
        poison = ask(there.client, [66], [1])
        await there.engine.batch()
        innocent = ask(there.other, [1])
        await settle()
        await another_engine(there)
        assert await there.engine.batch() == [[66], [1]], "alone, with all its texts"
        await another_engine(there)
        with pytest.raises(OverloadedError, match="engine"):
            await poison
        assert await there.engine.answer() == [[1]]
        assert dense(await innocent) == [[1, 1]]

    story(told)


def test_a_text_that_kills_by_itself_is_tried_twice_however_many_send_it() -> None:
    async def told(there: World) -> None:
        asked = [ask(client, [66]) for client in (there.client, there.other)]
        await there.engine.batch()
        asked += [ask(client, [66]) for client in (there.client, there.other)]
        await settle()
        await another_engine(there)
        await there.engine.batch()
        await another_engine(there)
        for outcome in await asyncio.gather(*asked, return_exceptions=True):
            assert isinstance(outcome, OverloadedError)
        await settle()
        assert there.engine.seen == []

    story(told)


def test_all_batches_that_may_have_run_are_suspect_and_run_one_after_the_other() -> None:
    async def told(there: World) -> None:
        one, two = ask(there.client, [1]), None
        await there.engine.batch()
        two = ask(there.client, [2], [3])
        await settle()
        assert there.engine.seen == [[[1]], [[2], [3]]]
        await another_engine(there, pulls=2, concurrency=2)
        assert await there.engine.batch() == [[1]]
        await settle()
        assert len(there.engine.seen) == 1, "nothing runs beside a suspect"
        await there.engine.answer()
        assert dense(await one) == [[1, 1]]
        assert await there.engine.answer() == [[2], [3]]
        assert dense(await two) == [[2, 1], [3, 1]]

    story(told, pulls=2, concurrency=2)


# ---------------------------------------------------------------------------------------------------------------- cache


def test_a_text_that_came_before_makes_no_batch() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [1], [2, 3])
        await there.engine.answer()
        before = (await first).arrays["dense"]
        for client in (there.client, there.other):
            again = (await run(client, [1], [2, 3])).arrays["dense"]
            assert again.elements.tobytes() == before.elements.tobytes()
            assert again.counts.tolist() == before.counts.tolist()
        assert len(there.engine.seen) == 1
        assert await there.metric("cache_hits_total") == 4
        assert await there.metric("cache_misses_total") == 2
        assert await there.metric("cache_bytes") > 0

    story(told, cache_bytes=1 << 20)


def test_only_what_is_new_of_a_request_is_queued() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [1], [2])
        await there.engine.answer()
        await first
        mixed = ask(there.client, [3], [2], [4], [1], [2])
        assert await there.engine.answer() == [[3], [4]]
        assert dense(await mixed) == [[3, 1], [2, 1], [4, 1], [1, 1], [2, 1]]

    story(told, cache_bytes=1 << 20)


def test_all_outputs_of_a_text_come_back_from_the_cache() -> None:
    async def told(there: World) -> None:
        outputs = ("dense", "sparse", "colbert")
        first = asyncio.create_task(run(there.client, [1, 2], [3], outputs=outputs))
        await there.engine.answer()
        before, again = (await first).arrays, (await run(there.client, [1, 2], [3], outputs=outputs)).arrays
        assert {n: (r.counts.tolist(), r.elements.tolist()) for n, r in again.items()} == {
            n: (r.counts.tolist(), r.elements.tolist()) for n, r in before.items()
        }
        assert len(there.engine.seen) == 1
        other = asyncio.create_task(run(there.client, [3]))
        assert await there.engine.answer() == [[3]], "asked for otherwise, it is another answer"
        await other

    story(told, cache_bytes=1 << 20)


def test_what_is_not_finite_is_not_kept() -> None:
    async def told(there: World) -> None:
        for _ in range(2):
            asked = ask(there.client, [NAN], [1 + len(there.engine.seen)])
            assert [NAN] in await there.engine.answer()
            with pytest.raises(NotFiniteError):
                await asked

    story(told, cache_bytes=1 << 20)


def test_an_engine_that_comes_anew_is_asked_anew() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [1])
        await there.engine.answer()
        await first
        await another_engine(there)
        again = ask(there.client, [1])
        assert await there.engine.answer() == [[1]], "other weights may lie in its folder"
        await again

    story(told, cache_bytes=1 << 20)


def test_engines_that_differ_are_not_answered_for() -> None:
    async def told(there: World) -> None:
        half = await StubEngine.connected(there.address, pulls=0, dtype="float16")
        await settle()
        for _ in range(2):
            asked = ask(there.client, [1])
            assert await there.engine.answer() == [[1]]
            await asked
        half.connection.close()

    story(told, cache_bytes=1 << 20)


def test_a_full_queue_takes_what_the_cache_can_answer() -> None:
    async def told(there: World) -> None:
        first = ask(there.client, [1])
        await there.engine.answer()
        await first
        running, waiting = ask(there.client, [2] * 8), None
        await there.engine.batch()
        waiting = ask(there.client, [3] * 10)
        await settle()
        with pytest.raises(OverloadedError):
            await run(there.client, [4])
        assert dense(await run(there.client, [1])) == [[1, 1]]
        await there.engine.answer()
        await there.engine.answer()
        await asyncio.gather(running, waiting)

    story(told, cache_bytes=1 << 20, max_queue_tokens=10)


# --------------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    "payload",
    [b"", b"\1\0\0\0", b"\1\0\0\0" * 2, b"\0\0\0\0\1\0\0\0\7\0\0\0", b"\1\0\0\0" * 4],
    ids=["nothing", "too few lengths", "no items", "an empty text", "equal texts"],
)
def test_a_submit_that_does_not_hold_together_ends_its_connection_alone(payload: bytes) -> None:
    async def told(there: World) -> None:
        def ignore(*_: object) -> None:
            pass

        rogue = await wire.connect(there.address, lambda: wire.FramedConnection(ignore, ignore))
        rogue.send(wire.Hello("front_end", 1))
        rogue.send(wire.Submit(1, "m", "text", 2, 2, 1), [payload])
        await rogue.lost.wait()
        asked = ask(there.client, [1])
        await there.engine.answer()
        assert dense(await asked) == [[1, 1]]

    story(told)


def test_the_answers_of_a_batch_to_one_front_end_are_one_frame() -> None:
    async def told(there: World) -> None:
        frames: list[tuple[wire.Message, bytes]] = []
        raw = await wire.connect(
            there.address,
            lambda: wire.FramedConnection(
                lambda _, message, payload: frames.append((message, payload)), lambda _: None
            ),
        )
        raw.send(wire.Hello("front_end", 1))
        first = ask(there.client, [9])
        await there.engine.batch()
        for number in range(10):
            ids = np.array([1, 20 + number % 5], "<i4").tobytes()  # a length, and ids that are equal now and then
            raw.send(wire.Submit(number, "m", "text", 1, 2, 1), [ids])
        await settle()
        await there.engine.answer()
        await there.engine.answer()
        await settle()
        [(parts, payload)] = frames
        assert isinstance(parts, wire.Parts)
        assert parts.rows == 5
        assert sorted(answer.id for answer in parts.answers) == list(range(10))
        assert len(payload) == 2 * 4 * 10 + 5 * 4 + 5 * 2 * 4, "positions and places, counts, vectors"
        await first
        raw.close()

    story(told)


def test_an_engine_that_leaves_out_what_was_asked_for_is_cut_off() -> None:
    async def told(there: World) -> None:
        asked = asyncio.create_task(run(there.client, [1], outputs=("dense", "sparse")))
        await there.engine.batch()
        names, payload = pack({"dense": Rows.of([np.zeros(2, "<f4")], "<f4")})
        there.engine.connection.send(wire.BatchDone(there.engine.waiting[0][0].batch, names, 0.001, 1, []), payload)
        await there.engine.connection.lost.wait()
        there.engine = await StubEngine.connected(there.address)
        await there.engine.answer()
        assert dense(await asked) == [[1, 1]]

    story(told)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_engines_do_every_request_ends_with_its_own_vectors(seed: int) -> None:
    """Two engines that answer late, ask for several batches or die; clients with few texts, some of whom hang up."""
    draw = random.Random(seed)

    async def engine(there: World) -> None:
        while True:
            stub = await StubEngine.connected(there.address, bound=12, pulls=draw.choice([1, 3]), concurrency=2)
            try:
                for _ in range(draw.randint(2, 12)):
                    await stub.batch()
                    await asyncio.sleep(draw.choice([0, 0, 0.001]))
                    await stub.answer()
            finally:
                stub.connection.close()
            await stub.connection.lost.wait()

    async def client(there: World, number: int) -> int:
        answered = 0
        for _ in range(25):
            texts = [[draw.randint(20, 40)] * draw.randint(1, 4) for _ in range(draw.randint(1, 12))]
            asked = ask((there.client, there.other)[number % 2], *texts)
            if draw.random() < 0.1:
                await asyncio.sleep(0.001)
                asked.cancel()
                continue
            with contextlib.suppress(OverloadedError):
                assert dense(await asked) == [[text[0], len(text)] for text in texts]
                answered += 1
        return answered

    async def told(there: World) -> None:
        await there.engine.dies()
        engines = [asyncio.create_task(engine(there)) for _ in range(2)]
        answered = await asyncio.gather(*(client(there, number) for number in range(12)))
        assert min(answered) > 10
        # The last may have hung up just now; what is never forgotten would stay until the story's time is over.
        while len(there.broker._batcher):
            await asyncio.sleep(0.01)
        for task in engines:
            task.cancel()

    story(told, cache_bytes=10_000 if seed % 2 else 0)
