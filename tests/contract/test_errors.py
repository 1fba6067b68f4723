"""The table of errors: status, wording, type, param and code of each."""

import gzip
import json
import re

import httpx
import pytest

from tests.contract.helpers import BODY_LIMIT, KEY, MODEL, Connection, envelope, http_request
from tests.support import RunningServer

INVALID_INPUT = "'$.input' is invalid. Please check the API reference: https://platform.openai.com/docs/api-reference."
NO_MODEL = "you must provide a model parameter"


def no_such_model(name: str) -> str:
    return f"The model `{name}` does not exist or you do not have access to it."


# Bodies


@pytest.mark.parametrize(
    ("fields", "status", "message", "param", "code"),
    [
        ({"model": None}, 400, NO_MODEL, None, None),
        ({"model": ""}, 400, NO_MODEL, None, None),
        ({"model": "x"}, 404, no_such_model("x"), "model", "model_not_found"),
        ({"model": "BAAI/bge-m9"}, 404, no_such_model("BAAI/bge-m9"), "model", "model_not_found"),
        ({"input": []}, 400, INVALID_INPUT, ..., None),
        ({"input": ""}, 400, INVALID_INPUT, ..., None),
        ({"input": ["a", ""]}, 400, INVALID_INPUT, ..., None),
        ({"input": None}, 400, INVALID_INPUT, ..., None),
        ({"input": 7}, 400, INVALID_INPUT, ..., None),
        ({"input": {"text": "a"}}, 400, INVALID_INPUT, ..., None),
        ({"input": ["a", None]}, 400, INVALID_INPUT, ..., None),
        ({"input": ["a", 7]}, 400, INVALID_INPUT, ..., None),
        ({"input": [7, "a"]}, 400, INVALID_INPUT, ..., None),
        ({"input": [1.5]}, 400, INVALID_INPUT, ..., None),
        ({"input": [[]]}, 400, INVALID_INPUT, ..., None),
        ({"input": [-1]}, 400, INVALID_INPUT, ..., None),
        ({"input": [True]}, 400, INVALID_INPUT, ..., None),
        ({"dimensions": 128}, 400, "This model does not support specifying dimensions.", None, None),
        (
            {"encoding_format": "md5"},
            400,
            "Invalid value for 'encoding_format' = md5. Supported values: ['float', 'base64'].",
            "encoding_format",
            None,
        ),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_field(
    http: httpx.Client, fields: dict[str, object], status: int, message: str, param: object, code: str | None
) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": "a", **fields}), status)
    # The contract leaves open whether invalid input names the field.
    params = ("input", None) if param is ... else (param,)
    # What follows names the input.
    assert error["message"].startswith(message)
    assert error["type"] == "invalid_request_error"
    assert error["param"] in params
    assert error["code"] == code


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["a", ""], "input[1] is empty"),
        (["a", 1], "input[1] is an integer"),
        ([[1], "a"], "input[1] is a string"),
        ([[1], []], "input[1] is empty"),
        ([[1], [1, "b"]], "input[1] holds what is no token id"),
        (["a", None], "input[1] is null"),
    ],
    ids=str,
)
def test_the_guilty_input_is_named(http: httpx.Client, value: object, said: str) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": value}), 400)
    assert said in error["message"]


def test_no_fields_at_all(http: httpx.Client) -> None:
    error = envelope(http.post("/v1/embeddings", json={}), 400)
    assert error == {"message": NO_MODEL, "type": "invalid_request_error", "param": None, "code": None}


@pytest.mark.parametrize("value", [0, -3, "128", 1.5, True, [384], {}], ids=str)
def test_dimensions_that_are_no_size_name_what_is_expected(http: httpx.Client, value: object) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": "a", "dimensions": value}), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "dimensions", None)
    assert "384" in error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"text"', b"null", b"7", b"not json", b'{"model": "x",}', b"\xff\xfe{\x00}\x00"],
    ids=str,
)
def test_a_body_that_is_no_json_object(http: httpx.Client, body: bytes) -> None:
    error = envelope(http.post("/v1/embeddings", content=body), 400)
    assert error["message"].startswith("We could not parse the JSON body of your request. ")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)


