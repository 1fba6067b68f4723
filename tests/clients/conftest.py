"""A running server for real clients: the one at EMBEDSERVE_TEST_URL, or one started with EMBEDSERVE_BIN."""

import importlib.util
import os
import re
import shlex
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

STARTING_TIMEOUT = 100.0


@dataclass(frozen=True)
class Server:
    """Where it is, and a key that it takes."""

    address: str
    key: str

    @property
    def base_url(self) -> str:
        return f"{self.address}/v1"


def vocabulary_folder() -> Path | None:
    """The folder inside llama-index-core that serves tiktoken as a cache."""
    spec = importlib.util.find_spec("llama_index")
    for location in (spec and spec.submodule_search_locations) or []:
        folder = Path(location, "core", "_static", "tiktoken_cache")
        if folder.is_dir():
            return folder
    return None


@pytest.fixture(scope="session", autouse=True)
def vocabulary() -> Path:
    """tiktoken reads its vocabulary from this folder, in the client and in the server, and downloads nothing."""
    folder = vocabulary_folder()
    if folder is None:
        pytest.skip("llama-index-core is not installed: pip install --no-deps -r tests/clients/vocabulary.txt")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def server(vocabulary: Path) -> Iterator[Server]:
    if address := os.environ.get("EMBEDSERVE_TEST_URL"):
        yield Server(address.rstrip("/"), os.environ.get("EMBEDSERVE_TEST_KEY", "none"))
        return
    command = os.environ.get("EMBEDSERVE_BIN")
    if command is None:
        pytest.skip("neither EMBEDSERVE_TEST_URL (a running server) nor EMBEDSERVE_BIN (to start one) is set")
    key = "sk-client-tests-0123456789"
    process = subprocess.Popen(
        [*shlex.split(command), "serve", "--port", "0", "--api-key", f"tests={key}", "--rate-limit", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output: list[str] = []
    # Someone must read on: a server whose output is not read comes to a halt.
    reader = threading.Thread(target=lambda: output.extend(process.stdout or []), daemon=True)
    reader.start()
    try:
        yield Server(wait_until_ready(process, output), key)
    finally:
        process.terminate()
        process.wait(timeout=30)
        reader.join(timeout=10)
        if process.stdout:
            process.stdout.close()


def wait_until_ready(process: "subprocess.Popen[str]", output: list[str]) -> str:
    deadline = time.monotonic() + STARTING_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if printed := re.search(r"http://127\.0\.0\.1:\d+", "".join(output)):
            try:
                with urllib.request.urlopen(f"{printed[0]}/ready", timeout=5):
                    return printed[0]
            except (urllib.error.URLError, ConnectionError):  # not listening yet, or a 503: no model yet
                pass
        time.sleep(0.1)
    raise AssertionError(f"the server did not get ready (exit status {process.poll()}):\n{''.join(output)}")
