"""Whatever a client sends, it gets an envelope, and everyone else their vectors."""

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator

import httpx
import numpy as np
import pytest

from tests.contract.helpers import MODEL, Connection, envelope, http_request, vectors
from tests.support import RunningServer


def body_with(text: str) -> bytes:
    """A request whose input is this piece of JSON, as it stands."""
    return f'{{"model": "{MODEL}", "input": {text}}}'.encode()


GOOD = body_with('"a"')


@pytest.fixture(scope="module", autouse=True)
def unharmed(server: RunningServer, http: httpx.Client) -> Iterator[None]:
    """After all of it the same processes give the same vector."""
    names = ("broker", "engine", "front end")
    before = {name: [child.pid for child in server.children(name)] for name in names}
    vector = vectors(http.post("/v1/embeddings", content=GOOD))
    log = len(server.log())
    yield
    assert {name: [child.pid for child in server.children(name)] for name in names} == before
    assert np.abs(vectors(http.post("/v1/embeddings", content=GOOD)) - vector).max() <= 1e-6
    assert "exception" not in server.log()[log:]


def talk(server: RunningServer, data: bytes, *, status: int = 400) -> None:
    """Send bytes over a connection of their own: the first answer is an envelope of this status."""
    with Connection(server.url) as connection:
        connection.send(data)
        envelope(connection.answer(), status)


# Text that is none


@pytest.mark.parametrize(
    "text",
    [
        rb'"\ud800"', rb'"\udc00"', rb'"\udc00\ud800"', rb'"a\ud83d"', rb'["fine", "\ud800"]',
        b'"\xed\xa0\x80"', b'"\xff"', b'"\xc3"', b'"\xc0\x80"', b'"\xf8\x88\x80\x80\x80"', b'"a\x00"', b'"a\nb"',
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("field", ["input", "model", "prompt", "user", "encoding_format"])
def test_text_that_is_no_unicode(http: httpx.Client, field: str, text: bytes) -> None:
    fields = {"model": json.dumps(MODEL).encode(), "input": b'"a"', field: text}
    body = b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in fields.items()) + b"}"
    error = envelope(http.post("/v1/embeddings", content=body), 400)
    assert error["message"].startswith("We could not parse the JSON body of your request.")


@pytest.mark.parametrize(
    "text",
    ["\0", "a\0b", "\x01\x1f\x7f", "\ufffe\uffff", "\u202e", "\ufeff", " ", "\n" * 1000, "🏳️‍🌈", "\u0301" * 1000],
    ids=ascii,
)
def test_odd_text_is_text(http: httpx.Client, text: str) -> None:
    assert np.isfinite(vectors(http.post("/v1/embeddings", json={"model": MODEL, "input": text}))).all()


# Fields of a wrong type

STRING, OBJECT = "x", {"a": {"b": [None]}}
WRONG = {
    "model": [7, 1.5, True, [], [MODEL], OBJECT],
    "input": [7, 1.5, True, OBJECT, [OBJECT], [None], [["a"]], [[["a"]]], [[1], "a"], [1, [1]], [[1, -1]], [2**31]],
    "encoding_format": [7, 1.5, True, [], ["float"], OBJECT, "", "FLOAT", "float "],
    "dimensions": ["384", 384.5, True, [], [384], OBJECT, -(2**63), 2**64, 1e300],
    "user": [7, 1.5, True, [], ["a"], OBJECT],
    "input_type": [7, 1.5, True, [], ["query"], OBJECT, "", "nonsense"],
    "task": [7, 1.5, True, [], ["query"], OBJECT, "", "nonsense"],
    "prompt_name": [7, 1.5, True, [], ["query"], OBJECT, "", "nonsense"],
    "prompt": [7, 1.5, True, [], ["a"], OBJECT],
    "instruction": [7, 1.5, True, [], ["a"], OBJECT],
    "outputs": [7, 1.5, True, [], "dense", [7], ["nonsense"], ["dense", "dense"], [["dense"]], [{}], OBJECT],
    "truncate": [7, 1.5, [], ["END"], OBJECT, "", "nonsense"],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]], ids=str)
def test_a_field_of_a_wrong_type(http: httpx.Client, field: str, value: object) -> None:
    error = envelope(http.post("/v1/embeddings", json={"model": MODEL, "input": "a", field: value}), 400)
    assert error["param"] == field or (field == "input" and error["param"] is None)


