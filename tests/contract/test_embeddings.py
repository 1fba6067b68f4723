"""POST /v1/embeddings: what goes in, what comes out."""

import gzip
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.contract.helpers import MODEL, checkpoint, vectors
from tests.support import RunningServer

TEXTS = ["What is Deep Learning?", "The weather is lovely today.", "一只狗 🐕"]
DEEP_LEARNING = [101, 2054, 2003, 2784, 4083, 1029, 102]
"""The ids of TEXTS[0], [CLS] and [SEP] included."""


def embed(client: httpx.Client, texts: object, **fields: object) -> httpx.Response:
    return client.post("/v1/embeddings", json={"model": MODEL, "input": texts, **fields})


# The shape of the answer


def test_the_answer_is_openai_s_list(http: httpx.Client) -> None:
    answer = embed(http, TEXTS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"object", "data", "model", "usage"}
    assert body["object"] == "list"
    assert body["model"] == MODEL
    assert set(body["usage"]) == {"prompt_tokens", "total_tokens"}
    assert [set(item) for item in body["data"]] == [{"object", "index", "embedding"}] * 3
    assert [item["object"] for item in body["data"]] == ["embedding"] * 3
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    assert [len(item["embedding"]) for item in body["data"]] == [384] * 3


def test_vectors_come_in_the_order_of_the_texts(http: httpx.Client) -> None:
    # Short and long in turn: the server sorts by length to fill its batches.
    texts = [("long " * (n * 7 % 40)) + f"text {n}" for n in range(40)]
    together = vectors(embed(http, texts))
    for n in (0, 17, 39):
        alone = vectors(embed(http, texts[n]))[0]
        assert np.argmax(together @ alone) == n


def test_vectors_have_length_one(http: httpx.Client) -> None:
    assert np.linalg.norm(vectors(embed(http, TEXTS)), axis=1) == pytest.approx(1.0, abs=1e-5)


def test_a_string_is_a_list_of_one(http: httpx.Client) -> None:
    assert embed(http, TEXTS[0]).content == embed(http, TEXTS[:1]).content


def test_usage_counts_the_special_tokens(http: httpx.Client) -> None:
    assert embed(http, "What is Deep Learning?").json()["usage"] == {"prompt_tokens": 7, "total_tokens": 7}
    assert embed(http, ["What is Deep Learning?", "a"]).json()["usage"] == {"prompt_tokens": 10, "total_tokens": 10}


@pytest.mark.parametrize("path", ["/v1/embeddings", "/api/v1/embeddings", "/embeddings"])
def test_all_three_paths_answer_the_same(http: httpx.Client, path: str) -> None:
    body = {"model": MODEL, "input": TEXTS}
    assert http.post(path, json=body).content == embed(http, TEXTS).content


