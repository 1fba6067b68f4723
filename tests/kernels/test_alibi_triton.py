"""The Triton kernel of ALiBi under Triton's interpreter, which reads its switch when Triton is first imported: the
kernel runs in a process of its own.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.kernels.test_attention import exact, layout_of

from embedserve.kernels.alibi import alibi_slopes

Floats = npt.NDArray[np.float32]
Attended = Callable[..., torch.Tensor]

# Of float16: the rounding of outputs near 1, and of the weights. The interpreter multiplies the bits of bfloat16 as if
# they were integers (Triton 3.7.1), so that one is left to the tests on a GPU.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 2e-3}


def attend(qkv: Floats, lengths: list[int], dtype: torch.dtype) -> Floats:
    """What the process runs; qkv is [tokens, 3, heads, head_dim]."""
    from embedserve.kernels.alibi_triton import attend_alibi

    parts = torch.from_numpy(qkv).to(dtype).unbind(1)
    found = attend_alibi(*parts, layout_of(lengths), alibi_slopes(qkv.shape[2], torch.device("cpu")))
    assert found.dtype == dtype
    floats: Floats = found.float().numpy()
    return floats


@pytest.fixture(scope="module")
def attended() -> Iterator[Attended]:
    """attend, in the process with the interpreter."""
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            # The process starts with the first call.
            pool.submit(int).result(100)

        def run(qkv: torch.Tensor, lengths: list[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.from_numpy(pool.submit(attend, qkv.float().numpy(), lengths, dtype).result(100))

        yield run


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [5], [123], [1, 5, 5, 64, 65, 123]], ids=str)
def test_the_kernel_is_its_formula(attended: Attended, lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 3, 64).to(dtype)
    found = attended(qkv, lengths, dtype)
    assert found.shape == (sum(lengths), 3 * 64)
    assert (found.double() - exact(qkv, lengths, alibi_slopes(3, qkv.device))).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("head_dim", [7, 16, 80, 128])
def test_a_head_may_have_any_width(attended: Attended, head_dim: int) -> None:
    lengths = [2, 41]
    qkv = torch.randn(sum(lengths), 3, 5, head_dim)
    found = attended(qkv, lengths)
    assert (found.double() - exact(qkv, lengths, alibi_slopes(5, qkv.device))).abs().max() < TOLERANCE[torch.float32]


def test_a_broken_row_leaves_its_neighbours_alone(attended: Attended) -> None:
    lengths = [4, 40, 9]
    qkv = torch.randn(sum(lengths), 3, 2, 16)
    qkv[10] = math.nan
    found = attended(qkv, lengths)
    assert found[4:44].isnan().all()
    assert not found[:4].isnan().any()
    assert not found[44:].isnan().any()


@pytest.mark.parametrize(
    ("head_dim", "dtype", "said"), [(64, torch.float64, "float64"), (129, torch.float32, "head_dim 129")]
)
def test_what_it_cannot_do_is_refused(attended: Attended, head_dim: int, dtype: torch.dtype, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        attended(torch.randn(5, 3, 4, head_dim), [5], dtype)


@pytest.mark.parametrize("capability", [80, 90], ids=["Ampere", "Hopper"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_compiler_makes_a_program_for_tensor_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: int, dtype: str
) -> None:
    triton = pytest.importorskip("triton", reason="Triton is published for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from embedserve.kernels.alibi_triton import _forward

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"HEAD_DIM": 64, "WIDTH": 64, "QUERIES": 64, "KEYS": 64}
    types = {"slopes": "*fp32", "cu_seqlens": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(_forward, {name: types.get(name, "i32") for name in _forward.arg_names}, constants)
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["ptx"]
    assert ("mma.sync" if capability < 90 else "wgmma") in program
