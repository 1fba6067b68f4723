"""Keys and rate limits."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from tests.contract.helpers import MODEL, Answer, Connection, envelope, http_request, one_from_each
from tests.support import RunningServer

BODY = {"model": MODEL, "input": "a"}
ALICE, BOB, CAROL, INTERNAL = (f"sk-{name}-0123456789abcdef" for name in ("alice", "bob", "carol", "internal"))
MARKER = "marker-of-a-secret-text-6417"


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Two front ends that take five requests a second together, believe a proxy on this host, and list their models
    only to those with a key; keys from the environment and from a file."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# who may call\n\ncarol={CAROL}\ninternal robot={INTERNAL}\n")
    with RunningServer(
        *("--rate-limit", "5", "--front-ends", "2", "--trusted-proxy", "127.0.0.0/8", "--closed-discovery", "true"),
        *("--api-keys-file", str(file), "--log-level", "debug"),
        environment={"EMBEDSERVE_API_KEY": f"alice={ALICE},bob={BOB}"},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(limited: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=limited.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def direct() -> Iterator[httpx.Client]:
    """A client of a server that trusts no proxy and takes three requests a second."""
    keys = ("--api-key", f"alice={ALICE}", "--api-key", f"bob={BOB}", "--internal-key", f"robot={INTERNAL}")
    with RunningServer("--rate-limit", "3", *keys) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def from_address(address: str, key: str = ALICE) -> dict[str, str]:
    return {"x-forwarded-for": address, "authorization": f"Bearer {key}"}


# Keys


@pytest.mark.parametrize("key", [ALICE, BOB, CAROL, INTERNAL])
@pytest.mark.parametrize("scheme", ["Bearer {}", "bearer {}", "BEARER   {}", None])
def test_each_key_opens_as_bearer_and_as_x_api_key(client: httpx.Client, key: str, scheme: str | None) -> None:
    headers = {"authorization": scheme.format(key)} if scheme else {"x-api-key": key}
    address = f"10.1.{len(scheme or '')}.{len(key)}"
    answer = client.post("/v1/embeddings", json=BODY, headers={**headers, "x-forwarded-for": address})
    assert answer.status_code == 200


def test_keys_given_as_options_open_too(direct: httpx.Client) -> None:
    time.sleep(1)  # whatever another test did is forgotten
    for key in (ALICE, BOB):
        assert direct.post("/v1/embeddings", json=BODY, headers={"x-api-key": key}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, None),
        ({"authorization": f"Basic {ALICE}"}, None),
        ({"authorization": ALICE}, None),
        ({"authorization": f"Bearer {ALICE}x"}, "invalid_api_key"),
        ({"authorization": f"Bearer {ALICE[:-1]}"}, "invalid_api_key"),
        ({"authorization": f"Bearer {ALICE.upper()}"}, "invalid_api_key"),
        ({"authorization": f"Bearer {ALICE},{BOB}"}, "invalid_api_key"),
        ({"authorization": f"Bearer alice={ALICE}"}, "invalid_api_key"),
        ({"x-api-key": "alice"}, "invalid_api_key"),
        ({"x-api-key": f"{ALICE} {BOB}"}, "invalid_api_key"),
        # A right key beside a wrong one: the first place counts.
        ({"authorization": "Bearer wrong", "x-api-key": ALICE}, "invalid_api_key"),
    ],
    ids=str,
)
def test_nothing_else_opens(client: httpx.Client, headers: dict[str, str], code: str | None) -> None:
    address = f"10.2.{len(str(headers)) % 250}.{len(headers)}"
    answer = client.post("/v1/embeddings", json=BODY, headers={**headers, "x-forwarded-for": address})
    assert envelope(answer, 401)["code"] == code
    assert "vector" not in answer.text


def test_a_key_is_asked_for_before_anything_else_is_told(client: httpx.Client) -> None:
    headers = {"x-forwarded-for": "10.3.0.1"}
    for content in (b"", b"nonsense", json.dumps({"model": "x", "input": "a"}).encode()):
        envelope(client.post("/v1/embeddings", content=content, headers=headers), 401)


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/v1/embedding-models", "/api/v1/models"])
def test_closed_discovery_asks_for_a_key(client: httpx.Client, path: str) -> None:
    envelope(client.get(path), 401)
    envelope(client.get(path, headers={"x-api-key": "wrong"}), 401)
    assert client.get(path, headers={"x-api-key": BOB}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", f"/v1/models/{MODEL}", "/v1/embedding-models"])
def test_open_discovery_does_not(direct: httpx.Client, path: str) -> None:
    assert direct.get(path).status_code == 200


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/openapi.json"])
def test_who_watches_the_server_needs_no_key(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 200


# Limits


def burst(connections: Sequence[Connection], headers: dict[str, str]) -> tuple[list[Answer], float]:
    """The answers to a request over each of the connections at once, and the seconds from the first byte sent to the
    last received: the server counted all of them in between."""
    request = http_request(json.dumps(BODY).encode(), headers=headers)
    started = time.monotonic()
    for connection in connections:
        connection.send(request)
    answers = [connection.answer() for connection in connections]
    return answers, time.monotonic() - started


def test_forty_requests_at_once_on_two_front_ends_are_five(limited: RunningServer) -> None:
    by_front_end = one_from_each(limited, 20)
    assert len(by_front_end) == 2
    connections = [connection for pair in zip(*by_front_end, strict=True) for connection in pair]
    try:
        for attempt in range(10):
            answers, seconds = burst(connections, from_address(f"10.4.0.{attempt}"))
            if seconds < 1.0:
                break
        else:
            pytest.fail("no burst was over within a second, so none of them shows anything")
    finally:
        for connection in connections:
            connection.close()
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [429] * 35
    left = sorted(int(a.headers["x-ratelimit-remaining-requests"]) for a in answers if a.status_code == 200)
    assert left == [0, 1, 2, 3, 4]
    for answer in answers:
        if answer.status_code == 429:
            assert envelope(answer, 429)["code"] == "rate_limit_exceeded"
            assert 0 < int(answer.headers["retry-after-ms"]) <= 1000


def test_over_two_seconds_no_second_has_more_than_five(limited: RunningServer) -> None:
    request = http_request(json.dumps(BODY).encode(), headers=from_address("10.5.0.1"))
    taken: list[tuple[float, float]] = []
    [[one], [other]] = one_from_each(limited)
    with one, other:
        until = time.monotonic() + 2.2
        while time.monotonic() < until:
            for connection in (one, other):
                sent = time.monotonic()
                connection.send(request)
                if connection.answer().status_code == 200:
                    taken.append((sent, time.monotonic()))
    # Six that were counted within a second would have been sent and answered around it.
    assert all(last[1] - first[0] >= 1 for first, last in zip(taken, taken[5:], strict=False))
    # The limit is no less than it says either.
    assert len(taken) >= 10


def test_each_address_has_a_limit_of_its_own(client: httpx.Client) -> None:
    for n in range(30):
        assert client.post("/v1/embeddings", json=BODY, headers=from_address(f"10.6.0.{n}")).status_code == 200


def test_an_internal_key_is_never_limited(client: httpx.Client) -> None:
    for _ in range(30):
        answer = client.post("/v1/embeddings", json=BODY, headers=from_address("10.7.0.1", INTERNAL))
        assert answer.status_code == 200
        assert "x-ratelimit-limit-requests" not in answer.headers


def test_guessing_keys_is_limited(client: httpx.Client) -> None:
    statuses = {
        client.post("/v1/embeddings", json=BODY, headers=from_address("10.8.0.1", f"guess-{n}")).status_code
        for n in range(60)
    }
    assert statuses == {401, 429}


def test_what_stands_before_the_last_proxy_s_word_anyone_may_have_written(client: httpx.Client) -> None:
    statuses = [
        client.post("/v1/embeddings", json=BODY, headers=from_address(f"1.2.3.{n}, 10.9.0.1, 127.0.0.3")).status_code
        for n in range(60)
    ]
    assert 429 in statuses


def test_a_forwarded_address_counts_for_nothing_without_a_trusted_proxy(direct: httpx.Client) -> None:
    answers = [direct.post("/v1/embeddings", json=BODY, headers=from_address(f"10.10.0.{n}")) for n in range(60)]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert envelope(refused[0], 429)["message"].startswith("Rate limit reached for requests from 127.0.0.1: limit 3 ")


def test_the_rate_limit_tells_when_to_come_back(direct: httpx.Client) -> None:
    headers = {"x-api-key": ALICE}

    def first_refused() -> httpx.Response:
        answers = (direct.post("/v1/embeddings", json=BODY, headers=headers) for _ in range(60))
        return next(answer for answer in answers if answer.status_code == 429)

    refused = first_refused()
    error = envelope(refused, 429)
    assert error["message"].startswith("Rate limit reached for ")
    assert (error["type"], error["param"], error["code"]) == ("requests", None, "rate_limit_exceeded")
    milliseconds = int(refused.headers["retry-after-ms"])
    assert 0 < milliseconds <= 1000
    assert refused.headers["retry-after"] == "1"
    time.sleep(milliseconds / 1000)
    assert direct.post("/v1/embeddings", json=BODY, headers=headers).status_code == 200


# What is written down


def test_neither_keys_nor_texts_are_logged(limited: RunningServer, client: httpx.Client) -> None:
    wrong = "sk-wrong-fedcba9876543210"
    texts = [
        ({"input": MARKER}, ALICE, 200),
        ({"input": [MARKER, ""]}, ALICE, 400),
        ({"input": MARKER + " word" * 300}, BOB, 400),
        ({"input": "a", "encoding_format": MARKER}, BOB, 400),
        ({"input": "a", "prompt": MARKER}, CAROL, 200),
        ({"model": MARKER, "input": "a"}, CAROL, 404),
        ({"input": MARKER}, wrong, 401),
    ]
    for number, (fields, key, status) in enumerate(texts):
        headers = {**from_address(f"10.11.0.{number}", key), "x-request-id": f"logged-{number}"}
        answer = client.post("/v1/embeddings", json={"model": MODEL, **fields}, headers=headers)
        assert answer.status_code == status
    body = f'{{"model": "{MODEL}", "input": "{MARKER}"'.encode()
    assert client.post("/v1/embeddings", content=body, headers=from_address("10.11.0.99")).status_code == 400
    client.post(f"/v1/{MARKER}", content=body)
    assert client.get(f"/v1/models/{MARKER}", headers={"x-api-key": ALICE}).status_code == 404
    log = limited.log()
    assert all(f"logged-{number}" in log for number in range(len(texts)))
    assert MARKER not in log
    assert not [key for key in (ALICE, BOB, CAROL, INTERNAL, wrong) if key in log or key[-8:] in log]
    assert MARKER not in client.get("/metrics").text


def test_a_key_is_not_shown_when_it_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"alice {ALICE}\n")
    command = [sys.executable, "-m", "embedserve.server.cli", "serve", "--port", "0"]
    for option in (["--api-keys-file", str(file)], ["--api-key", ALICE], ["--internal-key", f"={ALICE}"]):
        ended = subprocess.run([*command, *option], capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 2
        assert option[0] in ended.stderr or "line 1" in ended.stderr
        assert ALICE not in ended.stdout + ended.stderr