@pytest.mark.parametrize("name", [MODEL, "all-MiniLM-L6-v2", "ALL-minilm-l6-V2", MODEL.upper()])
def test_a_model_goes_by_its_id_and_its_basename_in_any_case(http: httpx.Client, name: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": name, "input": "a"})
    assert answer.json()["model"] == MODEL


# Fields


def test_base64_and_floats_are_the_same_float32(http: httpx.Client) -> None:
    floats = vectors(embed(http, TEXTS, encoding_format="float"))
    answer = embed(http, TEXTS, encoding_format="base64")
    assert all(isinstance(item["embedding"], str) for item in answer.json()["data"])
    assert vectors(answer).tobytes() == floats.tobytes()


def test_floats_are_the_default(http: httpx.Client) -> None:
    assert embed(http, TEXTS).content == embed(http, TEXTS, encoding_format="float").content


OPTIONAL = [
    "encoding_format", "dimensions", "user", "input_type", "task", "prompt_name", "prompt", "instruction", "outputs",
    "truncate",
]  # fmt: skip


@pytest.mark.parametrize("field", OPTIONAL)
def test_null_means_absent(http: httpx.Client, field: str) -> None:
    assert embed(http, "a text", **{field: None}).content == embed(http, "a text").content


def test_all_optional_fields_may_be_null_at_once(http: httpx.Client) -> None:
    assert embed(http, "a text", **dict.fromkeys(OPTIONAL)).content == embed(http, "a text").content


def test_unknown_fields_are_ignored(http: httpx.Client) -> None:
    odd = {"late_chunking": True, "normalized": [1], "": {}, "timeout": 600, "extra_body": None}
    assert embed(http, "a text", **odd).content == embed(http, "a text").content


@pytest.mark.parametrize(
    "fields",
    [
        {"dimensions": 384},
        {"user": "alice"},
        {"outputs": ["dense"]},
        *({"input_type": kind} for kind in ("query", "document", "search_query", "search_document", "passage")),
        {"input_type": "retrieval.query"},
        {"input_type": "retrieval.passage"},
        {"task": "retrieval.query"},
        {"prompt_name": "query"},
        {"prompt": ""},
        {"truncate": "NONE"},
        {"truncate": False},
    ],
    ids=str,
)
def test_fields_that_change_nothing_for_this_model(http: httpx.Client, fields: dict[str, object]) -> None:
    assert embed(http, "a text", **fields).content == embed(http, "a text").content


def test_a_prompt_is_put_before_each_text_as_it_stands(http: httpx.Client) -> None:
    with_prompt = embed(http, ["one", "two"], prompt="query: ")
    assert with_prompt.content == embed(http, ["query: one", "query: two"]).content
    assert with_prompt.content != embed(http, ["one", "two"]).content


# Texts that are too long. 300 words of one token each; the model takes 256 tokens, of which two are special.

WORDS = [f"{word} {number % 10}" for number in range(75) for word in ("tree", "house")]
LONG = " ".join(WORDS)  # 300 tokens


@pytest.mark.parametrize("truncate", ["END", "end", True])
def test_the_end_is_cut(http: httpx.Client, truncate: object) -> None:
    answer = embed(http, LONG, truncate=truncate)
    assert answer.json()["usage"]["prompt_tokens"] == 256
    by_hand = embed(http, " ".join(LONG.split()[:254]))
    assert vectors(answer).tobytes() == vectors(by_hand).tobytes()


def test_the_start_is_cut(http: httpx.Client) -> None:
    answer = embed(http, LONG, truncate="START")
    assert answer.json()["usage"]["prompt_tokens"] == 256
    by_hand = embed(http, " ".join(LONG.split()[-254:]))
    assert vectors(answer).tobytes() == vectors(by_hand).tobytes()


def test_the_header_counts_what_was_cut(http: httpx.Client) -> None:
    assert embed(http, ["short", LONG, "short", LONG + LONG], truncate="END").headers["x-truncated-inputs"] == "2"


def test_no_header_where_nothing_was_cut(http: httpx.Client) -> None:
    assert "x-truncated-inputs" not in embed(http, ["short"], truncate="END").headers


def test_a_text_of_exactly_the_limit_is_not_too_long(http: httpx.Client) -> None:
    words = " ".join(LONG.split()[:254])
    assert embed(http, words).json()["usage"]["prompt_tokens"] == 256


# Numbers


def test_a_text_alone_and_among_others_has_the_same_vector(http: httpx.Client) -> None:
    texts = ["word " * (n * n % 120) + f"and {n}" for n in range(64)]
    for place, text in ((5, "one"), (31, "a few words more than that"), (60, "word " * 200)):
        texts.insert(place, text)
    together = vectors(embed(http, texts))
    for place in (5, 31, 60):
        assert np.abs(vectors(embed(http, texts[place]))[0] - together[place]).max() <= 1e-5


def test_the_same_request_twice_gives_the_same_bytes(http: httpx.Client) -> None:
    texts = [f"text {n} " * (n % 9 + 1) for n in range(30)]
    assert embed(http, texts).content == embed(http, texts).content


def test_an_idle_server_takes_2048_texts(http: httpx.Client) -> None:
    answer = embed(http, [f"text {n}" for n in range(2048)], encoding_format="base64")
    assert vectors(answer).shape == (2048, 384)


def test_requests_at_once_get_each_their_own_vectors(http: httpx.Client) -> None:
    # The server puts them into common batches, and their answers together again.
    requests = [[f"text {n} of request {r} " * (1 + (n + r) % 7) for n in range(1 + r % 5)] for r in range(60)]
    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(lambda texts: embed(http, texts), requests))
    every = vectors(embed(http, [text for texts in requests for text in texts]))
    assert np.abs(np.concatenate([vectors(answer) for answer in answers]) - every).max() <= 1e-5


# Ways to send it


def test_a_body_may_be_packed_with_gzip(http: httpx.Client) -> None:
    body = gzip.compress(json.dumps({"model": MODEL, "input": TEXTS}).encode())
    answer = http.post("/v1/embeddings", content=body, headers={"content-encoding": "gzip"})
    assert answer.content == embed(http, TEXTS).content


def test_a_body_may_come_in_chunks(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "input": TEXTS}).encode()
    answer = http.post("/v1/embeddings", content=(body[i : i + 7] for i in range(0, len(body), 7)))
    assert answer.request.headers["transfer-encoding"] == "chunked"
    assert answer.content == embed(http, TEXTS).content


def test_the_content_type_does_not_matter(http: httpx.Client) -> None:
    body = json.dumps({"model": MODEL, "input": TEXTS}).encode()
    answer = http.post("/v1/embeddings", content=body, headers={"content-type": "text/plain"})
    assert answer.content == embed(http, TEXTS).content


# Token arrays


