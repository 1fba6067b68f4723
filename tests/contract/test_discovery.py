"""What the server tells of itself: models, health, metrics, log lines."""

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.helpers import MODEL, Connection, envelope, eventually, http_request, one_from_each
from tests.support import RunningServer

KEY = "sk-discovery-0123456789"
MARKER = "marker-of-a-secret-text-9035"
MODEL_FIELDS = {"id", "object", "created", "owned_by"}

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


# Models


@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_models_are_openai_s_list(http: httpx.Client, prefix: str) -> None:
    body = http.get(f"{prefix}/models").json()
    assert set(body) == {"object", "data"}
    assert body["object"] == "list"
    [model] = body["data"]
    assert set(model) == MODEL_FIELDS
    assert model["id"] == MODEL
    assert model["object"] == "model"
    assert model["owned_by"] == "sentence-transformers"
    assert 1_500_000_000 < model["created"] < 2_000_000_000


@pytest.mark.parametrize(
    "name",
    [MODEL, MODEL.replace("/", "%2F"), MODEL.replace("/", "%2f"), "all-MiniLM-L6-v2", "ALL-MINILM-L6-V2"],
)
@pytest.mark.parametrize("prefix", ["/v1", "/api/v1"])
def test_one_model_with_its_slash_raw_or_quoted(server: RunningServer, prefix: str, name: str) -> None:
    # Byte by byte: an HTTP client may quote or unquote the path as it likes.
    with Connection(server.url) as connection:
        connection.send(http_request(method="GET", path=f"{prefix}/models/{name}"))
        answer = connection.answer()
    assert answer.status_code == 200
    assert set(json.loads(answer.content)) == MODEL_FIELDS
    assert json.loads(answer.content)["id"] == MODEL


