"""The Triton kernel of packed attention against its formula in float64: interpreted, and on a GPU."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from tests.kernels.test_attention import exact, layout_of
from tests.kernels.triton_calls import INTERPRETER, PLACES, interpreter

from embedserve.kernels.alibi import alibi_slopes
from embedserve.kernels.attention import PROGRAM_LENGTHS

Floats = npt.NDArray[np.float32]
Attended = Callable[..., torch.Tensor]

# Of half precision: the rounding of outputs near 1, and of the weights. Of float32: three products of TF32's keep 22 of
# its 24 bits, and tensor cores cut sums off instead of rounding them.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def attend(
    device: str,
    qkv: Floats,
    lengths: list[int],
    dtype: torch.dtype,
    kv_heads: int,
    causal: bool,
    alibi: bool,
    longest: int,
) -> Floats:
    """What the process runs; qkv is [tokens, heads + 2 · kv_heads, head_dim], longest a bound on the lengths."""
    from embedserve.kernels.attention_triton import attend_triton

    heads = qkv.shape[1] - 2 * kv_heads
    q, k, v = torch.from_numpy(qkv).to(device, dtype).split([heads, kv_heads, kv_heads], dim=1)
    slopes = alibi_slopes(heads, q.device) if alibi else None
    found = attend_triton(q, k, v, layout_of(lengths, device, longest=longest), causal=causal, slopes=slopes)
    assert found.dtype == dtype
    floats: Floats = found.float().cpu().numpy()
    return floats


@pytest.fixture(scope="module", params=PLACES)
def attended(request: pytest.FixtureRequest) -> Iterator[Attended]:
    """attend in either place, with most of its parameters left out."""
    with interpreter() if request.param == INTERPRETER else nullcontext() as process:

        def run(
            qkv: torch.Tensor,
            lengths: list[int],
            *,
            kv_heads: int | None = None,
            causal: bool = False,
            alibi: bool = False,
            longest: int = 0,
        ) -> torch.Tensor:
            given = lengths, qkv.dtype, kv_heads or qkv.shape[1] // 3, causal, alibi, longest
            if process is None:
                return torch.from_numpy(attend(request.param, qkv.float().numpy(), *given))
            if qkv.dtype == torch.bfloat16:
                pytest.skip("the interpreter multiplies bfloat16's bits as if they were integers (Triton 3.7.1)")
            return torch.from_numpy(process.submit(attend, "cpu", qkv.float().numpy(), *given).result(100))

        yield run


def far(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.double() - expected).abs().max())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", [[1], [5], [16, 9], [32], [123], [1, 5, 5, 64, 65, 130]], ids=str)
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_the_kernel_is_its_formula(attended: Attended, lengths: list[int], dtype: torch.dtype, alibi: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3 * 3, 64).to(dtype)
    slopes = alibi_slopes(3, qkv.device) if alibi else None
    assert far(attended(qkv, lengths, alibi=alibi), exact(qkv, lengths, slopes)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(16, 8, 128), (12, 2, 32), (3, 3, 64)])
@pytest.mark.parametrize("causal", [False, True], ids=["both directions", "causal"])
def test_grouped_and_causal_attention(
    attended: Attended, heads: int, kv_heads: int, head_dim: int, causal: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    lengths = [123, 1, 5]
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, head_dim).to(dtype)
    found = attended(qkv, lengths, kv_heads=kv_heads, causal=causal)
    assert far(found, exact(qkv, lengths, kv_heads=kv_heads, causal=causal)) < TOLERANCE[dtype]


def test_all_switches_at_once(attended: Attended) -> None:
    lengths = [7, 140]
    qkv = torch.randn(sum(lengths), 4 + 2 * 2, 16)
    expected = exact(qkv, lengths, alibi_slopes(4, qkv.device), kv_heads=2, causal=True)
    assert far(attended(qkv, lengths, kv_heads=2, causal=True, alibi=True), expected) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("head_dim", [7, 16, 24, 80, 256])
def test_a_head_may_have_any_width(attended: Attended, head_dim: int) -> None:
    lengths = [2, 41]
    qkv = torch.randn(sum(lengths), 3 * 2, head_dim)
    assert far(attended(qkv, lengths), exact(qkv, lengths)) < TOLERANCE[torch.float32]


def test_many_rows_of_one_token(attended: Attended, request: pytest.FixtureRequest) -> None:
    # A program a row, for each of which the interpreter takes some 30 ms.
    rows = 200 if INTERPRETER in request.node.callspec.id else 1000
    qkv = torch.randn(rows, 3, 16)
    # A token that sees itself alone is its own value.
    assert far(attended(qkv, [1] * rows), qkv[:, 2].double()) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("causal", [False, True], ids=["both directions", "causal"])
def test_rows_may_be_empty_and_shorter_than_was_said(attended: Attended, causal: bool) -> None:
    """A CUDA graph replays batches of fewer and shorter rows than it was captured with."""
    lengths = [0, 3, 0, 0, 17, 20, 0]
    qkv = torch.randn(sum(lengths), 3 * 2, 16)
    expected = exact(qkv, lengths, causal=causal)
    for longest in (20, 64, 512):
        assert far(attended(qkv, lengths, causal=causal, longest=longest), expected) < TOLERANCE[torch.float32]


def test_a_broken_row_leaves_its_neighbours_alone(attended: Attended) -> None:
    lengths = [4, 40, 9]
    qkv = torch.randn(sum(lengths), 3 * 2, 16)
    qkv[10] = math.nan
    found = attended(qkv, lengths)
    assert found[4:44].isnan().all()
    assert not found[:4].isnan().any()
    assert not found[44:].isnan().any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "dtype", "said"),
    [
        (4, 4, 64, torch.float64, "float64"),
        (4, 4, 257, torch.float32, "head_dim 257"),
        (4, 3, 64, torch.float32, "kv_heads dividing heads"),
    ],
)
def test_what_it_cannot_do_is_refused(
    attended: Attended, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        attended(torch.randn(5, heads + 2 * kv_heads, head_dim).to(dtype), [5], kv_heads=kv_heads)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_batch_of_each_program_length_nothing_is_compiled_any_more() -> None:
    from embedserve.kernels.attention_triton import _forward, attend_triton

    def run(lengths: list[int]) -> int:
        """Programs that there are after the batch. Its offsets lie somewhere in a staging buffer, its rows anywhere."""
        layout = layout_of(lengths, "cuda")
        staged = torch.cat([layout.cu_seqlens[:1], layout.cu_seqlens])[1:]
        qkv = torch.randn(sum(lengths), 3, 4, 64, device="cuda", dtype=torch.float16)
        attend_triton(*qkv.unbind(1), replace(layout, cu_seqlens=staged))
        return len(_forward.device_caches[torch.cuda.current_device()][0])

    compiled = [run([length]) for length in PROGRAM_LENGTHS][-1]
    assert [run(lengths) for lengths in ([1], [3, 5], [17] * 16, [2] * 100, [700, 33])] == [compiled] * 5


@pytest.mark.parametrize("capability", [80, 90], ids=["Ampere", "Hopper"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "switches"),
    [
        ("fp16", 64, {"ALIBI": True, "CAUSAL": False}),  # JinaBERT
        ("fp32", 64, {"ALIBI": True, "CAUSAL": False}),
        ("bf16", 128, {"ALIBI": False, "CAUSAL": True}),  # Qwen3
        ("fp32", 128, {"ALIBI": False, "CAUSAL": True}),
        ("fp32", 32, {"ALIBI": False, "CAUSAL": False}),  # MiniLM
    ],
    ids=str,
)
def test_the_compiler_makes_programs_for_tensor_cores(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capability: int,
    dtype: str,
    head_dim: int,
    switches: dict[str, bool],
) -> None:
    triton = pytest.importorskip("triton", reason="Triton is published for Linux alone")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from embedserve.kernels.attention_triton import _forward, tiles_for

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    number = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    hopper = capability == 90
    for tiles in {tiles_for(longest, head_dim, number, hopper=hopper) for longest in PROGRAM_LENGTHS}:
        constants = {"HEAD_DIM": head_dim, "WIDTH": head_dim, "GROUPS": 1 + switches["CAUSAL"], **switches}
        constants |= {"QUERIES": tiles.queries, "KEYS": tiles.keys}
        types = {"slopes": "*fp32", "cu_seqlens": "*i32", "scale": "fp32"}
        types |= dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}") | dict.fromkeys(constants, "constexpr")
        signature = {name: types.get(name, "i32") for name in _forward.arg_names}
        # As a launch finds them: the pointers and strides of states are multiples of 16.
        sixteenth = ("q", "k", "v", "out", *(name for name in signature if name.endswith(("_token", "_head"))))
        attributes = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(signature) if name in sixteenth}
        program = triton.compile(
            ASTSource(_forward, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": tiles.warps, "num_stages": tiles.stages},
        )
        # Hopper multiplies in groups of four warps, where there are 64 queries.
        groups = hopper and tiles.queries >= 64
        assert ("wgmma.mma_async" if groups else "mma.sync") in program.asm["ptx"]
        # What a multiprocessor gives a program: on Hopper 227 KB; 163 on an A100, 99 on the other Amperes.
        assert program.metadata.shared <= (227 if hopper else 99) * 1024