@pytest.mark.parametrize("array", [[9906, 1917], [[9906, 1917]]], ids=str)
def test_token_arrays_without_the_vocabulary_say_how_to_provide_it(http: httpx.Client, array: list[object]) -> None:
    answer = embed(http, array)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == "input"
    for piece in ("cl100k_base", "TIKTOKEN_CACHE_DIR", "litellm", "check_embedding_ctx_length=False"):
        assert piece in error["message"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of a server whose MiniLM takes its own token ids, beside a copy of it that has prompts and was trained
    for shorter vectors, as far as its files go."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(checkpoint(), folder / "prompted")
    _edit(folder / "prompted" / "config.json", is_matryoshka=True, matryoshka_dimensions=[64, 128, 384])
    _edit(
        folder / "prompted" / "config_sentence_transformers.json",
        prompts={"query": "find: ", "passage": "text: ", "topic": "about: "},
        default_prompt_name=None,
    )
    (folder / "embedserve.toml").write_text(
        f'model = ["{MODEL}", "prompted={folder / "prompted"}"]\nrate_limit = 0\n'
        f'[model_settings."{MODEL}"]\ntoken_ids = "native"\nprice = 0.02\ncurrency = "EUR"\n'
    )
    with (
        RunningServer("--config", str(folder / "embedserve.toml")) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):
        yield client


def _edit(path: Path, **values: object) -> None:
    content = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps(content | values))


def test_native_token_ids_give_the_vector_of_the_text(settings: httpx.Client) -> None:
    answer = embed(settings, DEEP_LEARNING)
    assert answer.content == embed(settings, "What is Deep Learning?").content
    assert answer.json()["usage"]["prompt_tokens"] == 7


def test_native_token_arrays_come_in_order(settings: httpx.Client) -> None:
    arrays = [[101, 2054, 102], DEEP_LEARNING, [101, 2003, 102]]
    assert np.abs(vectors(embed(settings, arrays)) - vectors(embed(settings, ["what", TEXTS[0], "is"]))).max() < 1e-6


def test_a_native_token_id_beyond_the_vocabulary_is_refused(settings: httpx.Client) -> None:
    error = embed(settings, [[101, 102], [101, 30522, 102]]).json()["error"]
    assert error["param"] == "input"
    assert "input[1]" in error["message"]
    assert "30522" in error["message"]


def test_a_native_token_array_can_be_too_long(settings: httpx.Client) -> None:
    answer = embed(settings, [101] * 257)
    assert answer.status_code == 400
    assert "maximum context length is 256 tokens, however you requested 257 tokens" in answer.json()["error"]["message"]


def test_a_token_array_as_long_as_the_limit_is_no_long_list(settings: httpx.Client) -> None:
    assert vectors(embed(settings, [101] * 256)).shape == (1, 384)


# A model with prompts


@pytest.mark.parametrize(
    ("fields", "prefix"),
    [
        ({}, ""),
        ({"input_type": "query"}, "find: "),
        ({"input_type": "search_query"}, "find: "),
        ({"task": "retrieval.query"}, "find: "),
        ({"input_type": "document"}, "text: "),
        ({"input_type": "passage"}, "text: "),
        ({"task": "retrieval.passage"}, "text: "),
        ({"prompt_name": "topic"}, "about: "),
        ({"prompt": "my own: "}, "my own: "),
    ],
    ids=str,
)
def test_input_type_chooses_the_prompt(settings: httpx.Client, fields: dict[str, str], prefix: str) -> None:
    answer = embed(settings, ["a text"], model="prompted", **fields)
    assert answer.content == embed(settings, [prefix + "a text"], model="prompted").content


def test_an_unknown_input_type_is_refused_by_its_name(settings: httpx.Client) -> None:
    answer = embed(settings, "a text", model="prompted", task="classification")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "task"
    assert "classification" in answer.json()["error"]["message"]


# A model trained for shorter vectors


@pytest.mark.parametrize("size", [64, 128])
def test_shorter_vectors_are_the_start_of_the_long_ones_made_a_unit_again(settings: httpx.Client, size: int) -> None:
    full = vectors(embed(settings, TEXTS, model="prompted"))[:, :size]
    short = vectors(embed(settings, TEXTS, model="prompted", dimensions=size))
    assert short.shape == (3, size)
    assert np.abs(short - full / np.linalg.norm(full, axis=1, keepdims=True)).max() < 1e-6


def test_requests_of_different_sizes_do_not_disturb_each_other(settings: httpx.Client) -> None:
    assert vectors(embed(settings, "a", model="prompted", dimensions=64)).shape == (1, 64)
    assert vectors(embed(settings, "a", model="prompted")).shape == (1, 384)


@pytest.mark.parametrize("size", [0, -1, 65, 385, 10**12])
def test_a_size_it_was_not_trained_for_names_the_range(settings: httpx.Client, size: int) -> None:
    answer = embed(settings, "a", model="prompted", dimensions=size)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "dimensions"
    assert "64, 128" in error["message"]
    assert "384" in error["message"]


# What is told of them


def test_models_tell_their_prices_prompts_and_sizes(settings: httpx.Client) -> None:
    minilm, prompted = settings.get("/v1/embedding-models").json()["data"]
    assert minilm["pricing"] == {"per_million_tokens": 0.02, "currency": "EUR"}
    assert prompted["id"] == "prompted"
    assert prompted["owned_by"] == "local"
    assert prompted["prompts"] == {"query": "find: ", "passage": "text: ", "document": "text: ", "topic": "about: "}
    assert [prompted["supports_dimensions"], minilm["supports_dimensions"]] == [True, False]
    assert [prompted["dimensions"], prompted["max_dimensions"]] == [384, 384]
