"""Headers of answers."""

import re

import httpx
import pytest

from tests.contract.helpers import MODEL, Connection, http_request
from tests.support import RunningServer

BODY = {"model": MODEL, "input": "a"}
OPENAI = {"openai-processing-ms", "openai-version", "openai-model"}
LIMITS = {"x-ratelimit-limit-requests", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"}
OWN_ID = re.compile(r"req_[0-9a-f]{32}")


def test_every_answer_has_an_id_of_its_own(http: httpx.Client) -> None:
    ids = [http.post("/v1/embeddings", json=BODY).headers["x-request-id"] for _ in range(20)]
    assert all(OWN_ID.fullmatch(one) for one in ids)
    assert len(set(ids)) == 20


@pytest.mark.parametrize("own", ["a", "req_1234", "6b1c7a3e-0f4a-4a0e-9f43-2f1f2a1f7c11", "x" * 128, "a/b:c=d;e,f"])
def test_a_caller_s_id_is_kept(http: httpx.Client, own: str) -> None:
    assert http.post("/v1/embeddings", json=BODY, headers={"x-request-id": own}).headers["x-request-id"] == own


@pytest.mark.parametrize("own", ["", "a b", "x" * 129, "a\tb", "\xe9", "a\xa0b", "\x80" * 10], ids=ascii)
def test_a_hostile_id_is_not_reflected(server: RunningServer, own: str) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(method="GET", path="/health", headers={"x-request-id": own}))
        assert OWN_ID.fullmatch(connection.answer().headers["x-request-id"])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/health", 200), ("GET", "/v1/models", 200), ("GET", "/metrics", 200), ("GET", "/openapi.json", 200),
        ("GET", "/ready", 200), ("GET", "/nowhere", 404), ("GET", "/v1/models/x", 404), ("PUT", "/v1/embeddings", 405),
        ("POST", "/v1/embeddings", 400),
    ],
)  # fmt: skip
def test_every_answer_has_an_id_whatever_it_says(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert answer.status_code == status
    assert OWN_ID.fullmatch(answer.headers["x-request-id"])
    assert http.request(method, path, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


@pytest.mark.parametrize("headers", [{}, {"x-api-key": "wrong"}, {"content-encoding": "br"}], ids=str)
def test_a_refused_request_has_an_id(keyless: httpx.Client, headers: dict[str, str]) -> None:
    answer = keyless.post("/v1/embeddings", json=BODY, headers=headers)
    assert answer.status_code == 401
    assert OWN_ID.fullmatch(answer.headers["x-request-id"])


def test_success_has_openai_s_headers(http: httpx.Client) -> None:
    headers = http.post("/v1/embeddings", json={**BODY, "model": "ALL-MINILM-L6-V2"}).headers
    assert headers["openai-version"] == "2020-10-01"
    assert headers["openai-model"] == MODEL
    assert 0 <= int(headers["openai-processing-ms"]) < 60_000


def test_errors_and_lists_have_none_of_openai_s_headers(http: httpx.Client) -> None:
    assert not OPENAI & set(http.post("/v1/embeddings", json={**BODY, "dimensions": 7}).headers)
    assert not OPENAI & set(http.get("/v1/models").headers)


def test_with_a_limit_every_answer_tells_what_is_left_of_it(small: httpx.Client) -> None:
    before = small.post("/v1/embeddings", json=BODY)
    after = small.post("/v1/embeddings", json={**BODY, "input": []})
    assert [before.status_code, after.status_code] == [200, 400]
    for answer in (before, after):
        assert answer.headers["x-ratelimit-limit-requests"] == "1000"
        assert 0 <= int(answer.headers["x-ratelimit-remaining-requests"]) < 1000
        assert re.fullmatch(r"\d+ms|\d+s", answer.headers["x-ratelimit-reset-requests"])


def test_without_a_limit_no_header_speaks_of_one(http: httpx.Client) -> None:
    assert not LIMITS & set(http.post("/v1/embeddings", json=BODY).headers)


def test_lists_and_health_are_not_counted(small: httpx.Client) -> None:
    for path in ("/v1/models", "/v1/embedding-models", "/health", "/ready", "/metrics"):
        assert not LIMITS & set(small.get(path).headers)


def test_one_connection_serves_many_requests_and_errors(server: RunningServer) -> None:
    good = b'{"model": "%b", "input": "a"}' % MODEL.encode()
    with Connection(server.url) as connection:
        for body, status in ((good, 200), (b"{}", 400), (good, 200), (b"nonsense", 400), (good, 200)):
            connection.send(http_request(body))
            assert connection.answer().status_code == status
        connection.send(http_request(good, path="/nowhere"))
        assert connection.answer().status_code == 404
        connection.send(http_request(good))
        assert connection.answer().status_code == 200


def test_a_client_that_wants_to_close_is_closed(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(method="GET", path="/health", headers={"connection": "close"}))
        assert connection.answer("GET").status_code == 200
        assert connection.ends()


def test_head_answers_without_a_body(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(method="HEAD", path="/v1/models"))
        assert connection.answer("HEAD").status_code == 200
        # Had a body come, it would be read as the head of this one.
        connection.send(http_request(method="GET", path="/health"))
        assert connection.answer("GET").status_code == 200


def test_no_header_tells_what_the_server_is_made_of(http: httpx.Client) -> None:
    assert "server" not in http.get("/health").headers
