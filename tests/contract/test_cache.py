"""A server with `--cache-mib`: the second time costs no batch, and nothing else changes."""

import os
import re
import signal
from collections.abc import Iterator

import httpx
import pytest

from tests.contract.helpers import MODEL, eventually
from tests.support import RunningServer


@pytest.fixture(scope="module")
def caching() -> Iterator[RunningServer]:
    with RunningServer("--cache-mib", "8") as server:
        yield server


def ask(server: RunningServer, *texts: str, **options: object) -> httpx.Response:
    body = {"model": MODEL, "input": list(texts), "encoding_format": "base64", **options}
    answer = httpx.post(f"{server.url}/v1/embeddings", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer


def metric(server: RunningServer, name: str) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    found = re.search(rf"^embedserve_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_a_second_request_makes_no_batch_and_the_same_bytes(caching: RunningServer) -> None:
    texts = ["the first text of the cache", "and the second", "the first text of the cache"]
    first = ask(caching, *texts)
    batches, hits = metric(caching, "batch_texts_count"), metric(caching, "cache_hits_total")
    second = ask(caching, *texts)
    assert second.content == first.content, "vectors and usage"
    assert int(second.headers["x-ratelimit-remaining-requests"]) < int(second.headers["x-ratelimit-limit-requests"])
    assert metric(caching, "batch_texts_count") == batches
    assert metric(caching, "cache_hits_total") == hits + 2, "equal texts of a request are looked for once"
    assert metric(caching, "repeated_texts_total") >= 2


def test_texts_are_counted_whether_they_ran_or_not(caching: RunningServer) -> None:
    before = metric(caching, "texts_total")
    for _ in range(3):
        ask(caching, "counted each time", "counted each time")
    eventually(lambda: metric(caching, "texts_total") == before + 6)


def test_a_broker_that_is_replaced_begins_with_an_empty_cache(caching: RunningServer) -> None:
    first = ask(caching, "kept by a broker that will be gone")
    os.kill(caching.children("broker")[0].pid, signal.SIGKILL)
    second = ask(caching, "kept by a broker that will be gone")
    assert second.json()["usage"] == first.json()["usage"]
    assert metric(caching, "cache_hits_total") == 0
    assert metric(caching, "cache_misses_total") == 1


def test_without_the_option_nothing_is_kept(server: RunningServer) -> None:
    ask(server, "not kept")
    batches = metric(server, "batch_texts_count")
    ask(server, "not kept")
    assert metric(server, "batch_texts_count") == batches + 1
    assert "embedserve_cache" not in httpx.get(f"{server.url}/metrics", timeout=60).text
