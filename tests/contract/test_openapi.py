"""/openapi.json describes what is served, and what is served keeps to it."""

import collections
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.routing import Route

from embedserve.server.app import create_app
from embedserve.server.config import ServerConfig
from embedserve.server.openapi import EMBEDDINGS_PATHS
from embedserve.server.routes import Endpoints
from tests.support import MODEL, RunningServer

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(http: httpx.Client) -> dict[str, Any]:
    answer = http.get("/openapi.json")
    assert answer.headers["content-type"] == "application/json"
    document: dict[str, Any] = answer.json()
    return document


@pytest.fixture(scope="module")
def schema(server: RunningServer) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json", timeout=30)


def test_the_document_is_valid(schema: schemathesis.BaseSchema, document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    schema.validate()


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found: list[str] = []

    def walk(node: object) -> None:
        if isinstance(node, dict):
            found.extend(value for name, value in node.items() if name == "$ref")
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            walk(child)

    walk(document)
    assert found
    schemas = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(found) == schemas


def test_what_is_served_is_described_and_what_is_described_is_served(document: dict[str, Any]) -> None:
    unused: Any = None
    client: Any = type("Client", (), {"report": None})
    app = create_app(Endpoints(ServerConfig(), unused, client, unused), client)
    served = {
        (route.path.replace(":path}", "}"), method.lower())
        for route in app.routes
        if isinstance(route, Route)
        for method in (route.methods or ()) - {"HEAD"}
    }
    described = {(path, method) for path, operations in document["paths"].items() for method in operations}
    assert described == served


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/api/v1/embedding-models"])
def test_every_described_list_is_there(http: httpx.Client, document: dict[str, Any], path: str) -> None:
    assert "get" in document["paths"][path]
    assert http.get(path).status_code == 200


def test_the_limits_in_force_are_in_it(document: dict[str, Any]) -> None:
    fields = document["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert {one["maxItems"] for one in fields["input"]["anyOf"] if "maxItems" in one} == {2048}
    assert document["components"]["schemas"]["EmbeddingRequest"]["required"] == ["model", "input"]


def test_a_fuzzer_finds_nothing_that_is_not_described(
    schema: schemathesis.BaseSchema, document: dict[str, Any]
) -> None:
    fields = list(document["components"]["schemas"]["EmbeddingRequest"]["properties"])
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        embeds = "embeddings" in operation.path
        # What the document does not allow can only be made where there is a body.
        for mode in schemathesis.GenerationMode if embeds else [schemathesis.GenerationMode.POSITIVE]:

            @hypothesis.seed(20240607)
            @hypothesis.settings(
                max_examples=120 if embeds else 5,
                deadline=None,
                database=None,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(
                case=operation.as_strategy(generation_mode=mode),
                only=strategies.none() | strategies.sampled_from(fields),
            )
            def fuzz(case: schemathesis.Case, only: str | None) -> None:
                # A made-up name is never a model's, and many fields at once are never all right: what lies behind
                # those checks is reached with the model's name and one field.
                if only and isinstance(case.body, dict):
                    case.body = {name: case.body[name] for name in ("input", only) if name in case.body}
                    case.body["model"] = MODEL
                response = case.call_and_validate(checks=CHECKS, timeout=30)
                statuses[case.path, response.status_code] += 1

            fuzz()
    for path in EMBEDDINGS_PATHS:
        assert {200, 400, 404} <= {status for asked, status in statuses if asked == path}, statuses