def test_a_long_list_of_outputs_holds_nobody_up(http: httpx.Client, server: RunningServer) -> None:
    before = [process.pid for process in server.children("front end")]
    body = {"model": MODEL, "input": "a", "outputs": list(range(60_000))}
    assert envelope(http.post("/v1/embeddings", json=body), 400)["param"] == "outputs"
    # Compared each with each they took longer than a front end may be silent.
    assert [process.pid for process in server.children("front end")] == before


@pytest.mark.parametrize("field", WRONG)
@pytest.mark.parametrize("depth", [200, 500, 1000])
def test_a_field_nested_deep(http: httpx.Client, field: str, depth: int) -> None:
    body = f'{{"model": "{MODEL}", "input": "a", "{field}": {"[" * depth + "]" * depth}}}'.encode()
    envelope(http.post("/v1/embeddings", content=body), 400)


@pytest.mark.parametrize("field", [name for name in WRONG if name not in ("user", "prompt", "input")])
def test_a_field_of_a_million_characters_is_not_sent_back(http: httpx.Client, field: str) -> None:
    answer = http.post("/v1/embeddings", json={"model": MODEL, "input": "a", field: "é" * 1_000_000})
    envelope(answer, 404 if field == "model" else 400)
    assert len(answer.content) < 2000


# JSON that is none, or odd


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-", "01", "0x10", "1" * 5000, "tru"])
@pytest.mark.parametrize("field", ["input", "dimensions", "x"])
def test_numbers_that_are_none(http: httpx.Client, field: str, literal: str) -> None:
    body = f'{{"model": "{MODEL}", "input": "a", "{field}": {literal}}}'.encode()
    answer = http.post("/v1/embeddings", content=body)
    if field == "x" and literal == "1" * 5000 and answer.status_code == 200:
        return  # a number that is too large for anyone, in a field that nobody reads
    envelope(answer, 400)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"input":' * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    ],
    ids=["open arrays", "arrays", "open objects", "objects"],
)
def test_json_nested_a_hundred_thousand_deep(http: httpx.Client, body: bytes) -> None:
    envelope(http.post("/v1/embeddings", content=body), 400)


def test_of_a_key_given_twice_one_is_taken(http: httpx.Client) -> None:
    body = b'{"model": "x", "input": "other", "model": "%b", "input": "a"}' % MODEL.encode()
    assert vectors(http.post("/v1/embeddings", content=body)).shape == (1, 384)


def test_ten_million_characters_are_dealt_with_within_seconds(http: httpx.Client) -> None:
    for text in ("book " * 2_000_000, "语" * 10_000_000):
        answer = http.post("/v1/embeddings", content=body_with(f'"{text}"'), timeout=10)
        assert envelope(answer, 400)["message"].startswith("This model's maximum context length is 256 tokens")
    # A word or a gap without an end is a token at most to this model.
    for character in ("a", " "):
        answer = http.post("/v1/embeddings", content=body_with(f'"{character * 900_000}"'), timeout=10)
        assert answer.json()["usage"]["prompt_tokens"] <= 3
        # Told from a text of words only by reading it all, which has its bound.
        answer = http.post("/v1/embeddings", content=body_with(f'"{character * 10_000_000}"'), timeout=10)
        assert "would have to be read whole" in envelope(answer, 400)["message"]


def test_a_body_of_40_mb(http: httpx.Client) -> None:
    body = body_with('"' + "a" * 40_000_000 + '"')
    envelope(http.post("/v1/embeddings", content=body), 413)
    envelope(http.post("/v1/embeddings", content=iter([body[:20_000_000], body[20_000_000:]])), 413)


# gzip


def as_gzip(http: httpx.Client, body: bytes) -> httpx.Response:
    return http.post("/v1/embeddings", content=body, headers={"content-encoding": "gzip"})


def test_a_gzip_bomb_is_not_unpacked(http: httpx.Client) -> None:
    packer = zlib.compressobj(9, wbits=31)
    pieces = [packer.compress(b"[" * (1 << 20)) for _ in range(256)]
    bomb = b"".join([*pieces, packer.flush()])
    assert len(bomb) < 1 << 20
    envelope(as_gzip(http, bomb), 413)


