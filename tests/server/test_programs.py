"""What a runner asks of Triton's compiler on a GPU, where there is none: every launch goes as far as its program.

Wrappers, arguments and compiler are the true ones, for Hopper; the launch itself is left out, so that what comes back
is whatever the memory held. In a process of its own, for Triton keeps what it has compiled for a device.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from embedserve.kernels import dispatch
from embedserve.models import catalog
from embedserve.models.backend import Backend
from embedserve.models.native import NativeBackend
from embedserve.server.bounds import Texts
from embedserve.server.runner import Runner
from tests import checkpoints

# Tokens of each text: one alone, as long as a program's longest and longer, many, of one length and of several.
BATCHES = [[1], [2], [16], [1] * 16, [3] * 17, [17, 1], [64], [65], [129], [33] * 9, [300, 2], [1] * 700]


def programs(model: str, folder: Path) -> tuple[list[str], list[str]]:
    """The kernels that are compiled while the runner warms up, and those afterwards."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from embedserve.kernels import attention_triton

    compiled: list[str] = []
    run = JITFunction.run

    def compile_alone(kernel: JITFunction, *arguments: object, grid: tuple[int, ...], **options: object) -> None:
        assert all(0 < size <= limit for size, limit in zip(grid, (2**31 - 1, 65_535, 65_535), strict=False))
        run(kernel, *arguments, grid=grid, **{**options, "warmup": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder.parent / "cache"))
        gpu = SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", 90, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
        patch.setattr(driver, "_active", gpu)
        patch.setattr(JITFunction, "run", compile_alone)
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda *, fn, **_: compiled.append(fn.name))
        patch.setattr(attention_triton, "_hopper", lambda _: True)
        patch.setattr(dispatch, "choose", lambda *_: dispatch.fused(attention_triton.attend_triton))
        config, cpu = catalog.configure(folder, model), torch.device("cpu")
        with torch.inference_mode():
            backend: Backend = NativeBackend(config, cpu, torch.float16)
        runner = Runner(backend, config, cpu, 1, {})
        runner._compile(Texts("packed", config.max_tokens, config.vocab_size))
        first, compiled = compiled, []
        for lengths in BATCHES:
            for dimension in (config.dimension, 100):
                runner._dense(np.zeros(sum(lengths), np.int32), np.array(lengths, np.int32), dimension)
    return first, compiled


@pytest.mark.parametrize(
    ("model", "kernels"),
    [
        ("jinaai/jina-embeddings-v2-base-es", {"_embed", "_forward", "_layer_norm", "_glu", "_chunks", "_finish"}),
        ("Qwen/Qwen3-Embedding-0.6B", {"_forward", "_rms_norm", "_norm_rotate", "_glu", "_finish"}),
    ],
)
def test_after_the_warm_up_no_request_waits_for_the_compiler(model: str, kernels: set[str], tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    folder = checkpoints.write(model, tmp_path)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        first, later = process.submit(programs, model, folder).result(110)
    assert set(first) == kernels
    assert later == []
