"""Models that run elsewhere: what goes to their upstream, and what becomes of each way in which it can fail."""

import asyncio
import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest

from embedserve.server.upstreams import CLOSED
from tests.contract.helpers import envelope, eventually, vectors
from tests.server.upstream import Behaviour, Call, Upstream, closed_port, good, reply, vector_of
from tests.support import RunningServer

UPSTREAM_KEY = "sk-upstream-secret-0123456789"
CLIENT_KEY = "sk-client-secret-9876543210"
SMALL = "text-embedding-3-small"

NO_PROXY = {"NO_PROXY": "*", "no_proxy": "*"}
"""A proxy in the environment of the tests would be used, and not reach loopback."""

SETTINGS = """
model = []
rate_limit = 0

[upstreams."text-embedding-3-small"]
base_url = "{url}"
key_env = "UPSTREAM_KEY"
price = 0.02

[upstreams."text-embedding-ada-002"]
base_url = "{url}/"

[upstreams."Baichuan-Text-Embedding"]
base_url = "{url}"

[upstreams."zhipu-embedding-2"]
base_url = "{url}"
token_ids = "native"

[upstreams."ours/little"]
base_url = "{url}"
model = "little"
dimensions = 4
max_inputs = 2
max_tokens = 10
token_ids = "native"
retries = 1
timeout_seconds = 30

[upstreams.hasty]
base_url = "{url}"
dimensions = 4
timeout_seconds = 0.3

[upstreams.dawdling]
base_url = "{stuck}"
dimensions = 4
timeout_seconds = 0.5
request_timeout = 1
retries = 10

[upstreams.hanging]
base_url = "{stuck}"
dimensions = 4

[upstreams.unreachable]
base_url = "http://127.0.0.1:{closed}/v1"
dimensions = 4
retries = 1

[aliases]
"small-256" = {{ model = "text-embedding-3-small", dimensions = 256, price = 0.5, currency = "EUR" }}

[model_settings."ours/little"]
currency = "CNY"
"""


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def stuck() -> Iterator[Upstream]:
    """Another upstream, for tests with two."""
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def relaying(upstream: Upstream, stuck: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that only relays, and logs all that it can."""
    file = tmp_path_factory.mktemp("relay") / "embedserve.toml"
    file.write_text(SETTINGS.format(url=upstream.url, stuck=stuck.url, closed=closed_port()))
    options = ("--config", str(file), "--log-level", "debug", "--api-key", f"tests={CLIENT_KEY}")
    with RunningServer(*options, environment={"UPSTREAM_KEY": UPSTREAM_KEY, **NO_PROXY}) as running:
        yield running


@pytest.fixture(scope="module")
def client(relaying: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=relaying.url, timeout=30, headers={"authorization": f"Bearer {CLIENT_KEY}"}) as client:
        yield client


@pytest.fixture
def embed(client: httpx.Client, upstream: Upstream) -> Callable[..., httpx.Response]:
    upstream.script()

    def call(texts: object, model: str = SMALL, **fields: object) -> httpx.Response:
        return client.post("/v1/embeddings", json={"model": model, "input": texts, **fields})

    return call


Embed = Callable[..., httpx.Response]


def answer_well(call: Call) -> None:
    call.answer(200, json.dumps(good(call)).encode())


# What goes there and comes back


def test_a_request_is_relayed(embed: Embed, upstream: Upstream) -> None:
    answer = embed(["one", "two"], user="alice")
    assert np.array_equal(vectors(answer), [vector_of("one", 1536), vector_of("two", 1536)])
    assert answer.json()["usage"] == {"prompt_tokens": 6, "total_tokens": 6}
    assert answer.json()["model"] == answer.headers["openai-model"] == SMALL
    [call] = upstream.calls
    assert call.path == "/v1/embeddings"
    # Neither the user, nor a default that some upstream might not know.
    assert call.body == {"model": SMALL, "input": ["one", "two"], "encoding_format": "base64"}


def test_the_upstream_gets_the_operator_s_key_and_never_the_client_s(embed: Embed, upstream: Upstream) -> None:
    embed("a")
    embed("a", "text-embedding-ada-002")
    with_key, without = upstream.calls
    assert with_key.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert "authorization" not in without.headers
    assert CLIENT_KEY not in str(with_key.headers) + str(without.headers)


def test_both_encodings_hold_the_same_bits_whatever_the_upstream_speaks(embed: Embed) -> None:
    for model, size in ((SMALL, 1536), ("ours/little", 4)):
        one, other = embed("a", model, encoding_format="float"), embed("a", model, encoding_format="base64")
        assert isinstance(other.json()["data"][0]["embedding"], str)
        assert np.array_equal(vectors(one), vectors(other))
        assert np.array_equal(vectors(one), [vector_of("a", size)])


def test_openai_s_client(relaying: RunningServer, upstream: Upstream) -> None:
    upstream.script()
    with openai.OpenAI(base_url=f"{relaying.url}/v1", api_key=CLIENT_KEY, max_retries=0) as client:
        answer = client.embeddings.create(model="small-256", input=["one", "two"])
        assert np.array_equal(answer.data[1].embedding, vector_of("two", 256))
        upstream.script(reply(401, {"error": {"message": "Incorrect API key provided"}}))
        with pytest.raises(openai.InternalServerError) as caught:  # and not an AuthenticationError
            client.embeddings.create(model=SMALL, input="a")
    assert caught.value.status_code == 502


def test_many_inputs_become_several_calls_and_stay_in_order(embed: Embed, upstream: Upstream) -> None:
    texts = [f"text {number}" for number in range(5)]

    def slowly(call: Call) -> None:
        time.sleep(0.2)
        answer_well(call)

    upstream.script(slowly)
    answer = embed(texts, "ours/little")
    assert np.array_equal(vectors(answer), [vector_of(text, 4) for text in texts])
    assert answer.json()["usage"]["total_tokens"] == 5 * len("text 0")
    assert sorted(call.body["input"] for call in upstream.calls) == [texts[0:2], texts[2:4], texts[4:]]


def test_a_few_calls_run_at_a_time(embed: Embed, upstream: Upstream) -> None:
    running, most, lock = 0, 0, threading.Lock()

    def count(call: Call) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        answer_well(call)

    upstream.script(*[count] * 10)
    assert embed(["a"] * 20, "ours/little").status_code == 200
    assert len(upstream.calls) == 10
    assert 2 <= most <= 4


def test_a_call_has_no_more_inputs_than_its_answer_can_be_read_at_once(embed: Embed, upstream: Upstream) -> None:
    answer = embed(["a"] * 200)  # of 2048 that this upstream takes; an answer may have 8 MiB, and 32 bytes a float
    assert vectors(answer).shape == (200, 1536)
    assert sorted(call.rows for call in upstream.calls) == [33, 167]


def test_the_upstream_s_index_counts_and_not_its_order(embed: Embed, upstream: Upstream) -> None:
    def shuffled(call: Call) -> None:
        body = good(call)
        body["data"].reverse()
        call.answer(200, json.dumps(body).encode())

    upstream.script(shuffled)
    assert np.array_equal(vectors(embed(["a", "b"])), [vector_of("a", 1536), vector_of("b", 1536)])


def test_packed_answers_are_unpacked(embed: Embed, upstream: Upstream) -> None:
    def pack(call: Call) -> None:
        call.answer(200, gzip.compress(json.dumps(good(call)).encode()), [("content-encoding", "gzip")])

    upstream.script(pack)
    assert np.array_equal(vectors(embed("a")), [vector_of("a", 1536)])


def test_an_upstream_s_cookies_are_not_kept(embed: Embed, upstream: Upstream) -> None:
    def with_cookie(call: Call) -> None:
        call.answer(200, json.dumps(good(call)).encode(), [("set-cookie", "session=1; Path=/")])

    upstream.script(with_cookie)
    assert [embed("a").status_code, embed("a").status_code] == [200, 200]
    assert ["cookie" in call.headers for call in upstream.calls] == [False, False]


def test_the_operator_s_proxy_is_the_way_out(upstream: Upstream, tmp_path: Path) -> None:
    file = tmp_path / "embedserve.toml"
    file.write_text('model = []\n[upstreams.little]\nbase_url = "http://upstream.invalid/v1"\ndimensions = 4\n')
    upstream.script()
    proxy = upstream.url.removesuffix("/v1")
    environment = {"http_proxy": proxy, "HTTP_PROXY": proxy, "NO_PROXY": "", "no_proxy": ""}
    with RunningServer("--config", str(file), environment=environment) as server:
        assert vectors(server.embed("a", model="little")).shape == (1, 4)
    assert [call.path for call in upstream.calls] == ["http://upstream.invalid/v1/embeddings"]


# Dimensions, tokens, prompts


def test_dimensions_are_asked_of_the_upstream(embed: Embed, upstream: Upstream) -> None:
    assert vectors(embed("a", dimensions=512)).shape == (1, 512)
    assert vectors(embed("a", dimensions=1536)).shape == (1, 1536)
    assert [call.body.get("dimensions") for call in upstream.calls] == [512, None]


def test_dimensions_that_the_model_cannot_have_never_leave_the_house(embed: Embed, upstream: Upstream) -> None:
    assert "1 to 1536" in envelope(embed("a", dimensions=1537), 400)["message"]
    error = envelope(embed("a", "text-embedding-ada-002", dimensions=512), 400)
    assert error["message"] == "This model does not support specifying dimensions."
    assert upstream.calls == []


def test_an_upstream_that_ignores_dimensions_is_found_out(embed: Embed, upstream: Upstream) -> None:
    upstream.script(lambda call: call.answer(200, json.dumps(good(call, dimensions=1536)).encode()))
    assert "1536 numbers, not 512" in envelope(embed("a", dimensions=512), 502)["message"]


def test_token_arrays_go_as_they_came(embed: Embed, upstream: Upstream) -> None:
    assert np.array_equal(vectors(embed([[1, 2], [3]])), [vector_of([1, 2], 1536), vector_of([3], 1536)])
    assert vectors(embed([5, 6, 7])).shape == (1, 1536)
    assert [call.body["input"] for call in upstream.calls] == [[[1, 2], [3]], [[5, 6, 7]]]


def test_a_token_array_can_be_too_long(embed: Embed, upstream: Upstream) -> None:
    message = envelope(embed([[1], [1] * 11], "ours/little"), 400)["message"]
    assert "maximum context length is 10 tokens, however you requested 11 tokens" in message
    assert "input[1]" in message
    assert upstream.calls == []


def test_token_arrays_become_text_for_an_upstream_of_another_vocabulary(embed: Embed, upstream: Upstream) -> None:
    # With the vocabulary, or without it: never ids that would mean something else there.
    answer = embed([9906, 1917], "Baichuan-Text-Embedding")
    if answer.status_code == 200:
        assert [call.body["input"] for call in upstream.calls] == [["Hello world"]]
    else:
        assert "cl100k" in envelope(answer, 400)["message"]
        assert upstream.calls == []


def test_a_prompt_goes_before_each_text(embed: Embed, upstream: Upstream) -> None:
    assert embed(["a", "b"], prompt="find: ").status_code == 200
    assert embed("a", input_type="query").status_code == 200
    assert [call.body["input"] for call in upstream.calls] == [["find: a", "find: b"], ["a"]]
    assert envelope(embed([[1, 2]], prompt="find: "), 400)["param"] == "input"


@pytest.mark.parametrize(
    ("field", "value"), [("instruction", "find"), ("outputs", ["sparse"]), ("truncate", "END"), ("truncate", True)]
)
def test_what_only_our_own_engines_can_do_is_refused(
    embed: Embed, upstream: Upstream, field: str, value: object
) -> None:
    assert envelope(embed("a", **{field: value}), 400)["param"] == field
    assert upstream.calls == []


def test_the_five_closed_models_by_what_is_known_of_them(embed: Embed, upstream: Upstream) -> None:
    assert vectors(embed(["文"] * 17, "zhipu-embedding-2")).shape == (17, 1024)
    assert sorted(call.rows for call in upstream.calls) == [1, 16]
    assert {call.body["model"] for call in upstream.calls} == {"embedding-2"}
    assert "encoding_format" not in upstream.calls[0].body
    assert vectors(embed("文", "baichuan-text-embedding")).shape == (1, 1024)


# What cannot be used: one call, and a 502


def changed(change: Callable[[dict[str, Any]], object]) -> Behaviour:
    """A good answer to two inputs, in floats, with something changed."""

    def behave(call: Call) -> None:
        call.body["encoding_format"] = "float"
        body = good(call)
        change(body)
        call.answer(200, json.dumps(body).encode())

    return behave


def embedding(value: object) -> Behaviour:
    """A good answer whose second vector is this."""
    return changed(lambda body: body["data"][1].update(embedding=value))


def redirect(call: Call) -> None:
    call.answer(307, b"", [("location", "/v1/embeddings")])


def packed(*encodings: str) -> Behaviour:
    """64 MiB of blanks, packed as often as there are encodings."""
    body = b" " * (64 << 20)
    for _ in encodings:
        body = gzip.compress(body, 1)
    return lambda call: call.answer(200, body, [("content-encoding", one) for one in encodings])


def huge(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\n\r\n" + b" " * (1 << 22))
    call.close()


UNUSABLE: dict[str, tuple[Behaviour, str]] = {
    "fewer vectors": (changed(lambda body: body["data"].pop()), "1 vectors for 2 inputs"),
    "more vectors": (changed(lambda body: body["data"].append(body["data"][0])), "3 vectors for 2 inputs"),
    "an index twice": (changed(lambda body: body["data"][0].update(index=1)), "which vector is which"),
    "an index that is none": (changed(lambda body: body["data"][0].update(index="0")), "`$.data[0].index`"),
    "an index too many": (changed(lambda body: body["data"][0].update(index=2)), "which vector is which"),
    "no index": (changed(lambda body: body["data"][0].pop("index")), "required field `index`"),
    "short vectors": (embedding([0.5] * 1535), "1535 numbers, not 1536"),
    "empty vectors": (embedding([]), "0 numbers, not 1536"),
    "null": (embedding(None), "got `null` - at `$.data[1].embedding`"),
    "null in a vector": (embedding([None] * 1536), "got `null` - at `$.data[1].embedding[0]`"),
    "texts in a vector": (embedding(["0.5"] * 1536), "got `str`"),
    "booleans in a vector": (embedding([True] * 1536), "got `bool`"),
    "nested vectors": (embedding([[0.5] * 1536]), "got `array`"),
    "what float32 cannot hold": (embedding([1e300] * 1536), "not finite"),
    "NaN in base64": (embedding(base64.b64encode(b"\0\0\xc0\x7f" * 1536).decode()), "not finite"),
    "short base64": (embedding(base64.b64encode(b"\0\0\0\0" * 100).decode()), "100 numbers, not 1536"),
    "cut base64": (embedding(base64.b64encode(b"\0" * 6143).decode()), "not base64 of float32"),
    "no base64": (embedding("*" * 8192), "not base64"),
    "no vector": (changed(lambda body: body["data"][0].pop("embedding")), "required field `embedding`"),
    "no data": (changed(lambda body: body.pop("data")), "required field `data`"),
    "data of another type": (changed(lambda body: body.update(data={"a": 1})), "got `object` - at `$.data`"),
    "items of another type": (changed(lambda body: body.update(data=[1, 2])), "got `int` - at `$.data[0]`"),
    "no usage": (changed(lambda body: body.pop("usage")), "how many tokens"),
    "negative usage": (changed(lambda body: body.update(usage={"prompt_tokens": -1})), "how many tokens"),
    "usage that no one has": (changed(lambda body: body.update(usage={"prompt_tokens": 2**63})), "how many tokens"),
    "usage past 64 bits": (changed(lambda body: body.update(usage={"prompt_tokens": 2**64})), "how many tokens"),
    "usage of another type": (changed(lambda body: body.update(usage={"prompt_tokens": "6"})), "usage.prompt_tokens"),
    "a million brackets": (reply(200, b'{"x":' + b"[" * 50_000), "not JSON"),
    "no UTF-8": (reply(200, b'{"data":[{"index":0,"embedding":"\xff"}]}'), "not JSON"),
    "a NaN": (reply(200, b'{"data":[{"index":0,"embedding":[NaN]},{"index":1,"embedding":[NaN]}]}'), "not JSON"),
    "HTML": (reply(200, b"<html>Please log in</html>"), "not JSON"),
    "half of the JSON": (reply(200, b'{"object":"list","data":[{"index":0,'), "not JSON"),
    "nothing": (reply(200), "not JSON"),
    "a list": (reply(200, []), "Expected `object`, got `array`"),
    "no content": (reply(204), "status 204"),
    "not packed as it says": (reply(200, b"{}", content_encoding="gzip"), "not packed as it says"),
    "packed by something else": (reply(200, b"{}", content_encoding="br"), "than once with gzip"),
    "packed twice": (packed("gzip", "gzip"), "than once with gzip"),
    "a giant, packed": (packed("gzip"), "larger than"),
    "a giant": (huge, "larger than"),
    "a redirect": (redirect, "redirects (status 307)"),
    "401": (reply(401, {"error": {"message": "Incorrect API key provided: sk-upstr"}}), "the key of this server"),
    "403": (reply(403, {"error": {"message": "Country not supported"}}), "does not let this server in"),
    "404": (reply(404, {"error": {"message": "The model does not exist"}}), "does not know the model"),
    "a used-up account": (reply(429, {"error": {"message": "x", "code": "insufficient_quota"}}), "is used up"),
    "a teapot": (reply(418, b"short and stout"), "status 418"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_answer_that_cannot_be_used(embed: Embed, upstream: Upstream, what: str) -> None:
    behaviour, reason = UNUSABLE[what]
    upstream.script(behaviour)
    error = envelope(embed(["a", "b"]), 502)
    assert (error["type"], error["code"], error["param"]) == ("server_error", "upstream_error", None)
    assert reason in error["message"]
    assert "sk-" not in error["message"]
    assert len(upstream.calls) == 1, "what does not pass is not tried again"


# What may pass: tried again


def hang(call: Call) -> None:
    call.hang()


def slow_headers(call: Call) -> None:
    for piece in (b"HTTP/1.1 200 OK\r\n", *[b"x-wait: yes\r\n"] * 100):
        call.send(piece)
        time.sleep(0.05)


def drip(call: Call) -> None:
    call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n")
    for _ in range(100):
        call.send(b" ")
        time.sleep(0.05)


def cut_short(call: Call) -> None:
    call.send(b'HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n{"object":"list","data":[{"index":0,')
    call.close()


def no_http(call: Call) -> None:
    call.send(b"SSH-2.0-OpenSSH_9.6\r\n")
    call.close()


PASSING: dict[str, Behaviour] = {
    "500": reply(500, {"error": {"message": "oops"}}),
    "502 in HTML": reply(502, b"<html>Bad Gateway</html>"),
    "503": reply(503, b"", retry_after="1"),
    "408": reply(408),
    "429": reply(429, {"error": {"message": "slow down"}}, retry_after_ms="10"),
    "429 until a date": reply(429, b"", retry_after="Wed, 21 Oct 2015 07:28:00 GMT"),
    "429 until nonsense": reply(429, b"", retry_after="tomorrow"),
    "429 until the end of time": reply(429, b"", retry_after="Fri, 31 Dec 9999999999 23:59:59 GMT"),
    "500 that is packed twice": reply(500, b"", content_encoding="gzip, gzip"),
    "a reset": Call.reset,
    "a connection that ends": Call.close,
    "an answer that is cut short": cut_short,
    "no HTTP": no_http,
}


@pytest.mark.parametrize("what", PASSING)
def test_what_passes_is_not_noticed(embed: Embed, upstream: Upstream, what: str) -> None:
    upstream.script(PASSING[what])
    assert np.array_equal(vectors(embed(["a", "b"])), [vector_of("a", 1536), vector_of("b", 1536)])
    assert len(upstream.calls) == 2


@pytest.mark.parametrize("slow", [hang, slow_headers, drip])
def test_an_answer_that_takes_too_long_is_given_up(embed: Embed, upstream: Upstream, slow: Behaviour) -> None:
    upstream.script(slow)
    assert np.array_equal(vectors(embed(["a", "b"], "hasty")), [vector_of("a", 4), vector_of("b", 4)])
    assert len(upstream.calls) > 1
    upstream.script(*[slow] * 3)
    assert envelope(embed("a", "hasty"), 503)["code"] == "upstream_unavailable"
    assert len(upstream.calls) == 3


def test_a_wait_that_would_not_end_in_time_is_not_begun(embed: Embed, stuck: Upstream) -> None:
    stuck.script(reply(429, b"", retry_after="5"))
    answer = embed("a", "dawdling")
    assert envelope(answer, 429)["code"] == "rate_limit_exceeded"
    assert answer.headers["retry-after"] == "5"
    assert len(stuck.calls) == 1


def test_a_whole_request_has_an_end(embed: Embed, stuck: Upstream) -> None:
    stuck.script(*[hang] * 50)
    error = envelope(embed(["a"] * 33, "dawdling"), 503)  # two calls, each with ten retries
    assert error["code"] == "upstream_unavailable"
    assert 2 <= len(stuck.calls) <= 6


def test_an_upstream_that_hangs_holds_up_no_other(client: httpx.Client, upstream: Upstream, stuck: Upstream) -> None:
    upstream.script()
    stuck.script(*[hang] * 200)

    async def crowd() -> tuple[list[httpx.Response], httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=client.base_url, headers=client.headers, limits=limits) as clients:
            body = {"model": "hanging", "input": ["a"] * 33}  # two calls each
            sent = [asyncio.ensure_future(clients.post("/v1/embeddings", json=body, timeout=30)) for _ in range(70)]
            refused = [await one for one in islice(asyncio.as_completed(sent, timeout=20), 6)]
            other = await clients.post("/v1/embeddings", json={"model": SMALL, "input": "a"}, timeout=20)
            waiting = [one for one in sent if not one.done()]
            assert len(waiting) == 64
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        return refused, other

    refused, other = asyncio.run(crowd())
    assert {envelope(answer, 503)["code"] for answer in refused} == {"overloaded"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert np.array_equal(vectors(other), [vector_of("a", 1536)])
    stuck.script()
    body = {"model": "hanging", "input": "a"}
    assert eventually(lambda: client.post("/v1/embeddings", json=body).status_code == 200), (
        "those that gave up made room"
    )


@pytest.mark.parametrize("what", ["500", "a reset", "an answer that is cut short"])
def test_what_does_not_pass_is_a_503_in_the_end(embed: Embed, upstream: Upstream, what: str) -> None:
    upstream.script(*[PASSING[what]] * 10)
    answer = embed("a", "ours/little")
    error = envelope(answer, 503)
    assert (error["type"], error["code"]) == ("server_error", "upstream_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
    assert len(upstream.calls) == 2, "the call, and the one retry that is set"


def test_nobody_is_there(embed: Embed) -> None:
    assert envelope(embed("a", "unreachable"), 503)["code"] == "upstream_unavailable"


def test_a_limit_that_stays_is_told_to_the_client(embed: Embed, upstream: Upstream) -> None:
    upstream.script(*[PASSING["429"]] * 2)
    answer = embed("a", "ours/little")
    assert envelope(answer, 429)["code"] == "rate_limit_exceeded"
    assert int(answer.headers["retry-after-ms"]) == 10


def test_an_upstream_that_asks_for_an_hour_gets_it(embed: Embed, upstream: Upstream) -> None:
    upstream.script(reply(429, b"", retry_after="86400"))
    answer = embed("a")
    assert envelope(answer, 429)["code"] == "rate_limit_exceeded"
    assert answer.headers["retry-after"] == "3600", "no more than an hour is believed"
    assert len(upstream.calls) == 1


def test_retry_after_is_waited_for(embed: Embed, upstream: Upstream) -> None:
    upstream.script(reply(429, b"", retry_after="2"))
    assert embed("a").status_code == 200
    first, second = upstream.calls
    assert second.began - first.began >= 2


# What the upstream finds wrong with a request


@pytest.mark.parametrize(
    ("status", "body", "message", "param", "code"),
    [
        (400, {"error": {"message": "Too\nbig", "type": "x", "param": "input", "code": "c"}}, "Too big", "input", None),
        (400, {"error": {"message": "x", "code": "context_length_exceeded"}}, "x", None, "context_length_exceeded"),
        (400, {"error": {"message": "x", "param": UPSTREAM_KEY, "code": UPSTREAM_KEY}}, "x", None, None),
        (400, {"error": {"message": "no", "param": 3, "code": 1214}}, "no", None, None),
        (413, {"error": "batch size 40 > 32", "error_type": "Validation"}, "batch size 40 > 32", None, None),
        (422, {"detail": "inputs must not be empty"}, "inputs must not be empty", None, None),
        (400, {"message": "wrong", "code": "E1"}, "wrong", None, None),
        (400, {"error": {"message": f"key {UPSTREAM_KEY}\x1b[2J\x00 is bad"}}, "key … [2J is bad", None, None),
    ],
)  # fmt: skip
def test_a_refusal_is_passed_on_in_our_envelope(
    embed: Embed, upstream: Upstream, status: int, body: object, message: str, param: str | None, code: str | None
) -> None:
    upstream.script(reply(status, body))
    error = envelope(embed("a"), 400)
    assert error == {"message": message, "type": "invalid_request_error", "param": param, "code": code}
    assert len(upstream.calls) == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'{"error":null}', b'{"detail":[{"loc":["body"]}]}', b"\xff"])
def test_a_refusal_without_a_reason(embed: Embed, upstream: Upstream, body: bytes) -> None:
    upstream.script(reply(400, body))
    assert "refuses the request with status 400" in envelope(embed("a"), 400)["message"]


def test_a_refusal_as_long_as_a_book_is_cut(embed: Embed, upstream: Upstream) -> None:
    upstream.script(reply(400, {"error": {"message": "x" * 10_000}}))
    assert len(envelope(embed("a"), 400)["message"]) == 1001


def test_a_refusal_of_a_part_says_which(embed: Embed, upstream: Upstream) -> None:
    def pedantic(call: Call) -> None:
        if call.body["input"] == ["c", "d"]:
            eventually(lambda: len(upstream.calls) == 3)  # or one that is given up would come in the next test
            call.answer(400, b'{"error":{"message":"input[1] is bad."}}')
        else:
            answer_well(call)

    upstream.script(*[pedantic] * 3)
    message = envelope(embed(["a", "b", "c", "d", "e"], "ours/little"), 400)["message"]
    assert message == "input[1] is bad. (This is about a part of the request: input[2] to input[3].)"


def test_one_call_that_fails_gives_up_the_others(embed: Embed, upstream: Upstream) -> None:
    def one_of_them(call: Call) -> None:
        if call.body["input"] == ["c", "d"]:
            eventually(lambda: len(upstream.calls) == 3)
            call.answer(400, b'{"error":{"message":"no"}}')
        else:
            call.hang()

    upstream.script(*[one_of_them] * 3)
    assert envelope(embed(["a", "b", "c", "d", "e"], "ours/little"), 400)
    assert all(call.gone.wait(10) for call in upstream.calls if call.body["input"] != ["c", "d"])


def test_a_client_that_hangs_up_ends_the_call(client: httpx.Client, upstream: Upstream) -> None:
    upstream.script(hang)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/embeddings", json={"model": "ours/little", "input": "a"}, timeout=2)
    [call] = upstream.calls
    assert call.gone.wait(10), "long before the call itself would end"


# What is told of it


def test_relayed_models_are_listed(client: httpx.Client) -> None:
    names = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert names == [
        SMALL, "text-embedding-ada-002", "Baichuan-Text-Embedding", "zhipu-embedding-2", "ours/little", "hasty",
        "dawdling", "hanging", "unreachable", "small-256",
    ]  # fmt: skip
    listed = {model["id"]: model for model in client.get("/v1/embedding-models").json()["data"]}
    assert list(listed) == names
    small = listed[SMALL]
    assert (small["owned_by"], small["backend"], small["loaded"], small["device"]) == ("openai", "relay", True, None)
    assert (small["dimensions"], small["max_dimensions"], small["supports_dimensions"]) == (1536, 1536, True)
    assert small["pricing"] == {"per_million_tokens": 0.02, "currency": "USD"}
    assert listed["ours/little"]["max_tokens"] == 10
    assert listed["ours/little"]["pricing"]["currency"] == "CNY"
    alias = listed["small-256"]
    assert (alias["alias_of"], alias["dimensions"], alias["max_dimensions"]) == (SMALL, 256, 1536)
    assert alias["pricing"] == {"per_million_tokens": 0.5, "currency": "EUR"}


def test_an_alias_of_a_relayed_model_asks_for_its_dimensions(embed: Embed, upstream: Upstream) -> None:
    assert np.array_equal(vectors(embed("a", "SMALL-256")), [vector_of("a", 256)])
    assert vectors(embed("a", "small-256", dimensions=1536)).shape == (1, 1536)
    assert [call.body["model"] for call in upstream.calls] == [SMALL, SMALL]


def test_short_names_mean_relayed_models_too(embed: Embed) -> None:
    answer = embed("a", "LITTLE")
    assert answer.json()["model"] == answer.headers["openai-model"] == "ours/little"


def test_relayed_requests_are_counted(embed: Embed, client: httpx.Client) -> None:
    def tokens() -> float:
        found = re.search(r'^embedserve_tokens_total\{model="text-embedding-3-small"\} (.+)$', metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def metrics() -> str:
        return client.get("/metrics").text

    before = tokens()
    assert embed("12345", "small-256").status_code == 200
    assert eventually(lambda: tokens() == before + 5)
    assert "small-256" not in metrics(), "an alias is no model of its own"


def test_a_server_that_only_relays_has_no_engine(relaying: RunningServer) -> None:
    assert relaying.children("engine") == []
    assert relaying.children("front end")


def test_no_log_line_holds_a_key_or_a_text(relaying: RunningServer, embed: Embed, upstream: Upstream) -> None:
    upstream.script(PASSING["500"], UNUSABLE["401"][0])
    assert embed("a text that nobody may read").status_code == 502
    lines = [json.loads(line) for line in relaying.log().splitlines()]
    assert any(line["logger"] == "embedserve.relay" and line.get("reason") == "status 500" for line in lines)
    for secret in (UPSTREAM_KEY, CLIENT_KEY, "nobody may read"):
        assert secret not in relaying.log()


# With nothing configured


@pytest.mark.parametrize("name", [*CLOSED, "TEXT-EMBEDDING-3-LARGE"])
def test_the_404_of_a_closed_model_says_what_to_do(server: RunningServer, name: str) -> None:
    error = envelope(server.embed("a", model=name), 404)
    assert error["message"].startswith(f"The model `{name}` does not exist or you do not have access to it. ")
    assert f'[upstreams."{name}"]' in error["message"]
    assert "[aliases]" in error["message"]
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_without_an_upstream_nothing_is_connected_to(server: RunningServer) -> None:
    assert server.embed("a").status_code == 200
    assert server.embed("a", model=SMALL).status_code == 404
    supervisor = psutil.Process(server.process.pid)
    port = int(server.url.rpartition(":")[2])
    for process in (supervisor, *supervisor.children(recursive=True)):
        connections = process.net_connections(kind="inet")
        assert {one.laddr.port for one in connections if one.laddr} <= {port}, connections