def test_a_bomb_of_many_small_members(http: httpx.Client) -> None:
    envelope(as_gzip(http, gzip.compress(b" " * (1 << 20)) * 100), 413)


def test_a_flood_of_empty_members_holds_nobody_up(server: RunningServer, http: httpx.Client) -> None:
    with Connection(server.url) as connection:
        flood = gzip.compress(b"") * 400_000  # 8 MB
        connection.send(http_request(flood, headers={"content-encoding": "gzip"}))
        assert vectors(http.post("/v1/embeddings", content=GOOD, timeout=5)).shape == (1, 384)
        envelope(connection.answer(), 400)


def test_members_one_after_the_other_are_one_body(http: httpx.Client) -> None:
    packed = gzip.compress(GOOD[:10]) + gzip.compress(b"") + gzip.compress(GOOD[10:])
    assert vectors(as_gzip(http, packed)).shape == (1, 384)


def _flipped(data: bytes) -> bytes:
    return data[:-6] + bytes([data[-6] ^ 1]) + data[-5:]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:5],
        lambda data: data + b"and more",
        lambda data: data + data[:12],
        lambda data: data[10:],
        lambda _: GOOD,
        lambda _: zlib.compress(GOOD),
        lambda _: random.Random(7).randbytes(10_000),
        lambda _: b"\x1f\x8b" + random.Random(7).randbytes(10_000),
        lambda _: b"\x1f",
        lambda _: b"",
        _flipped,
    ],
    ids=[
        "cut by one", "half", "half a head", "with a tail", "and half a member", "without a head", "not packed", "zlib",
        "noise", "noise with a head", "a byte", "nothing", "a wrong checksum",
    ],
)  # fmt: skip
def test_broken_gzip(http: httpx.Client, spoil: Callable[[bytes], bytes]) -> None:
    envelope(as_gzip(http, spoil(gzip.compress(GOOD))), 400)


# HTTP that is none, or odd


@pytest.mark.parametrize(
    "length", ["-1", "-0", "+1", "1e3", "0x10", "abc", "", " ", "99999999999999999999", "1, 1", "1 1"]
)
def test_a_content_length_that_is_none(server: RunningServer, length: str) -> None:
    if length in ("99999999999999999999",):
        # As a number it is only too large; some parsers cannot hold it.
        with Connection(server.url) as connection:
            connection.send(http_request(GOOD, headers={"content-length": length}))
            answer = connection.answer()
            envelope(answer, answer.status_code)
            assert answer.status_code in (400, 413)
        return
    talk(server, http_request(GOOD, headers={"content-length": length}))


def test_a_content_length_of_an_exabyte(server: RunningServer) -> None:
    talk(server, http_request(GOOD, headers={"content-length": str(10**18)}), status=413)


@pytest.mark.parametrize("second", ["7", str(len(GOOD))])
def test_two_content_lengths(server: RunningServer, second: str) -> None:
    head = http_request(GOOD, headers={"content-length": str(len(GOOD)), "Content-Length": second})
    talk(server, head)


def test_a_length_and_chunks_at_once(server: RunningServer) -> None:
    # Two servers in a row may take such a request for two different ones: request smuggling.
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD)
    talk(server, http_request(body, headers={"content-length": str(len(body)), "transfer-encoding": "chunked"}))


@pytest.mark.parametrize(
    "body",
    [b"nonsense\r\n", b"-5\r\nhello\r\n", b"5\r\nhel", b"ffffffffffffffffff\r\n", b"5\r\nhelloworld\r\n", b"\r\n\r\n"],
    ids=repr,
)
def test_chunks_of_garbage(server: RunningServer, body: bytes) -> None:
    body += b"0\r\n\r\n" if body == b"5\r\nhel" else b""
    talk(server, http_request(body, headers={"transfer-encoding": "chunked"}))


