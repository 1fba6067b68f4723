"""The runner: batches of token ids to vectors, compared with sentence-transformers and with published numbers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch import Tensor

from embedserve.models import registry
from embedserve.models.backend import Backend
from embedserve.models.batch import Ints, PackedBatch
from embedserve.models.catalog import locate
from embedserve.models.errors import BatchError, CheckpointError
from embedserve.server import device as devices
from embedserve.server.device import DeviceError, OutOfMemoryError
from embedserve.server.runner import Runner

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXTS = [
    "hello world",
    "What is Deep Learning?",
    "",
    "x",
    "   spaces\tand\nlines   ",
    "日本語のテキスト と 中文",
    "naïve café — Straße, Ελληνικά, عربى",
    "emoji 🤗👩‍👩‍👧 and \u200b zero width",
    "UPPER lower MiXeD 12345 3.14159",
    "https://example.com/a?b=c#d user@example.com",
    "supercalifragilisticexpialidocious" * 10,
    "[CLS] [SEP] [MASK] [PAD] [UNK]",
    "word " * 600,
    *(" ".join(f"token{i % 17}" for i in range(n)) for n in (2, 3, 5, 8, 13, 21, 34, 55, 89, 100, 200)),
]


@pytest.fixture(scope="module")
def folder() -> Path:
    return locate("all-MiniLM-L6-v2", None)


@pytest.fixture(scope="module")
def runner(folder: Path) -> Runner:
    return Runner.load(folder, device="cpu", threads=2)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    return tokenizer


def arrays(texts: list[list[int]], dimension: int = 384) -> tuple[Ints, Ints, Ints]:
    return (
        np.array([token for text in texts for token in text], dtype=np.int32),
        np.array([len(text) for text in texts], dtype=np.int32),
        np.full(len(texts), dimension, dtype=np.int32),
    )


def embed(runner: Runner, texts: list[list[int]]) -> npt.NDArray[np.float32]:
    embedded = runner.run(*arrays(texts))
    assert embedded.finite.all()
    return embedded.dense


@pytest.fixture(scope="module")
def encoded(tokenizer: Tokenizer) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(TEXTS)]


def test_vectors_are_those_of_sentence_transformers(runner: Runner, encoded: list[list[int]], folder: Path) -> None:
    expected = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, batch_size=7)
    found = embed(runner, encoded)
    assert found.dtype == np.float32
    assert found.shape == (len(TEXTS), 384)
    assert np.abs(found - expected).max() <= 1e-5


def test_a_text_gets_the_same_vector_alone_as_in_a_batch(runner: Runner, encoded: list[list[int]]) -> None:
    together = embed(runner, encoded)
    alone = np.concatenate([embed(runner, [text]) for text in encoded])
    assert np.abs(together - alone).max() <= 1e-5


def test_the_order_of_a_batch_does_not_matter(runner: Runner, encoded: list[list[int]]) -> None:
    order = np.random.default_rng(3).permutation(len(encoded))
    shuffled = embed(runner, [encoded[index] for index in order])
    assert np.abs(shuffled - embed(runner, encoded)[order]).max() <= 1e-5


def test_hello_world_as_published(runner: Runner, tokenizer: Tokenizer) -> None:
    # fastembed's canonical vector of all-MiniLM-L6-v2 (its tests, atol 1e-3).
    vector = embed(runner, [tokenizer.encode("hello world").ids])[0]
    assert np.allclose(vector[:5], [-0.034478, 0.03102, 0.00673, 0.02611, -0.039362], atol=1e-3)
    assert abs(np.linalg.norm(vector) - 1) < 1e-6


def test_similarities_as_published(runner: Runner, tokenizer: Tokenizer) -> None:
    # sentence-transformers' test_pretrained.py: bfloat16, relative tolerance 1 %.
    texts = [
        "Which planet is known as the Red Planet?",
        "Venus is often called Earth's twin because of its similar size and proximity.",
        "Mars, known for its reddish appearance, is often referred to as the Red Planet.",
        "Jupiter, the largest planet in our solar system, has a prominent red spot.",
        "Saturn, famous for its rings, is sometimes mistaken for the Red Planet.",
    ]
    query, *documents = embed(runner, [encoding.ids for encoding in tokenizer.encode_batch(texts)])
    assert np.allclose([query @ one for one in documents], [0.46371, 0.81205, 0.72828, 0.75051], rtol=0.01)


def test_a_shortened_vector_as_published(runner: Runner, tokenizer: Tokenizer) -> None:
    # Text Embeddings Inference's router test: MiniLM, "test", 128 dimensions. Its GELU is the tanh form.
    ids, lengths, dimensions = arrays([tokenizer.encode("test").ids], 128)
    vectors = runner.run(ids, lengths, dimensions).dense
    assert vectors.shape == (1, 128)
    expected = [0.020964134, 0.04565805, -0.066505864, 0.10739273, -0.013054413, -0.07467599]
    assert np.allclose(vectors[0, :6], expected, atol=1e-3)
    assert abs(np.linalg.norm(vectors) - 1) < 1e-6


def test_each_row_has_its_own_dimension(runner: Runner, encoded: list[list[int]]) -> None:
    full = embed(runner, encoded)
    ids, lengths, _ = arrays(encoded)
    dimensions = np.random.default_rng(0).integers(1, 200, len(encoded), dtype=np.int32)
    embedded = runner.run(ids, lengths, dimensions)
    assert embedded.arrays["dense"].counts.tolist() == dimensions.tolist()
    assert embedded.finite.all()
    for row, (whole, dimension) in enumerate(zip(full, dimensions, strict=True)):
        cut = whole[:dimension] / np.linalg.norm(whole[:dimension])
        assert np.abs(embedded.arrays["dense"][row] - cut).max() < 1e-5


@pytest.mark.parametrize(
    ("pooling", "reduce"),
    [
        ("cls", lambda states: states[0]),
        ("max", lambda states: states.max(0)),
        ("lasttoken", lambda states: states[-1]),
    ],
)
def test_other_poolings_are_those_of_sentence_transformers(
    folder: Path, tmp_path: Path, tokenizer: Tokenizer, pooling: str, reduce: object
) -> None:
    for file in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).symlink_to(folder / file)
    entries = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "modules.json").write_text(json.dumps(entries))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 384, f"pooling_mode_{pooling}{'_token' * (pooling == 'cls')}"
                    f"{'_tokens' * (pooling == 'max')}": True})
    )  # fmt: skip
    texts = TEXTS[:4]
    found = embed(Runner.load(tmp_path, device="cpu"), [encoding.ids for encoding in tokenizer.encode_batch(texts)])
    reference = SentenceTransformer(str(tmp_path), device="cpu")
    assert np.abs(found - reference.encode(texts)).max() <= 1e-5
    # Not normalised, and truly the mode asked for.
    states = reference.encode(texts[0], output_value="token_embeddings").numpy()
    assert np.abs(found[0] - reduce(states)).max() <= 1e-5  # type: ignore[operator]


def test_a_text_with_a_broken_embedding_fails_alone(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    for file in ("config.json", "modules.json", "sentence_bert_config.json", "1_Pooling"):
        (tmp_path / file).symlink_to(folder / file)
    tensors = load_file(folder / "model.safetensors")
    poisoned = tokenizer.encode("poison").ids[1]
    tensors["embeddings.word_embeddings.weight"][poisoned] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    texts = ["poison", "water", "the poison is in one of three", "bread and wine"]
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    embedded = Runner.load(tmp_path, device="cpu").run(*arrays(encoded))
    assert embedded.finite.tolist() == [False, True, False, True]
    assert np.isfinite(embedded.dense[[1, 3]]).all()


@pytest.mark.parametrize(
    ("ids", "lengths", "dimensions", "said"),
    [
        ([1, 2], [1, 1], [384], "2 lengths came with 1 dimensions"),
        ([], [], [], "at least one text"),
        ([-1], [1], [384], "vocabulary from 0 to 30521"),
        ([30522], [1], [384], "from 30522 to 30522"),
        ([1] * 513, [513], [384], "513 tokens, the model takes 512"),
        ([1], [1], [0], "expected 1 to 384"),
        ([1], [1], [385], "expected 1 to 384"),
        ([1, 2], [1, 2], [384, 384], "3 tokens, but 2"),
        ([1, 2], [2, 0], [384, 384], "no tokens"),
    ],
)
def test_batches_that_do_not_fit_are_refused(
    runner: Runner, ids: list[int], lengths: list[int], dimensions: list[int], said: str
) -> None:
    with pytest.raises(BatchError, match=said):
        runner.run(*(np.array(values, dtype=np.int32) for values in (ids, lengths, dimensions)))


def test_the_longest_text_the_positions_allow_runs(runner: Runner) -> None:
    assert embed(runner, [[7] * 512]).shape == (1, 384)


def test_warming_up_sets_the_bound_of_a_batch(runner: Runner) -> None:
    said: list[str] = []
    runner.warm_up(said.append)
    assert 256 <= runner.info.max_batch_tokens <= 8192
    # With the reason, and the rate.
    assert re.fullmatch(
        rf"batches of up to {runner.info.max_batch_tokens} tokens: larger ones .+ \([\d,]+ tokens/s\)", said[-1]
    )


def test_info_says_what_it_runs_on(runner: Runner) -> None:
    info = runner.info
    assert (info.device, info.dtype, info.backend, info.cost) == ("cpu", "float32", "native", "packed")
    assert (info.dimension, info.max_tokens, info.threads) == (384, 256, 2)
    assert info.concurrency == 1
    assert info.device_name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "tpu"}, "'tpu' is unknown"),
        ({"device": "cuda:x"}, "'cuda:x' is unknown"),
        ({"device": "cpu:1"}, "'cpu:1' is unknown"),
        ({"device": "cpu", "dtype": "float16"}, "float16 on the CPU: it is slower than float32"),
        ({"device": "cpu", "dtype": "int4"}, "'int4' is unknown"),
        ({"device": "cpu", "threads": 0}, "threads 0"),
    ],
)
def test_devices_and_dtypes_that_are_not_there(folder: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        Runner.load(folder, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_an_error_and_no_silent_cpu(folder: Path) -> None:
    with pytest.raises(DeviceError, match="no CUDA device is there"):
        Runner.load(folder, device="cuda")


def test_a_gpu_that_auto_cannot_take_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said: list[str] = []
    monkeypatch.setattr(devices, "_DRIVER", tmp_path / "none")
    assert devices.pick_device("auto", said.append).type == "cpu"
    assert not said
    monkeypatch.setattr(devices, "_DRIVER", tmp_path)
    assert devices.pick_device("auto", said.append).type == "cpu"
    assert re.fullmatch("NVIDIA's driver is loaded, but .*torch.*: the CPU, which is far slower", *said)


@pytest.mark.parametrize("why", ["Failed to find C compiler. Please specify", "libcuda.so cannot found!\nPossible", ""])
def test_a_gpu_without_a_compiler_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    runtime = pytest.importorskip("triton.runtime", reason="Triton is published for Linux alone")

    def fails() -> None:
        raise RuntimeError(why)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(runtime.driver, "_active", SimpleNamespace(get_current_target=fails))
    said = re.escape(why.partition("\n")[0] or "RuntimeError")
    with pytest.raises(DeviceError, match=rf"cuda:1, cannot begin \({said}\): it needs a C compiler"):
        devices.check_compiler(torch.device("cuda:1"))
    # GPUs that have no kernels of Triton's, and CPUs, need none.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    devices.check_compiler(torch.device("cuda:1"))
    devices.check_compiler(torch.device("cpu"))


def test_an_unknown_backend_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="unknown backend 'onnxx'"):
        Runner.load(folder, device="cpu", backend="onnxx")


def test_weights_that_do_not_fit_are_refused_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str) -> Callable[..., Backend]:
        def load(*_: object) -> Backend:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        return load

    monkeypatch.setattr(registry, "backend", fails)
    with pytest.raises(DeviceError, match=f"{folder.name} as float32 does not fit into the memory of cpu; serve fewer"):
        Runner.load(folder, device="cpu")


def test_more_threads_than_cores_are_warned_of(folder: Path) -> None:
    before, said = torch.get_num_threads(), []
    cores = len(os.sched_getaffinity(0))
    try:
        Runner.load(folder, device="cpu", threads=cores + 1, progress=said.append)
    finally:
        torch.set_num_threads(before)
    assert f"{cores + 1} threads on {cores} cores" in said[0]


@pytest.mark.parametrize(("pinned", "turns"), [(False, "1000"), (True, "20000")])
def test_waiting_threads_spin_for_a_bounded_time(pinned: bool, turns: str) -> None:
    # libgomp prints its settings when it is loaded.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))}
    code = f"from embedserve.server import threads; threads.set_patience(pinned={pinned}); import torch"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": ".typing", "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{turns}'" in done.stderr


def test_weights_that_give_nothing_but_nan_are_refused_at_the_start(folder: Path, tmp_path: Path) -> None:
    for file in ("config.json", "modules.json", "sentence_bert_config.json", "1_Pooling"):
        (tmp_path / file).symlink_to(folder / file)
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.layer.3.output.LayerNorm.weight"].fill_(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or an infinity"):
        Runner.load(tmp_path, device="cpu").warm_up(max_batch_tokens=256)


class Tight:
    """A backend with memory for so many tokens, and a list of what it was given."""

    def __init__(self, backend: Backend, room: int, error: Exception) -> None:
        self._backend, self._room, self._error = backend, room, error
        self.name, self.cost, self.dtype, self.pools = backend.name, backend.cost, backend.dtype, backend.pools
        self.batches: list[list[int]] = []

    def hidden_states(self, batch: PackedBatch) -> Tensor:
        self.batches.append(batch.host.lengths.tolist())
        if len(batch.ids) > self._room:
            raise self._error
        return self._backend.hidden_states(batch)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    MemoryError(),
]


@pytest.fixture
def tight(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Exception], Tight]:
    def make(room: int, error: Exception) -> Tight:
        backend = Tight(runner._backend, room, error)
        monkeypatch.setattr(runner, "_backend", backend)
        monkeypatch.setattr(runner, "_warned", set())
        return backend

    return make


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20] or "MemoryError")
def test_where_memory_runs_out_a_batch_runs_in_parts(
    runner: Runner,
    encoded: list[list[int]],
    tight: Callable[[int, Exception], Tight],
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    expected, total = embed(runner, encoded), sum(map(len, encoded))
    ids, lengths, dimensions = arrays(encoded)
    backend = tight(300, error)
    embedded = runner.run(ids, lengths, dimensions)
    assert np.abs(embedded.dense - expected).max() <= 1e-5
    assert embedded.finite.all()
    assert embedded.computed_tokens == total
    ran = [batch for batch in backend.batches if sum(batch) <= 300]
    assert sorted(length for batch in ran for length in batch) == sorted(lengths.tolist())
    # By halves of the tokens: no more parts than needed, but for what does not divide evenly.
    assert len(ran) <= 2 * total / 300 + 1
    # Said once for batches of a size.
    sizes = [record.__dict__["tokens"].bit_length() for record in caplog.records]
    assert sizes
    assert len(sizes) == len(set(sizes))


def test_a_text_that_does_not_fit_alone_is_refused_by_its_size(
    runner: Runner, tight: Callable[[int, Exception], Tight]
) -> None:
    backend = tight(100, OUT_OF_MEMORY[0])
    with pytest.raises(OutOfMemoryError, match="a text of 101 tokens does not fit into the memory of cpu"):
        runner.run(*arrays([[7] * 101]))
    assert issubclass(OutOfMemoryError, BatchError)  # the engine goes on
    # Not by its neighbours', of which one that fits runs.
    with pytest.raises(OutOfMemoryError, match="a text of 150 tokens"):
        runner.run(*arrays([[7] * 99, [7] * 150, [7] * 99]))
    assert backend.batches[-1] == [150]
    assert embed(runner, [[7] * 100]).shape == (1, 384)


def test_other_errors_are_not_taken_for_want_of_memory(
    runner: Runner, tight: Callable[[int, Exception], Tight]
) -> None:
    backend = tight(1, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.run(*arrays([[7, 8], [9]]))
    assert len(backend.batches) == 1


def test_rows_without_an_output_keep_their_places_in_parts(
    runner: Runner, encoded: list[list[int]], tight: Callable[[int, Exception], Tight]
) -> None:
    ids, lengths, _ = arrays(encoded)
    dimensions = np.random.default_rng(0).integers(1, 384, len(encoded), dtype=np.int32)
    whole = runner.run(ids, lengths, dimensions)
    tight(300, MemoryError())
    parts = runner.run(ids, lengths, dimensions)
    assert parts.arrays["dense"].counts.tolist() == dimensions.tolist()
    assert np.abs(parts.arrays["dense"].elements - whole.arrays["dense"].elements).max() <= 1e-5


def test_a_batch_is_one_forward_of_the_tokens_that_were_sent(
    runner: Runner, encoded: list[list[int]], tight: Callable[[int, Exception], Tight]
) -> None:
    backend = tight(100_000, MemoryError())
    embedded = runner.run(*arrays(encoded))
    assert [sum(batch) for batch in backend.batches] == [sum(map(len, encoded))] == [embedded.computed_tokens]
    # The matrix is the array that goes out: no vector is taken apart.
    assert np.shares_memory(embedded.dense, embedded.arrays["dense"].elements)


def test_a_thousand_texts_of_one_token(runner: Runner) -> None:
    ids = np.random.default_rng(4).integers(0, 30_000, 1000)
    together = embed(runner, [[int(token)] for token in ids])
    for index in (0, 1, 500, 999):
        assert np.abs(together[index] - embed(runner, [[int(ids[index])]])[0]).max() <= 1e-5


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_threads_get_the_vectors_that_one_gets_alone(
    folder: Path, runner: Runner, encoded: list[list[int]], device: str
) -> None:
    shared = runner if device == "cpu" else Runner.load(folder, device=device)
    chance = np.random.default_rng(5)
    batches = [[encoded[index] for index in chance.integers(0, len(encoded), 1 + size % 6)] for size in range(24)]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda batch: embed(shared, batch), batches))
    tolerance = 1e-5 if device == "cpu" else 2e-3
    for batch, vectors in zip(batches, found, strict=True):
        assert np.abs(vectors - embed(shared, batch)).max() <= tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        pytest.param("float16", 2e-3, marks=gpu),
        pytest.param("bfloat16", 1e-2, marks=gpu),
        pytest.param("float32", 1e-4, marks=gpu),
    ],
)
def test_cuda_agrees_with_the_cpu(
    folder: Path, runner: Runner, encoded: list[list[int]], dtype: str, tolerance: float
) -> None:
    on_cuda = Runner.load(folder, device="cuda", dtype=dtype)
    vectors = embed(on_cuda, encoded)
    expected = embed(runner, encoded)
    assert np.abs(vectors - expected).max() < tolerance
    assert (vectors * expected).sum(1).min() > 0.999
    on_cuda.warm_up()
    # The pinned buffer is reused by batches of other sizes.
    assert np.abs(embed(on_cuda, encoded[:3]) - expected[:3]).max() < tolerance