@pytest.mark.parametrize("name", ["x", "sentence-transformers", f"{MODEL}/more", "all-MiniLM-L6-v2/", "gpt-4"])
def test_a_model_that_is_not_served(http: httpx.Client, name: str) -> None:
    assert envelope(http.get(f"/v1/models/{name}"), 404) == {
        "message": f"The model `{name}` does not exist or you do not have access to it.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_embedding_models_tell_the_rest(http: httpx.Client) -> None:
    body = http.get("/v1/embedding-models").json()
    assert set(body) == {"object", "data"}
    [model] = body["data"]
    assert model["description"]
    assert model["backend"]
    del model["description"], model["backend"], model["created"]
    assert model == {
        "id": MODEL,
        "object": "model",
        "owned_by": "sentence-transformers",
        "name": "all-MiniLM-L6-v2",
        "dimensions": 384,
        "max_dimensions": 384,
        "supports_dimensions": False,
        "matryoshka": None,
        "max_tokens": 256,
        "pricing": {"per_million_tokens": 0.0, "currency": "USD"},
        "modalities": ["text"],
        "outputs": ["dense"],
        "languages": ["en"],
        "prompts": {},
        "instruction": None,
        "licence": "Apache-2.0",
        "unverified": None,
        "backends": ["native", "onnx", "transformers"],
        "dtype": "float32",
        "device": "cpu",
        "loaded": True,
        "alias_of": None,
    }


@pytest.mark.parametrize(("path", "status"), [("/health", "ok"), ("/ready", "ready")])
def test_health_and_readiness(http: httpx.Client, path: str, status: str) -> None:
    answer = http.get(path)
    assert answer.status_code == 200
    assert answer.json() == {"status": status}


def test_a_server_is_alive_before_it_is_ready() -> None:
    with (
        RunningServer("--rate-limit", "0", wait=False) as server,
        httpx.Client(base_url=server.url, timeout=30) as http,
    ):
        # The front end is there in a tenth of a second; the engine has torch and the weights to read.
        assert http.get("/health").status_code == 200
        answer = http.get("/ready")
        assert envelope(answer, 503)["code"] == "model_loading"
        assert int(answer.headers["retry-after"]) >= 1
        [model] = http.get("/v1/embedding-models").json()["data"]
        assert model["loaded"] is False
        assert model["device"] is None
        assert http.get("/v1/models").json()["data"][0]["id"] == MODEL


# Metrics: a server of their own, so that the counts are exact


@pytest.fixture(scope="module")
def counted() -> Iterator[RunningServer]:
    with RunningServer("--rate-limit", "0", "--front-ends", "2", "--api-key", f"team-a={KEY}") as running:
        yield running


REQUESTS: list[tuple[dict[str, Any], str, int]] = [
    ({"model": MODEL, "input": "What is Deep Learning?"}, KEY, 200),  # 7 tokens
    ({"model": "all-minilm-l6-v2", "input": [MARKER, "a"]}, KEY, 200),
    ({"model": MODEL, "input": ["a", "a", "a", "a"], "user": "alice"}, KEY, 200),  # 12 tokens
    ({"model": MODEL, "input": "tree " * 300}, KEY, 400),
    ({"model": MODEL, "input": []}, KEY, 400),
    ({"model": "nobody/knows-it", "input": MARKER}, KEY, 404),
    ({"model": MODEL, "input": "a"}, "wrong", 401),
]


@pytest.fixture(scope="module")
def asked(counted: RunningServer) -> list[Any]:
    """The requests above, sent over both front ends in turn: the bodies of their answers."""
    [[one], [other]] = one_from_each(counted)
    bodies = []
    with one, other:
        for number, (fields, key, status) in enumerate(REQUESTS):
            connection = (one, other)[number % 2]
            headers = {"authorization": f"Bearer {key}", "x-request-id": f"asked-{number}"}
            connection.send(http_request(json.dumps(fields).encode(), headers=headers))
            answer = connection.answer()
            assert answer.status_code == status
            bodies.append(json.loads(answer.content))
    return bodies


def scrape(connection: Connection) -> str:
    connection.send(http_request(method="GET", path="/metrics"))
    answer = connection.answer()
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    return answer.text


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((f"embedserve_{name}", frozenset(labels.items())), 0.0)


@pytest.fixture(scope="module")
def both(counted: RunningServer, asked: list[Any]) -> list[str]:
    """The metrics as each front end tells them, once everything that was asked has been counted."""
    [[one], [other]] = one_from_each(counted)

    def counted_all() -> list[str] | None:
        texts = [scrape(one), scrape(other)]
        requests = [v for (name, _), v in samples(texts[0]).items() if name == "embedserve_requests_total"]
        return texts if sum(requests) >= len(REQUESTS) else None

    with one, other:
        return eventually(counted_all)


def test_every_front_end_tells_the_same_totals(both: list[str]) -> None:
    assert both[0] == both[1]


def test_requests_are_counted_by_model_and_status(both: list[str]) -> None:
    found = {labels: v for (name, labels), v in samples(both[0]).items() if name == "embedserve_requests_total"}
    counts = {(dict(labels)["model"], dict(labels)["status"]): v for labels, v in found.items()}
    # A name that nobody knows, and a body that could not be used, count under no model: names would be endless.
    assert counts == {(MODEL, "200"): 3, (MODEL, "400"): 1, ("", "400"): 1, ("", "404"): 1, ("", "401"): 1}


def test_errors_are_counted_by_code(both: list[str]) -> None:
    found = samples(both[0])
    assert value(found, "errors_total", model="", code="model_not_found") == 1
    assert value(found, "errors_total", model="", code="invalid_api_key") == 1
    assert value(found, "errors_total", model="", code="invalid_request_error") == 1
    assert value(found, "errors_total", model=MODEL, code="invalid_request_error") == 1


def test_texts_and_tokens_are_counted(both: list[str], asked: list[Any]) -> None:
    found = samples(both[0])
    assert value(found, "texts_total", model=MODEL) == 7
    assert asked[0]["usage"]["prompt_tokens"] == 7
    assert asked[2]["usage"]["prompt_tokens"] == 12
    assert value(found, "tokens_total", model=MODEL) == sum(body["usage"]["prompt_tokens"] for body in asked[:3])


def test_durations_are_told_by_stage(both: list[str]) -> None:
    found = samples(both[0])
    total = value(found, "request_seconds_sum", model=MODEL)
    assert value(found, "request_seconds_count", model=MODEL) == 3
    stages = ("tokenize", "queue", "run", "encode")
    for stage in stages:
        assert value(found, "stage_seconds_count", model=MODEL, stage=stage) == 3
    assert 0 < value(found, "stage_seconds_sum", model=MODEL, stage="run") < total
    assert sum(value(found, "stage_seconds_sum", model=MODEL, stage=stage) for stage in stages) <= total


def test_batches_and_the_queue_are_told(both: list[str]) -> None:
    found = samples(both[0])
    # The requests came one after the other, so each is a batch, and nothing waits any more.
    assert value(found, "batch_texts_count", model=MODEL) == 3
    # Of four equal texts of three tokens one is computed; all are counted as embedded.
    assert value(found, "texts_total", model=MODEL) == 7
    assert value(found, "repeated_texts_total", model=MODEL) == 3
    assert value(found, "batch_texts_sum", model=MODEL) == 4
    batch_tokens = value(found, "batch_tokens_sum", model=MODEL)
    assert batch_tokens == value(found, "tokens_total", model=MODEL) - 9
    assert value(found, "computed_tokens_total", model=MODEL) >= batch_tokens
    for name in ("queue_texts", "queue_tokens"):
        assert found[(f"embedserve_{name}", frozenset())] == 0
    assert value(found, "engines") == 1


def test_metrics_hold_no_text_no_key_and_no_unknown_name(both: list[str]) -> None:
    for secret in (MARKER, KEY, "nobody/knows-it", "alice"):
        assert secret not in both[0]


# Log lines


@pytest.fixture(scope="module")
def lines(counted: RunningServer, asked: list[Any]) -> dict[str, dict[str, Any]]:
    """The log lines of the requests above, by request id."""

    def all_of_them() -> dict[str, dict[str, Any]] | None:
        found = [json.loads(line) for line in counted.log().splitlines() if '"embedserve.request"' in line]
        ids = [line["id"] for line in found]
        assert len(set(ids)) == len(ids), "one line a request"
        return dict(zip(ids, found, strict=True)) if len(ids) >= len(REQUESTS) else None

    return eventually(all_of_them)


def test_each_request_has_one_line(lines: dict[str, dict[str, Any]]) -> None:
    assert set(lines) == {f"asked-{number}" for number in range(len(REQUESTS))}
    assert [lines[f"asked-{n}"]["status"] for n in range(len(REQUESTS))] == [status for _, _, status in REQUESTS]


def test_every_line_of_the_log_is_json(counted: RunningServer, lines: dict[str, dict[str, Any]]) -> None:
    for line in counted.log().splitlines():
        assert {"time", "level", "logger", "message"} <= set(json.loads(line))


def test_a_line_tells_what_was_done(lines: dict[str, dict[str, Any]], asked: list[Any]) -> None:
    line = lines["asked-1"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
    assert line["level"] == "info"
    assert line["key"] == "team-a"
    assert line["model"] == MODEL
    assert line["texts"] == 2
    assert line["tokens"] == asked[1]["usage"]["prompt_tokens"]
    stages = [line[f"{stage}_ms"] for stage in ("tokenize", "queue", "run", "encode")]
    assert all(stage >= 0 for stage in stages)
    assert 0 < line["run_ms"] < line["ms"]
    assert sum(stages) <= line["ms"] + 0.5  # each is rounded


def test_a_line_names_the_user_and_the_error(lines: dict[str, dict[str, Any]]) -> None:
    assert lines["asked-2"]["user"] == "alice"
    assert lines["asked-5"]["code"] == "model_not_found"
    assert lines["asked-6"]["code"] == "invalid_api_key"
    assert "key" not in lines["asked-6"]


def test_no_line_holds_a_text_or_a_key(counted: RunningServer, lines: dict[str, dict[str, Any]]) -> None:
    assert MARKER not in counted.log()
    assert KEY not in counted.log()