def test_a_transfer_encoding_that_nobody_knows(server: RunningServer) -> None:
    talk(server, http_request(GOOD, headers={"transfer-encoding": "gzip"}))


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"FETCH /v1/models HTTP/1.1\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nno colon\r\n\r\n", b"GET /v1/models HTTP/1.1\r\nna me: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nname: a\x00b\r\n\r\n", b"GET /v1/mod\xc3\xa9ls HTTP/1.1\r\nhost: a\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        random.Random(7).randbytes(2000),
    ],
    ids=[
        "a word", "half a line", "HTTP/9.9", "a method", "no colon", "a blank in a name", "NUL", "a path in UTF-8",
        "TLS", "HTTP/2", "noise",
    ],
)  # fmt: skip
def test_what_is_no_http(server: RunningServer, data: bytes) -> None:
    with Connection(server.url) as connection:
        connection.send(data)
        answer = connection.answer()
        # A path in UTF-8 may be taken for what it is: one that does not exist.
        assert answer.status_code in (400, 404)
        envelope(answer, answer.status_code)


@pytest.mark.parametrize("host", ["[", "a b", "", "::::", "[::1", "x/y?z#", "\xff\xfe", "a" * 5000])
def test_an_odd_host_is_nobody_s_business(server: RunningServer, host: str) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(GOOD, headers={"host": host}))
        assert connection.answer().status_code in (200, 400)
    with Connection(server.url) as connection:
        connection.send(http_request(GOOD, path="/nowhere", headers={"host": host}))
        answer = connection.answer()
        assert answer.status_code in (400, 404)
        assert answer.status_code == 400 or "(POST /nowhere)" in answer.text
        envelope(answer, answer.status_code)


@pytest.mark.parametrize(
    "path", ["/%00", "/%ff%fe", "/%ed%a0%80", "/%", "/%zz", "/a%0d%0ab", "/" + "a" * 5000, "/../../etc"]
)
def test_odd_paths(server: RunningServer, path: str) -> None:
    talk(server, http_request(GOOD, path=path), status=404)


def test_a_header_of_a_megabyte(server: RunningServer) -> None:
    talk(server, http_request(GOOD, headers={"x-padding": "a" * (1 << 20)}))


def test_ten_thousand_headers(server: RunningServer) -> None:
    talk(server, http_request(GOOD, headers={f"x-padding-{n}": "a" for n in range(10_000)}))


def test_a_url_of_a_megabyte(server: RunningServer) -> None:
    talk(server, http_request(GOOD, path="/" + "a" * (1 << 20)))


def test_a_head_without_an_end_is_cut_off(server: RunningServer) -> None:
    # No line of it ever ends, so a parser that waits for whole lines would keep it all.
    with Connection(server.url) as connection:
        connection.send(b"GET /health HTTP/1.1\r\nx-padding: ")
        for _ in range(16):
            connection.send(b"a" * (1 << 20))
        envelope(connection.answer(), 400)


def test_an_unfinished_body_and_gone(server: RunningServer, http: httpx.Client) -> None:
    for _ in range(50):
        with Connection(server.url) as connection:
            connection.send(http_request(GOOD[:20], headers={"content-length": str(len(GOOD))}))
    with Connection(server.url) as connection:
        connection.send(b"POST /v1/embeddings HTTP/1.1\r\nhost: ")
    assert vectors(http.post("/v1/embeddings", content=GOOD)).shape == (1, 384)


def test_http_1_0(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(GOOD).replace(b"HTTP/1.1", b"HTTP/1.0"))
        answer = connection.answer()
        assert answer.status_code == 200
        assert len(json.loads(answer.content)["data"][0]["embedding"]) == 384
        assert connection.ends()


def test_pipelined_requests_are_answered_in_order(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        texts = ["a", "two words", "", "tree " * 200, "b"]
        # Written at once, before any answer is read
        connection.send(b"".join(http_request(body_with(json.dumps(text))) for text in texts))
        answers = [connection.answer() for _ in texts]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 200, 200]
    tokens = [json.loads(answer.content)["usage"]["prompt_tokens"] for answer in answers if answer.status_code == 200]
    assert tokens == [3, 4, 202, 3]


