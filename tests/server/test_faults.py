"""Processes that die or freeze under load: every request ends with vectors or a 503, and the server mends itself."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from embedserve.server import supervisor, wire
from tests.support import MODEL, RunningServer

SECONDS = 30
"""Within which every request must have ended, and the server be ready again."""


@pytest.fixture(scope="module")
def two_front_ends() -> Iterator[RunningServer]:
    with RunningServer("--rate-limit", "0", "--front-ends", "2") as server:
        yield server


class Load:
    """Clients that ask again as soon as they have an answer, until told to stop. Each answer must be right."""

    def __init__(self, server: RunningServer, clients: int = 8, texts: int = 24) -> None:
        self.url = server.url
        self.clients = clients
        # Each client has texts of its own, and knows their vectors from before the fault.
        self.texts = [[f"text {i} of the {100 + n}th client under load" for i in range(texts)] for n in range(clients)]
        self.vectors = [vectors_of(server.embed(texts)) for texts in self.texts]
        self.outcomes: Counter[str] = Counter()
        self.slowest = 0.0

    async def __aenter__(self) -> "Load":
        self._stop = asyncio.Event()
        self._tasks = [asyncio.create_task(self._client(number)) for number in range(self.clients)]
        await asyncio.sleep(0.5)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.wait_for(asyncio.gather(*self._tasks), SECONDS)

    async def _client(self, number: int) -> None:
        body = {"model": MODEL, "input": self.texts[number]}
        while not self._stop.is_set():
            start = time.monotonic()
            # A connection each time: a front end that was killed took its connections with it.
            async with httpx.AsyncClient(timeout=SECONDS) as http:
                try:
                    answer = await http.post(f"{self.url}/v1/embeddings", json=body)
                except httpx.TimeoutException:
                    raise AssertionError("a request hangs") from None
                except httpx.TransportError:
                    self.outcomes["connection lost"] += 1
                    continue
            self.slowest = max(self.slowest, time.monotonic() - start)
            self.outcomes[str(answer.status_code)] += 1
            if answer.status_code == 200:
                assert np.abs(vectors_of(answer) - self.vectors[number]).max() < 1e-5
            else:
                assert answer.status_code == 503, answer.text
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "engine_restarting"


def vectors_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([item["embedding"] for item in answer.json()["data"]], dtype=np.float32)


async def until_replaced(server: RunningServer, name: str, old: list[int], victim: int) -> None:
    """Wait until the victim has gone, another has come, and the server is ready."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        now = [process.pid for process in server.children(name)]
        if victim not in now and len(now) == len(old):
            async with httpx.AsyncClient(timeout=SECONDS) as http:
                try:
                    if (await http.get(f"{server.url}/ready")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
        await asyncio.sleep(0.1)
    raise AssertionError(f"{name} {victim} was not replaced:\n{server.log()}")


@pytest.mark.parametrize(
    ("name", "signals"),
    [
        ("engine", [signal.SIGKILL, signal.SIGKILL]),
        ("engine", [signal.SIGSTOP]),
        ("broker", [signal.SIGKILL]),
        ("broker", [signal.SIGSTOP]),
        ("front end", [signal.SIGKILL]),
        ("front end", [signal.SIGSTOP]),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(s.name for s in value),
)
def test_every_request_ends_and_the_server_mends_itself(
    two_front_ends: RunningServer, name: str, signals: list[signal.Signals]
) -> None:
    server = two_front_ends

    async def story() -> Load:
        async with Load(server) as load:
            for number in signals:
                old = [process.pid for process in server.children(name)]
                victim = old[0]
                os.kill(victim, number)
                await until_replaced(server, name, old, victim)
            await asyncio.sleep(0.5)
        return load

    load = asyncio.run(story())
    assert load.outcomes["200"] > load.clients, load.outcomes
    if name != "front end":
        assert not load.outcomes["connection lost"], load.outcomes
    assert server.embed("after the fault").status_code == 200


def test_requests_that_wait_go_on_when_the_engine_is_replaced(two_front_ends: RunningServer) -> None:
    server = two_front_ends
    victim = server.children("engine")[0].pid

    async def story() -> list[int]:
        async with httpx.AsyncClient(timeout=SECONDS) as http:
            os.kill(victim, signal.SIGKILL)
            body = {"model": MODEL, "input": "asked while no engine is there"}
            answers = await asyncio.gather(*(http.post(f"{server.url}/v1/embeddings", json=body) for _ in range(5)))
            return [answer.status_code for answer in answers]

    assert asyncio.run(story()) == [200] * 5


def test_clients_that_hang_up_leave_nothing_behind(two_front_ends: RunningServer) -> None:
    server = two_front_ends
    text = "a request whose client will not wait for the answer " * 12
    texts = [f"{number}: {text}" for number in range(20)]
    body = httpx.Request("POST", server.url, json={"model": MODEL, "input": texts}).read()
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST /v1/embeddings HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode()

    def hang_up(times: int) -> None:
        for _ in range(times):
            with socket.create_connection((host, int(port)), timeout=10) as client:
                client.sendall(head + body)

    def settle() -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            if queue_depth(server) == 0:
                return
            time.sleep(0.1)
        raise AssertionError("the queue does not drain")

    def memory() -> int:
        return sum(p.memory_info().rss for name in ("broker", "front end") for p in server.children(name))

    hang_up(300)
    settle()
    before, files = memory(), open_files(server)
    hang_up(1000)
    settle()
    assert memory() - before < 24 << 20
    assert open_files(server) <= files + 4
    assert server.embed("and a client that stays").status_code == 200


def queue_depth(server: RunningServer) -> float:
    for line in httpx.get(f"{server.url}/metrics", timeout=10).text.splitlines():
        if line.startswith("embedserve_queue_tokens "):
            return float(line.split()[1])
    raise AssertionError("no such metric")


def open_files(server: RunningServer) -> int:
    return sum(p.num_fds() for name in ("broker", "front end") for p in server.children(name))


# ------------------------------------------------------------------------------------------------------- the end of it


def test_sigterm_lets_requests_in_flight_finish() -> None:
    with RunningServer("--rate-limit", "0") as server:

        async def story() -> tuple[list[int], int]:
            texts = [f"text {i} that is still being embedded when the server is told to stop" for i in range(300)]
            async with httpx.AsyncClient(timeout=SECONDS) as http:
                requests = [
                    asyncio.create_task(http.post(f"{server.url}/v1/embeddings", json={"model": MODEL, "input": texts}))
                    for _ in range(4)
                ]
                await asyncio.sleep(0.3)
                server.process.send_signal(signal.SIGTERM)
                answers = await asyncio.gather(*requests)
            return [answer.status_code for answer in answers], await asyncio.to_thread(server.process.wait, SECONDS)

        statuses, exit_status = asyncio.run(story())
        assert statuses == [200] * 4
        assert exit_status == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=5)


def test_requests_that_outlast_the_shutdown_get_a_503() -> None:
    with RunningServer("--rate-limit", "0", "--shutdown-seconds", "1") as server:
        long = "a text that takes its time among so many others " * 20
        body = {"model": MODEL, "input": [f"{number}: {long}" for number in range(1000)]}

        async def story() -> httpx.Response:
            async with httpx.AsyncClient(timeout=SECONDS) as http:
                request = asyncio.create_task(http.post(f"{server.url}/v1/embeddings", json=body))
                await asyncio.sleep(1.0)
                server.process.send_signal(signal.SIGTERM)
                return await request

        answer = asyncio.run(story())
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "shutting_down"
        assert server.process.wait(SECONDS) == 0
        assert "Traceback" not in server.log()
        assert "Exception" not in server.log()


def test_ctrl_c_reaches_all_processes_and_ends_the_server_once() -> None:
    with RunningServer() as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        for process in [*family, psutil.Process(server.process.pid)]:  # what a terminal does
            process.send_signal(signal.SIGINT)
        assert server.process.wait(SECONDS) == 0
        gone, alive = psutil.wait_procs(family, timeout=5)
        assert len(gone) == 3
        assert not alive
        assert "Traceback" not in server.log()


def test_a_killed_supervisor_leaves_no_process_and_no_socket(tmp_path: Path) -> None:
    with RunningServer(environment={"TMPDIR": str(tmp_path)}) as server:
        family = psutil.Process(server.process.pid).children(recursive=True)
        assert len(family) == 3
        os.kill(family[0].pid, signal.SIGSTOP)  # one that could not act by itself
        server.process.kill()
        server.process.wait(10)
        _, alive = psutil.wait_procs(family, timeout=10)
        assert not alive
        assert not list(tmp_path.iterdir())
        assert not sockets_of(server)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health", timeout=5)


def sockets_of(server: RunningServer) -> list[str]:
    """Names of the Unix sockets that this server made."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    return [line.split()[-1] for line in lines if f"@embedserve-{server.process.pid}-" in line]


def test_a_second_signal_ends_it_at_once() -> None:
    with RunningServer("--shutdown-seconds", "60") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as client:
            # A request that never ends keeps the front end from ending by itself.
            client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(1.0)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(10) == 0


# ------------------------------------------------------------------------------------------------ what they are


def test_only_the_engine_has_torch(server: RunningServer) -> None:
    def has_torch(process: psutil.Process) -> bool:
        return any("/torch/" in mapped.path for mapped in process.memory_maps())

    assert has_torch(server.children("engine")[0])
    assert not has_torch(server.children("broker")[0])
    assert not has_torch(server.children("front end")[0])
    assert not has_torch(psutil.Process(server.process.pid))


def test_the_engine_s_threads_have_a_core_each(server: RunningServer) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("there is one core")
    engine = server.children("engine")[0]
    places = [os.sched_getaffinity(thread.id) for thread in engine.threads()]
    assert {core for place in places if len(place) == 1 for core in place} == cores
    assert os.sched_getaffinity(engine.pid) == cores, "the thread that speaks with the broker goes where there is room"


def test_several_engines_share_one_queue() -> None:
    with RunningServer("--device", "cpu,cpu", "--threads", "1", "--rate-limit", "0") as server:
        engines = server.children("engine")
        assert len(engines) == 2
        if len(cores := os.sched_getaffinity(0)) > 1:
            shares = [os.sched_getaffinity(engine.pid) for engine in engines]
            assert shares[0] | shares[1] == cores
            assert not shares[0] & shares[1]
        before = [process.cpu_times().user for process in server.children("engine")]
        answer = server.embed([f"text number {i} for whichever engine is free" for i in range(800)])
        assert answer.status_code == 200
        after = [process.cpu_times().user for process in server.children("engine")]
        assert all(b > a for a, b in zip(before, after, strict=True)), "both have worked"


STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(65534); os.setuid(65534)
with socket.socket(socket.AF_UNIX) as stranger:
    stranger.settimeout(10)
    stranger.connect(sys.argv[1].replace("@", chr(0), 1))
    try:
        stranger.sendall(bytes.fromhex(sys.argv[2]))
        print("refused" if stranger.recv(1) == b"" else "answered")
    except ConnectionError:
        print("refused")
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_broker_takes_no_connection_of_another_user(server: RunningServer) -> None:
    """Its socket has no file whose permissions would guard it, so the broker asks the kernel who connects."""
    frames = b"".join(
        bytes(part)
        for message in (wire.Hello("front_end", 1), wire.StatusRequest(1))
        for part in wire.pack_frame(message)
    )

    def answer(*command: str) -> str:
        done = subprocess.run(
            [*command, sockets_of(server)[0], frames.hex()], capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout.strip()

    assert answer(sys.executable, "-c", STRANGER) == "refused"
    friend = "\n".join(line for line in STRANGER.splitlines() if "setuid" not in line)
    assert answer(sys.executable, "-c", friend) == "answered"


def test_sigterm_before_the_start_is_over_ends_the_server() -> None:
    for pause in (0.0, 0.005, 0.02, 0.3):
        with RunningServer(wait=False) as server:
            time.sleep(pause)
            assert server.stop(15) == 0
            assert "Traceback" not in server.log()


def test_the_back_off_grows_to_a_bound() -> None:
    assert [supervisor._back_off(failures) for failures in (1, 2, 3, 4, 5, 6, 7, 8)] == [0, 1, 2, 4, 8, 16, 30, 30]
    assert supervisor._back_off(100_000) == supervisor.MAX_BACK_OFF
