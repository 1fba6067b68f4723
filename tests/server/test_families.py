"""Every family through the runner, at the true width: on the CPU here, in each dtype where there is a GPU."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from embedserve.models import catalog
from embedserve.server.runner import DeviceError, Embedded, Runner
from tests import checkpoints

TEXTS = ["What is a search engine?", "x", "你好，世界。", "Große Städte " * 20, "search engine " * 40]
# A name of each family, and of each variant of JinaBERT.
MODELS = [
    "BAAI/bge-large-en-v1.5",
    "BAAI/bge-m3",
    "jinaai/jina-embeddings-v2-base-en",
    "jinaai/jina-embeddings-v2-base-es",
    "jinaai/jina-embeddings-v2-base-code",
    "jinaai/jina-clip-v1",
    "Qwen/Qwen3-Embedding-0.6B",
]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = [pytest.param("cuda", dtype, marks=gpu) for dtype in ("float32", "float16", "bfloat16")]
# By dtype, the largest distance of unit vectors.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def folder_of(model: str, models_dir: Path) -> Path:
    return models_dir / model if (models_dir / model).is_dir() else checkpoints.write(model, models_dir)


def load(model: str, folder: Path, device: str, dtype: str) -> Runner:
    return Runner.load(folder, config=catalog.configure(folder, model), device=device, dtype=dtype)


def token_ids(folder: Path) -> list[list[int]]:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [tokenizer.encode(text).ids for text in TEXTS]


def run(runner: Runner, texts: list[list[int]]) -> Embedded:
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    return runner.run(ids, lengths, np.full(len(texts), runner.info.dimension, dtype=np.int32))


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), *ON_GPU])
@pytest.mark.parametrize("model", MODELS)
def test_a_family_is_its_reference(models_dir: Path, model: str, device: str, dtype: str) -> None:
    folder = folder_of(model, models_dir)
    if (dtype, model) == ("float16", "Qwen/Qwen3-Embedding-0.6B"):
        with pytest.raises(DeviceError, match="overflow"):
            load(model, folder, device, dtype)
        return
    texts = token_ids(folder)
    runner = load(model, folder, device, dtype)
    together = run(runner, texts)
    found = torch.from_numpy(together.dense).double()
    expected = checkpoints.expected(model, folder, texts)
    assert together.finite.all()
    assert (found - expected).norm(dim=1).max() < (1e-5 if device == "cpu" else TOLERANCE[dtype])
    assert (found * expected).sum(1).min() > 0.998
    assert ((found.norm(dim=1) - 1).abs() < 1e-3).all()
    alone = np.concatenate([run(runner, [text]).dense for text in texts])
    assert (alone * together.dense).sum(1).min() > 0.9999


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), *ON_GPU])
def test_images_are_their_reference(models_dir: Path, device: str, dtype: str) -> None:
    model = "jinaai/jina-clip-v1"
    folder = folder_of(model, models_dir)
    pixels = torch.randint(0, 256, (3, 224, 224, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    runner = load(model, folder, device, dtype)
    found = torch.from_numpy(runner.run_images(pixels.numpy().reshape(-1), np.full(3, 768, np.int32)).dense).double()
    expected = torch.stack([checkpoints.expected_image(folder, image) for image in pixels])
    assert (found - expected).norm(dim=1).max() < (1e-5 if device == "cpu" else TOLERANCE[dtype])
    assert ((found.norm(dim=1) - 1).abs() < 1e-3).all()