@pytest.mark.parametrize(
    "pair",
    [
        {"input_type": "query", "prompt": "a"},
        {"prompt": "a", "instruction": "b"},
        {"input_type": "query", "instruction": "b"},
        {"task": "query", "prompt_name": "query"},
    ],
    ids=str,
)
def test_two_ways_to_prompt_are_one_too_many(http: httpx.Client, pair: dict[str, str]) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": "a", **pair}), 400)
    assert error["param"] in pair
    for name in pair:
        assert repr(name) in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("instruction", "Find it"), ("outputs", ["sparse"]), ("outputs", ["dense", "colbert"]), ("truncate", "MIDDLE")],
)
def test_what_this_model_cannot_do_is_refused_by_its_name(http: httpx.Client, field: str, value: object) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": "a", field: value}), 400)
    assert error["param"] == field


# Sizes


def test_2049_inputs_name_the_limit_and_what_came(http: httpx.Client) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": ["a"] * 2049}), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "input", None)
    assert "2048" in error["message"]
    assert "2049" in error["message"]


@pytest.mark.parametrize(
    ("text", "at_least"),
    [("tree " * 255, 257), ("tree " * 300, 257), ("book " * 1_000_000, 257)],
    ids=["one token more", "a page", "a book"],
)
def test_a_text_that_is_too_long_is_told_in_both_sentences(http: httpx.Client, text: str, at_least: int) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": ["fine", text]}), 400)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", "input", None)
    found = re.fullmatch(
        r"This model's maximum context length is 256 tokens, however you requested (\d+) tokens "
        r"\((\d+) in your prompt; 0 for the completion\)\. Please reduce your prompt; or completion length\. "
        r"Invalid 'input\[1\]': maximum input length is 256 tokens\.",
        error["message"],
    )
    assert found, error["message"]
    assert found[1] == found[2]
    assert at_least <= int(found[1]) <= len(text)


def test_a_request_over_the_token_limit(small: httpx.Client) -> None:
    # 3 tokens a text, specials included
    error = envelope(small.post("/v1/embeddings", json={"model": MODEL, "input": ["a"] * 7}), 400)
    assert error == {
        "message": "Requested 21 tokens, max 20 tokens per request",
        "type": "max_tokens_per_request",
        "param": None,
        "code": "max_tokens_per_request",
    }
    assert small.post("/v1/embeddings", json={"model": MODEL, "input": ["a"] * 6}).status_code == 200


def body_of(size: int) -> bytes:
    """A valid request of so many bytes."""
    start = json.dumps({"model": MODEL, "input": "a", "padding": ""})[:-2].encode()
    return start + b"x" * (size - len(start) - 2) + b'"}'


def check_too_large(answer: httpx.Response) -> None:
    error = envelope(answer, 413)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert str(BODY_LIMIT) in error["message"]


def test_a_body_of_exactly_the_limit_is_taken(small: httpx.Client) -> None:
    assert small.post("/v1/embeddings", content=body_of(BODY_LIMIT)).status_code == 200


def test_a_body_too_large_by_its_content_length(small: httpx.Client) -> None:
    check_too_large(small.post("/v1/embeddings", content=body_of(BODY_LIMIT + 1)))


def test_a_body_too_large_is_refused_before_it_is_sent(small: httpx.Client) -> None:
    with Connection(str(small.base_url)) as connection:
        head = {"authorization": f"Bearer {KEY}", "content-length": str(10 * BODY_LIMIT)}
        connection.send(http_request(headers=head))
        envelope(connection.answer(), 413)


def test_a_body_too_large_in_chunks(small: httpx.Client) -> None:
    check_too_large(small.post("/v1/embeddings", content=iter([body_of(BODY_LIMIT), b" "])))


def test_a_body_too_large_once_unpacked(small: httpx.Client) -> None:
    headers = {"content-encoding": "gzip"}
    fine, too_large = gzip.compress(body_of(BODY_LIMIT)), gzip.compress(body_of(BODY_LIMIT + 1))
    assert small.post("/v1/embeddings", content=fine, headers=headers).status_code == 200
    check_too_large(small.post("/v1/embeddings", content=too_large, headers=headers))


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate", "gzip, gzip", "nonsense"])
def test_an_unknown_content_encoding(http: httpx.Client, encoding: str) -> None:
    answer = http.post("/v1/embeddings", content=b"{}", headers={"content-encoding": encoding})
    error = envelope(answer, 415)
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert "gzip" in error["message"]
    assert answer.headers["accept-encoding"] == "gzip"


