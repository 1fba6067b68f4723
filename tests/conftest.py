from collections.abc import Iterator

import pytest

from tests.support import RunningServer


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """A server with nothing limited and nothing closed, for all tests that leave it as it is."""
    with RunningServer("--rate-limit", "0") as running:
        yield running
