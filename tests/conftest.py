from collections.abc import Iterator

import pytest

from embedserve.server import threads
from tests.support import RunningServer

threads.set_patience()  # before a test imports torch: the cores are shared with the servers that the tests start


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server with nothing limited and nothing closed, for all tests that leave it as it is."""
    with RunningServer("--rate-limit", "0") as running:
        yield running