# URLs and methods


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/x"), ("GET", "/"), ("GET", "/v1"), ("POST", "/v1/embeddings/"), ("POST", "/V1/embeddings"),
        ("POST", "/v1/v1/embeddings"), ("POST", "//v1/embeddings"), ("GET", "/v2/models"), ("DELETE", "/nothing"),
        ("POST", "/v1/chat/completions"), ("GET", "/docs"), ("GET", "/v1/models/"),
    ],
)  # fmt: skip
def test_an_unknown_url(http: httpx.Client, method: str, path: str) -> None:
    answer = http.request(method, f"{http.base_url}{path}" if path.startswith("//") else path)
    if path == "/v1/models/":
        assert envelope(answer, 404)["code"] in ("unknown_url", "model_not_found")
        return
    assert envelope(answer, 404) == {
        "message": f"Invalid URL ({method} {path})",
        "type": "invalid_request_error",
        "param": None,
        "code": "unknown_url",
    }


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", "/v1/embeddings", {"POST"}),
        ("PUT", "/api/v1/embeddings", {"POST"}),
        ("DELETE", "/embeddings", {"POST"}),
        ("OPTIONS", "/v1/embeddings", {"POST"}),
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("DELETE", f"/v1/models/{MODEL}", {"GET", "HEAD"}),
        ("POST", "/v1/embedding-models", {"GET", "HEAD"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("PATCH", "/metrics", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_names_the_right_ones(http: httpx.Client, method: str, path: str, allow: set[str]) -> None:
    answer = http.request(method, path)
    assert envelope(answer, 405)["type"] == "invalid_request_error"
    assert set(answer.headers["allow"].split(", ")) == allow


# Keys


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": ""}, {"authorization": "Bearer"}, {"authorization": "Basic abc"}, {"x-api-key": ""}],
    ids=str,
)
def test_no_key(keyless: httpx.Client, headers: dict[str, str]) -> None:
    answer = keyless.post("/v1/embeddings", json={"model": MODEL, "input": "a"}, headers=headers)
    error = envelope(answer, 401)
    assert error["message"].startswith(
        "You didn't provide an API key. You need to provide your API key in an Authorization header "
    )
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)


@pytest.mark.parametrize("key", ["sk-wrong-key-that-is-long-1234", "short", "sk-contract-0123456789-wxy", KEY + "z"])
@pytest.mark.parametrize("header", ["authorization", "x-api-key"])
def test_a_wrong_key_comes_back_with_four_characters_at_most(keyless: httpx.Client, key: str, header: str) -> None:
    headers = {header: f"Bearer {key}" if header == "authorization" else key}
    answer = keyless.post("/v1/embeddings", json={"model": MODEL, "input": "a"}, headers=headers)
    error = envelope(answer, 401)
    assert error["message"].startswith("Incorrect API key provided: ")
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    whole = answer.text + str(answer.headers)
    # The prefix sk- is on every key and tells nothing.
    bare = key.removeprefix("sk-")
    assert not any(bare[i : i + 5] in whole for i in range(len(bare) - 4))


def test_a_long_key_is_told_by_its_ends(keyless: httpx.Client) -> None:
    headers = {"authorization": "Bearer sk-wrong-key-that-is-long-1234"}
    answer = keyless.post("/v1/embeddings", json={}, headers=headers)
    assert envelope(answer, 401)["message"].startswith("Incorrect API key provided: sk-…1234.")


def test_a_key_that_is_no_ascii_is_a_wrong_key(small: httpx.Client) -> None:
    with Connection(str(small.base_url)) as connection:
        connection.send(http_request(b"{}", headers={"authorization": "Bearer sk-\xff\xfe\xfd-0123456789"}))
        assert envelope(connection.answer(), 401)["code"] == "invalid_api_key"


# Limits


def test_a_model_that_is_loading_is_a_503_with_both_retry_headers() -> None:
    # The front end answers as soon as it listens; the engine needs seconds for torch and the weights.
    with RunningServer("--rate-limit", "0", wait=False) as server:
        answer = server.embed("a")
        error = envelope(answer, 503)
        assert (error["type"], error["param"], error["code"]) == ("server_error", None, "model_loading")
        assert "loaded" in error["message"]
        assert int(answer.headers["retry-after"]) >= 1
        assert int(answer.headers["retry-after-ms"]) >= 1
