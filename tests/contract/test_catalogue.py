"""The names of the hosted service that this server replaces: each that can run here gives its model's own vectors.

Checkpoints have random weights, the true widths and one layer; see tests/checkpoints.py for what is compared with. The
five names that cannot run here are those of test_aliases.py and tests/server/test_relay.py.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from torch import Tensor

from tests import checkpoints
from tests.support import RunningServer

# Name at the hosted service → id here, size of the vectors.
NAMES = {
    "BAAI/bge-m3": ("BAAI/bge-m3", 1024),
    "jina-clip-v1": ("jinaai/jina-clip-v1", 768),
    "BAAI/bge-large-en-v1.5": ("BAAI/bge-large-en-v1.5", 1024),
    "BAAI/bge-large-zh-v1.5": ("BAAI/bge-large-zh-v1.5", 1024),
    "jina-embeddings-v2-base-en": ("jinaai/jina-embeddings-v2-base-en", 768),
    "jina-embeddings-v2-base-de": ("jinaai/jina-embeddings-v2-base-de", 768),
    "jina-embeddings-v2-base-zh": ("jinaai/jina-embeddings-v2-base-zh", 768),
    "jina-embeddings-v2-base-es": ("jinaai/jina-embeddings-v2-base-es", 768),
    "jina-embeddings-v2-base-code": ("jinaai/jina-embeddings-v2-base-code", 768),
    "netease-youdao/bce-embedding-base_v1": ("netease-youdao/bce-embedding-base_v1", 768),
    "Qwen/Qwen3-Embedding-0.6B": ("Qwen/Qwen3-Embedding-0.6B", 1024),
}
TEXTS = [
    "What is a search engine?",
    "Große Städte",
    "你好，世界。",
    "x",
    "def f(): return 1  " * 12,
    "search engine " * 40,
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for model, _ in NAMES.values():
        checkpoints.write(model, folder)
    return folder


@pytest.fixture(scope="module")
def catalogue(models_dir: Path) -> Iterator[RunningServer]:
    """A server with all of them. The bound is given, so that none is measured for seconds at the start."""
    names = [option for name in NAMES for option in ("--model", name)]
    options = ["--rate-limit", "0", "--max-batch-tokens", "1024", "--models-dir", str(models_dir)]
    with RunningServer(*options, *names, wait=False) as running:
        running.wait_ready(180)
        yield running


def embed(server: RunningServer, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/embeddings", json=fields, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def vectors_of(answer: dict[str, Any]) -> Tensor:
    return torch.tensor([item["embedding"] for item in answer["data"]], dtype=torch.float64)


def ids_of(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_gives_its_models_vectors(catalogue: RunningServer, models_dir: Path, name: str) -> None:
    model, dimensions = NAMES[name]
    ids = ids_of(models_dir / model, TEXTS)
    answer = embed(catalogue, model=name, input=TEXTS)
    found = vectors_of(answer)
    assert found.shape == (len(TEXTS), dimensions)
    assert (found - checkpoints.expected(model, models_dir / model, ids)).norm(dim=1).max() < TOLERANCE
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("name", NAMES)
def test_any_form_of_a_name_means_the_model(catalogue: RunningServer, name: str) -> None:
    model, _ = NAMES[name]
    forms = {name, model, model.rpartition("/")[2], model.upper(), name.swapcase()}
    if model.startswith("netease"):
        forms.add("maidalun1020/bce-embedding-base_v1")
    answers = [embed(catalogue, model=form, input="one text") for form in forms]
    assert all(answer["data"] == answers[0]["data"] for answer in answers)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_alone_is_the_same_as_among_others(catalogue: RunningServer, name: str) -> None:
    together = vectors_of(embed(catalogue, model=name, input=TEXTS[::-1]))
    alone = torch.cat([vectors_of(embed(catalogue, model=name, input=text)) for text in TEXTS[::-1]])
    assert (together - alone).abs().max() < TOLERANCE


def test_discovery_says_what_each_is(catalogue: RunningServer) -> None:
    listed = httpx.get(f"{catalogue.url}/v1/embedding-models").json()["data"]
    found = {item["id"]: (item["dimensions"], item["max_tokens"], item["loaded"]) for item in listed}
    tokens = {"BAAI/bge-m3": 8192, "Qwen/Qwen3-Embedding-0.6B": 32768}
    tokens |= {model: 512 for model in found if "bge-large" in model or "bce" in model}
    assert found == {model: (size, tokens.get(model, 8192), True) for model, size in NAMES.values()}


# --- bge-m3's three outputs -------------------------------------------------------------------------------------------

M3 = "BAAI/bge-m3"


def test_three_outputs_of_one_pass(catalogue: RunningServer, models_dir: Path) -> None:
    texts = ["the search engine is the search engine", "x", TEXTS[5]]
    ids = ids_of(models_dir / M3, texts)
    states = checkpoints.states_of_transformers(models_dir / M3, ids)
    heads = checkpoints.heads_of(models_dir / M3)
    answer = embed(catalogue, model=M3, input=texts, outputs=["dense", "sparse", "colbert"])
    dense = vectors_of(answer)
    for item, row, text, vector in zip(answer["data"], ids, states, dense, strict=True):
        assert (vector - torch.nn.functional.normalize(text[0], dim=0)).norm() < TOLERANCE
        weights = (text @ heads["sparse"]["weight"][0] + heads["sparse"]["bias"]).clamp_min(0)
        expected: dict[int, float] = {}
        for token, weight in zip(row, weights.tolist(), strict=True):
            if token > 3 and weight > 0:
                expected[token] = max(expected.get(token, 0.0), weight)
        sparse = item["sparse_embedding"]
        assert sparse["indices"] == sorted(expected)
        assert np.allclose(sparse["values"], [expected[token] for token in sparse["indices"]], atol=1e-4)
        colbert = torch.nn.functional.normalize(text[1:] @ heads["colbert"]["weight"].T + heads["colbert"]["bias"])
        assert (torch.tensor(item["colbert_embedding"]) - colbert).norm(dim=1).max() < TOLERANCE


def test_only_what_is_asked_for_is_answered(catalogue: RunningServer) -> None:
    usual = embed(catalogue, model=M3, input="a text")
    assert set(usual["data"][0]) == {"object", "index", "embedding"}
    sparse = embed(catalogue, model=M3, input="a text", outputs=["sparse"])
    assert set(sparse["data"][0]) == {"object", "index", "sparse_embedding"}
    both = embed(catalogue, model=M3, input="a text", outputs=["colbert", "dense"])
    assert both["data"][0]["embedding"] == usual["data"][0]["embedding"]
    assert both["usage"] == usual["usage"]


def test_vectors_of_tokens_as_base64_have_their_shape_beside_them(catalogue: RunningServer) -> None:
    plain = embed(catalogue, model=M3, input=["a text", "another"], outputs=["colbert"])
    packed = embed(catalogue, model=M3, input=["a text", "another"], outputs=["colbert"], encoding_format="base64")
    for item, other in zip(plain["data"], packed["data"], strict=True):
        found = other["colbert_embedding"]
        vectors = np.frombuffer(base64.b64decode(found["data"]), "<f4").reshape(found["shape"])
        assert np.array_equal(vectors, np.array(item["colbert_embedding"], dtype=np.float32))


def test_requests_with_other_outputs_share_batches_and_nothing_else(catalogue: RunningServer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    asked = [["dense"], ["sparse"], ["colbert"], ["dense", "sparse"], ["dense", "sparse", "colbert"]] * 4
    alone = [embed(catalogue, model=M3, input=TEXTS[:4], outputs=outputs)["data"] for outputs in asked[:5]]

    def ask(outputs: list[str]) -> Any:
        return embed(catalogue, model=M3, input=TEXTS[:4], outputs=outputs)["data"]

    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(ask, asked))
    for outputs, found, expected in zip(asked, together, alone * 4, strict=True):
        for item, other in zip(found, expected, strict=True):
            assert set(item) == set(other)
            if "dense" in outputs:
                assert np.allclose(item["embedding"], other["embedding"], atol=TOLERANCE)
            if "sparse" in outputs:
                assert item["sparse_embedding"]["indices"] == other["sparse_embedding"]["indices"]
            if "colbert" in outputs:
                assert np.allclose(item["colbert_embedding"], other["colbert_embedding"], atol=TOLERANCE)


@pytest.mark.parametrize("name", [name for name in NAMES if name != M3])
def test_other_models_have_no_other_outputs(catalogue: RunningServer, name: str) -> None:
    body = {"model": name, "input": "a text", "outputs": ["dense", "sparse"]}
    response = httpx.post(f"{catalogue.url}/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "outputs"
    assert "['dense']" in response.json()["error"]["message"]


def test_a_vector_for_each_token_of_a_book_is_refused(catalogue: RunningServer) -> None:
    body = {"model": M3, "input": ["search engine " * 300] * 12, "outputs": ["colbert"]}
    response = httpx.post(f"{catalogue.url}/v1/embeddings", json=body, timeout=60)
    assert response.status_code == 400
    assert "16384" in response.json()["error"]["message"]


# --- Qwen3 ------------------------------------------------------------------------------------------------------------

QWEN3 = "Qwen/Qwen3-Embedding-0.6B"
RETRIEVAL = "Given a web search query, retrieve relevant passages that answer the query"


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"input_type": "query"}, f"Instruct: {RETRIEVAL}\nQuery:"),
        ({"task": "retrieval.query"}, f"Instruct: {RETRIEVAL}\nQuery:"),
        ({"instruction": "Find {code}"}, "Instruct: Find {code}\nQuery:"),
        ({"input_type": "document"}, ""),
        ({"prompt": "Q: "}, "Q: "),
        ({}, ""),
    ],
    ids=str,
)
def test_prompts_of_qwen3(catalogue: RunningServer, models_dir: Path, fields: dict[str, str], prompt: str) -> None:
    ids = ids_of(models_dir / QWEN3, [prompt + text for text in TEXTS[:2]])
    answer = embed(catalogue, model=QWEN3, input=TEXTS[:2], **fields)
    assert (vectors_of(answer) - checkpoints.expected(QWEN3, models_dir / QWEN3, ids)).norm(dim=1).max() < TOLERANCE
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))


@pytest.mark.parametrize("dimensions", [32, 33, 512, 1024])
def test_qwen3_is_cut_then_normalised(catalogue: RunningServer, dimensions: int) -> None:
    whole = vectors_of(embed(catalogue, model=QWEN3, input=TEXTS[:2]))
    cut = vectors_of(embed(catalogue, model=QWEN3, input=TEXTS[:2], dimensions=dimensions))
    assert (cut - torch.nn.functional.normalize(whole[:, :dimensions])).abs().max() < TOLERANCE
    assert ((cut.norm(dim=1) - 1).abs() < 1e-6).all()


@pytest.mark.parametrize("dimensions", [1, 31, 1025])
def test_qwen3_is_not_cut_to_what_it_was_not_trained_for(catalogue: RunningServer, dimensions: int) -> None:
    body = {"model": QWEN3, "input": "a text", "dimensions": dimensions}
    response = httpx.post(f"{catalogue.url}/v1/embeddings", json=body)
    assert response.status_code == 400
    assert "32 to 1024" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", [name for name in NAMES if name != QWEN3])
def test_the_others_are_not_cut_at_all(catalogue: RunningServer, name: str) -> None:
    body = {"model": name, "input": "a text", "dimensions": 256}
    response = httpx.post(f"{catalogue.url}/v1/embeddings", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "This model does not support specifying dimensions."


# --- jina-clip --------------------------------------------------------------------------------------------------------

CLIP = "jina-clip-v1"


def picture(width: int, height: int, kind: str = "PNG") -> bytes:
    """A photograph of sorts: noise on a gradient."""
    chance = np.random.default_rng(width * height)
    pixels = np.linspace(0, 200, width * height * 3).reshape(height, width, 3) + chance.integers(
        0, 55, (height, width, 3)
    )
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def encoded(image: bytes) -> str:
    return base64.b64encode(image).decode()


def prepared(image: bytes) -> Tensor:
    """The published preprocessing: the shortest edge to 224, bicubic, and the middle."""
    opened = Image.open(io.BytesIO(image)).convert("RGB")
    scale = 224 / min(opened.size)
    width, height = (max(224, round(side * scale)) for side in opened.size)
    scaled = opened.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - 224) // 2, (height - 224) // 2
    return torch.from_numpy(np.array(scaled.crop((left, top, left + 224, top + 224))))


def test_texts_and_images_in_one_request(catalogue: RunningServer, models_dir: Path) -> None:
    folder = models_dir / "jinaai/jina-clip-v1"
    images = [picture(224, 224), picture(448, 224)]
    inputs = [
        {"image": encoded(images[0])},
        "a text",
        {"text": TEXTS[4]},
        {"image": f"data:image/png;base64,{encoded(images[1])}"},
        {"bytes": encoded(images[0])},
    ]
    answer = embed(catalogue, model=CLIP, input=inputs)
    found = vectors_of(answer)
    ids = ids_of(folder, ["a text", TEXTS[4]])
    texts = checkpoints.expected("jinaai/jina-clip-v1", folder, ids)
    pixels = [checkpoints.expected_image(folder, prepared(image)) for image in images]
    expected = torch.stack([pixels[0], texts[0], texts[1], pixels[1], pixels[0]])
    assert (found - expected).norm(dim=1).max() < TOLERANCE
    assert [item["index"] for item in answer["data"]] == list(range(5))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids)) + 3 * 197


def test_images_alone(catalogue: RunningServer, models_dir: Path) -> None:
    image = picture(300, 224, "JPEG")
    found = vectors_of(embed(catalogue, model=CLIP, input=[{"image": encoded(image)}]))[0]
    expected = checkpoints.expected_image(models_dir / "jinaai/jina-clip-v1", prepared(image))
    assert (found - expected).norm() < TOLERANCE


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"image": "http://127.0.0.1/cat.png"}, "URL"),
        ({"image": "file:///etc/passwd"}, ""),
        ({"image": "no base64!"}, "base64"),
        ({"image": encoded(b"no image")}, "image"),
        ({"image": encoded(picture(64, 64)[:200])}, "image"),
        ({"image": ""}, "'text' and 'image'"),
        ({"image": 7}, "'text' and 'image'"),
        ({"image": "x", "text": "y"}, "'text' and 'image'"),
        ({"audio": "x"}, "'text' and 'image'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_image_is_named_by_its_index(catalogue: RunningServer, item: dict[str, Any], said: str) -> None:
    body = {"model": CLIP, "input": ["a text", {"text": "b"}, item]}
    response = httpx.post(f"{catalogue.url}/v1/embeddings", json=body, timeout=30)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert "input[2]" in message
    assert said in message
    assert response.json()["error"]["param"] == "input"


@pytest.mark.parametrize("name", [name for name in NAMES if name != CLIP])
def test_the_others_take_no_images(catalogue: RunningServer, name: str) -> None:
    body = {"model": name, "input": ["a text", {"image": encoded(picture(8, 8))}]}
    response = httpx.post(f"{catalogue.url}/v1/embeddings", json=body)
    assert response.status_code == 400
    assert "input[1]" in response.json()["error"]["message"]
    assert "takes no images" in response.json()["error"]["message"]
