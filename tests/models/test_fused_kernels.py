"""The families on the Triton kernels against themselves on plain torch, interpreted and on a GPU.

At the true widths, with one layer. What the kernels compute, tests/kernels shows; here, that each family hands them
what they ask for.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests import checkpoints
from tests.gpu import no_waiting
from tests.kernels.triton_calls import GPU, interpreter
from tests.models.packed import pack, random_texts

from embedserve.kernels import dispatch
from embedserve.models import registry
from embedserve.models.batch import PackedBatch
from embedserve.models.config import read_config

MODELS = (checkpoints.BGE[0], *checkpoints.XLM_ROBERTA, *list(checkpoints.JINA_V2)[2:], checkpoints.JINA_CLIP)
LENGTHS = (1, 5, 2, 5)
Floats = npt.NDArray[np.float32]


def on(device: torch.device, batch: PackedBatch) -> PackedBatch:
    layout = batch.layout
    return PackedBatch.from_staged(
        batch.host,
        ids=batch.ids.to(device),
        positions=layout.positions.to(device),
        rows=layout.rows.to(device),
        cu_seqlens=layout.cu_seqlens.to(device),
    )


def fused(device: torch.device, dtype: torch.dtype) -> dispatch.Kernels:
    """What a GPU takes, but for attention, of which tests/kernels/test_attention_triton.py tells."""
    return dispatch.fused(dispatch.REFERENCE.attend)


def reference(device: torch.device, dtype: torch.dtype) -> dispatch.Kernels:
    return dispatch.REFERENCE


@torch.inference_mode()
def states(
    folder: Path,
    choose: Callable[[torch.device, torch.dtype], dispatch.Kernels],
    place: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    images: bool = False,
) -> Floats:
    """The last states of a few texts, or the vectors of two images."""
    config, device = read_config(folder), torch.device(place)
    model = registry.family(config.family)(config, device, dtype, choose(device, dtype))
    if images:
        torch.manual_seed(0)
        pixels = torch.randint(256, (2, 224, 224, 3), dtype=torch.uint8).to(device)
        compute = partial(model.images, pixels)
    else:
        texts = random_texts(LENGTHS, vocab=config.architecture.vocab_size)
        compute = partial(model, on(device, pack(texts)))
    found = compute()
    if device.type == "cuda":
        # Once more, now that everything is compiled: nothing on the way may wait for the device.
        with no_waiting():
            found = compute()
    return found.float().cpu().numpy()


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


@pytest.fixture(scope="module", params=(*MODELS, checkpoints.QWEN3), ids=lambda model: model.split("/")[1])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(request.param, tmp_path_factory.mktemp("models"))


def test_interpreted_kernels_give_the_states_of_plain_torch(folder: Path, process: ProcessPoolExecutor) -> None:
    expected, found = states(folder, reference), process.submit(states, folder, fused).result(100)
    assert found.shape == expected.shape
    assert (np.linalg.norm(found - expected, axis=1) < 1e-5 * np.linalg.norm(expected, axis=1)).all()


LOWEST = [
    pytest.param(torch.float32, 0.999999, marks=GPU, id="float32"),
    pytest.param(torch.float16, 0.9999, marks=GPU, id="float16"),
    pytest.param(torch.bfloat16, 0.999, marks=GPU, id="bfloat16"),
]


@torch.inference_mode()
def programs_compiled(folder: Path, first: tuple[int, ...], *others: tuple[int, ...]) -> list[str]:
    """What Triton compiles for batches of texts of these lengths, after the first of them."""
    import triton

    config, device, compiled = read_config(folder), torch.device("cuda"), []
    model = registry.family(config.family)(config, device, torch.float16, dispatch.choose(device, torch.float16))
    model(on(device, pack(random_texts(first, vocab=config.architecture.vocab_size))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, repr, **_: compiled.append(repr))  # noqa: A006
        for lengths in others:
            model(on(device, pack(random_texts(lengths, vocab=config.architecture.vocab_size))))
    return compiled


def lowest_cosine(found: Floats, expected: Floats) -> float:
    products = (found * expected).sum(axis=1)
    return float((products / np.linalg.norm(found, axis=1) / np.linalg.norm(expected, axis=1)).min())


@pytest.mark.parametrize(("dtype", "lowest"), LOWEST)
def test_a_gpu_gives_the_states_of_plain_torch_and_waits_for_nothing(
    folder: Path, dtype: torch.dtype, lowest: float
) -> None:
    found = states(folder, dispatch.choose, "cuda", dtype)
    assert lowest_cosine(found, states(folder, reference)) > lowest


@pytest.mark.parametrize(("dtype", "lowest"), LOWEST)
def test_a_gpu_gives_the_images_of_plain_torch_and_waits_for_nothing(
    tmp_path: Path, dtype: torch.dtype, lowest: float
) -> None:
    folder = checkpoints.write(checkpoints.JINA_CLIP, tmp_path)
    found = states(folder, dispatch.choose, "cuda", dtype, images=True)
    assert lowest_cosine(found, states(folder, reference, images=True)) > lowest


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_batch_asks_for_no_compilation(folder: Path) -> None:
    # Longest rows of up to 16 tokens: attention may have other programs for longer ones.
    assert programs_compiled(folder, (1, 5, 2, 5), (1,), (16,), (16, 3), (7,) * 9, (8,) * 16) == []