def test_garbage_behind_a_request_takes_nothing_from_other_connections(
    server: RunningServer, http: httpx.Client
) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(GOOD) + b"garbage\r\n\r\n")
        assert connection.answer().status_code == 200, "the first request's own answer"
        assert connection.ends()
    assert vectors(http.post("/v1/embeddings", content=GOOD)).shape == (1, 384)


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "nonsense"])
@pytest.mark.parametrize("connection", ["Upgrade", "keep-alive, Upgrade", "Upgrade, HTTP2-Settings"])
def test_an_offer_of_another_protocol_is_passed_over(server: RunningServer, protocol: str, connection: str) -> None:
    # Java's HTTP client offers h2c on its first request, and then goes on with the same connection.
    offer = {"connection": connection, "upgrade": protocol, "http2-settings": "AAEAAEAAAAIAAAABAAMAAABk"}
    with Connection(server.url, seconds=10) as client:
        client.send(http_request(GOOD, headers=offer))
        assert client.answer().status_code == 200
        request = http_request(
            b"%x\r\n%b\r\n0\r\n\r\n" % (len(GOOD), GOOD), headers={**offer, "transfer-encoding": "chunked"}
        )
        for place in range(0, len(request), 50):
            client.send(request[place : place + 50])
        assert client.answer().status_code == 200
        client.send(http_request(GOOD))
        assert client.answer().status_code == 200


def test_it_is_no_proxy(server: RunningServer) -> None:
    talk(server, b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org:443\r\n\r\n")
    with Connection(server.url) as connection:
        connection.send(http_request(GOOD, path="http://example.org/v1/nowhere"))
        answer = connection.answer()
        assert answer.status_code in (400, 404)
        envelope(answer, answer.status_code)


def test_expect_100_continue(server: RunningServer) -> None:
    # curl asks so before a body of more than a megabyte.
    with Connection(server.url, seconds=10) as connection:
        request = http_request(GOOD, headers={"expect": "100-continue"})
        connection.send(request[: -len(GOOD)])
        assert connection.interim() == 100
        connection.send(GOOD)
        assert connection.answer().status_code == 200


def test_a_body_too_large_is_not_waited_for(server: RunningServer) -> None:
    with Connection(server.url, seconds=10) as connection:
        connection.send(http_request(headers={"expect": "100-continue", "content-length": str(100 << 20)}))
        envelope(connection.answer(), 413)  # and not 100, go on


def test_a_long_prompt_is_refused_before_it_is_put_before_every_text(http: httpx.Client) -> None:
    answer = http.post("/v1/embeddings", json={"model": MODEL, "input": ["a"] * 2048, "prompt": "p" * 1_000_000})
    assert envelope(answer, 400)["param"] == "prompt"


def test_a_body_of_millions_of_values_is_refused_unread(http: httpx.Client) -> None:
    body = body_with('"a"')[:-1] + b',"x":[' + b"[[]]," * 3_000_000 + b"0]}"
    assert "values" in envelope(http.post("/v1/embeddings", content=body), 400)["message"]


def test_a_text_of_millions_of_commas_is_one_value(http: httpx.Client) -> None:
    texts = json.dumps({"model": MODEL, "input": 'ab, [c] , {"d"} \\, ' * 400_000, "truncate": "END"})
    answer = http.post("/v1/embeddings", content=texts.encode())
    assert answer.status_code == 200, answer.text
    assert answer.headers["x-truncated-inputs"] == "1"


def test_a_client_that_waits_to_send_its_body_is_told_to_hang_up(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(headers={"expect": "100-continue", "content-length": "99999999"}))
        answer = connection.answer()
        assert answer.status_code == 413
        assert answer.headers["connection"] == "close"
        assert connection.ends()


def test_a_trailer_is_no_header_and_has_its_bound(server: RunningServer) -> None:
    head = {"transfer-encoding": "chunked", "content-type": "application/json"}
    body = body_with('"a"')
    chunk = b"%x\r\n%b\r\n0\r\n" % (len(body), body)
    with Connection(server.url) as connection:
        connection.send(http_request(headers=head) + chunk + b"x-request-id: from-a-trailer\r\n\r\n")
        answer = connection.answer()
        assert answer.status_code == 200
        assert answer.headers["x-request-id"].startswith("req_")
    with Connection(server.url) as connection:
        connection.send(http_request(headers=head) + chunk + b"x-endless: ")
        connection.send(b"x" * 1_000_000)
        assert connection.answer().status_code == 400


def test_a_connection_that_asks_and_asks_without_reading_is_ended(server: RunningServer) -> None:
    with Connection(server.url) as connection:
        connection.send(http_request(method="GET", path="/health") * 200)
        assert connection.answer().status_code == 200
        assert connection.ends()
