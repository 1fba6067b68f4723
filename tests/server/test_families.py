"""Every family through the runner, at the true width: on the CPU here, in each dtype where there is a GPU."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

from embedserve.models import catalog
from embedserve.models.batch import PackedBatch, PackedRows
from embedserve.server.arrays import output_bits
from embedserve.server.device import DeviceError
from embedserve.server.graphs import BUCKETS, bucket_for
from embedserve.server.runner import Embedded, Runner
from tests import checkpoints
from tests.gpu import no_waiting
from tests.server.test_runner import Tight

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


def run(runner: Runner, texts: list[list[int]], outputs: list[int] | None = None) -> Embedded:
    ids = np.array([token for text in texts for token in text], dtype=np.int32)
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    wanted = None if outputs is None else np.array(outputs, dtype=np.int32)
    return runner.run(ids, lengths, np.full(len(texts), runner.info.dimension, dtype=np.int32), wanted)


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


@pytest.mark.parametrize("model", MODELS)
def test_filling_a_bucket_changes_no_states(models_dir: Path, model: str) -> None:
    folder = folder_of(model, models_dir)
    runner = load(model, folder, "cpu", "float32")
    ids = np.random.default_rng(0).integers(0, runner._config.vocab_size, 50, dtype=np.int32)
    rows = PackedRows.pack(ids, np.array([1, 40, 9], np.int32))
    with torch.inference_mode():
        own, filled = (
            runner._backend.hidden_states(PackedBatch.on_cpu(host)) for host in (rows, rows.in_bucket(64, 16))
        )
    assert (filled[:50] - own).norm(dim=1).max() < 1e-4 * own.norm(dim=1).max()


def test_one_long_text_among_short_ones(models_dir: Path) -> None:
    model = "jinaai/jina-embeddings-v2-base-en"
    runner = load(model, folder_of(model, models_dir), "cpu", "float32")
    chance = np.random.default_rng(2)
    texts = [chance.integers(0, 100, length).tolist() for length in (2, 2, 8192, 2, 2)]
    together = run(runner, texts)
    assert together.finite.all()
    assert together.computed_tokens == 8200
    for index in (0, 2, 4):
        assert np.abs(run(runner, [texts[index]]).dense[0] - together.dense[index]).max() < 1e-5


# Of four texts: all outputs, each of them alone.
OUTPUTS = [output_bits(names) for names in (("dense", "sparse", "colbert"), ("sparse",), ("colbert",), ("dense",))]


def test_all_outputs_come_out_of_a_batch_that_ran_in_parts(models_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_of("BAAI/bge-m3", models_dir)
    runner, texts = load("BAAI/bge-m3", folder, "cpu", "float32"), token_ids(folder)[:4]
    whole = run(runner, texts, OUTPUTS)
    monkeypatch.setattr(runner, "_backend", Tight(runner._backend, max(map(len, texts)), MemoryError()))
    parts = run(runner, texts, OUTPUTS)
    assert parts.finite.all()
    assert list(parts.arrays) == list(whole.arrays) == ["dense", "sparse_ids", "sparse_weights", "colbert"]
    for name, rows in whole.arrays.items():
        assert parts.arrays[name].counts.tolist() == rows.counts.tolist()
        assert np.abs(parts.arrays[name].elements - rows.elements).max() < 1e-5


@pytest.mark.parametrize("dtype", [pytest.param(dtype, marks=gpu) for dtype in ("float16", "bfloat16")])
@pytest.mark.parametrize("model", MODELS)
def test_the_host_never_waits_between_launches_and_graphs_change_nothing(
    models_dir: Path, model: str, dtype: str
) -> None:
    if (dtype, model) == ("float16", "Qwen/Qwen3-Embedding-0.6B"):
        pytest.skip("overflows float16")
    folder = folder_of(model, models_dir)
    on_gpu, texts, said = load(model, folder, "cuda", dtype), token_ids(folder), list[str]()
    on_gpu.warm_up(said.append)
    assert tuple(on_gpu._graphs) == BUCKETS, said
    small, large = texts[:3], texts * 20
    outputs = OUTPUTS * 10 if model == "BAAI/bge-m3" else None
    expected = checkpoints.expected(model, folder, texts)
    # Their first time, some allocations wait.
    run(on_gpu, large)
    with no_waiting():
        in_graph, eager = run(on_gpu, small), run(on_gpu, large)
        if outputs is not None:
            run(on_gpu, large[: len(outputs)], outputs)
        if "image" in on_gpu.info.modalities:
            on_gpu.run_images(np.zeros(2 * 224 * 224 * 3, np.uint8), np.array([768, 100], np.int32))
    tokens = sum(map(len, small))
    bucket = bucket_for(BUCKETS, tokens, len(small))
    assert bucket is not None
    assert in_graph.computed_tokens == bucket.tokens
    assert eager.computed_tokens == sum(map(len, large))
    assert (torch.from_numpy(in_graph.dense).double() * expected[:3]).sum(1).min() > 0.999
    assert (torch.from_numpy(eager.dense[: len(texts)]).double() * expected).sum(1).min() > 0.999
