"""A real server for tests: its processes, its port, its logs."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx
import psutil

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class RunningServer:
    """`embedserve serve` on a free port, as a user would start it. Use it with `with`.

    On the CPU, unless the options name a device: what the tests compare with is float32.
    """

    def __init__(self, *options: str, environment: Mapping[str, str] | None = None, wait: bool = True) -> None:
        self._log = tempfile.NamedTemporaryFile(prefix="embedserve-test-", suffix=".log")  # noqa: SIM115 - closed in __exit__
        self._wait = wait
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDSERVE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", "0", "--device", "cpu", *options],
            stdout=subprocess.PIPE,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
            env={**clean, **(environment or {})},
            text=True,
        )
        self.url = ""

    def __enter__(self) -> Self:
        assert self.process.stdout is not None
        try:
            line = self.process.stdout.readline()
            found = re.search(r"listening on (http://\S+)", line)
            assert found, f"{line!r}\n{self.log()}"
            self.url = found[1]
            if self._wait:
                self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self._log.close()

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Wait until /ready answers 200."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process.poll() is None, self.log()
            try:
                if httpx.get(f"{self.url}/ready", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {seconds} s:\n{self.log()}")

    def log(self) -> str:
        """What it wrote to standard error so far."""
        return Path(self._log.name).read_text()

    def children(self, name: str) -> list[psutil.Process]:
        """Its processes of this kind: ``broker``, ``engine`` or ``front end``."""
        found = []
        for child in psutil.Process(self.process.pid).children():
            # Not psutil's name(), which would guess it from the command line.
            try:
                comm = Path(f"/proc/{child.pid}/comm").read_text().strip()
            except OSError:
                continue
            if comm == f"es {name}" and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        return found

    def stop(self, seconds: float = 30.0) -> int:
        """End it as an operator would. The exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def embed(self, texts: object, **fields: object) -> httpx.Response:
        """POST /v1/embeddings."""
        body = {"model": MODEL, "input": texts, **fields}
        return httpx.post(f"{self.url}/v1/embeddings", json=body, timeout=60)
