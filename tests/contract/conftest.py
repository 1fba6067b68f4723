from collections.abc import Iterator

import httpx
import pytest

from tests.contract.helpers import BODY_LIMIT, KEY
from tests.support import RunningServer


@pytest.fixture(scope="session")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    """A client of the shared server."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def small() -> Iterator[httpx.Client]:
    """A client, with its key, of a server with small limits and one on requests that no test reaches."""
    limits = ("--max-request-tokens", "20", "--max-body-bytes", str(BODY_LIMIT), "--rate-limit", "1000")
    with (
        RunningServer("--api-key", f"tests={KEY}", *limits) as server,
        httpx.Client(base_url=server.url, timeout=30, headers={"authorization": f"Bearer {KEY}"}) as client,
    ):
        yield client


@pytest.fixture(scope="session")
def keyless(small: httpx.Client) -> Iterator[httpx.Client]:
    """A client of the same server, without a key."""
    with httpx.Client(base_url=small.base_url, timeout=30) as client:
        yield client
