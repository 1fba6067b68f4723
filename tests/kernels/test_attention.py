"""Packed attention: each row attends to itself alone, whatever stands beside it; with and without ALiBi."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from embedserve.kernels import attention
from embedserve.kernels.alibi import alibi_slopes
from embedserve.kernels.attention import Attend, Layout, attend_by_runs, attend_padded, attend_varlen

LENGTHS = [[1], [5], [1, 1, 1], [5, 123], [2, 2, 7, 7, 7, 96, 97, 97, 300], [128] * 3]


def layout_of(lengths: list[int], device: str = "cpu", *, longest: int | None = None) -> Layout:
    """Rows may be empty; longest is a bound on the lengths where it is not the longest itself, as in a CUDA graph."""
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    runs, start = [], 0
    for length, group in itertools.groupby(lengths):
        rows = len(list(group))
        runs.append((start, rows, length))
        start += rows * length
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    rows_of = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    return Layout(cu.to(device), rows_of.to(device), positions.to(device), longest or max(lengths), tuple(runs))


def exact(
    qkv: torch.Tensor,
    lengths: list[int],
    slopes: torch.Tensor | None = None,
    *,
    kv_heads: int | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """The formula, row by row, in float64. qkv is [tokens, heads + 2 · kv_heads, head_dim] or [tokens, 3, heads, …]."""
    qkv = qkv.flatten(1, -2)
    kv_heads = kv_heads or qkv.shape[1] // 3
    heads = qkv.shape[1] - 2 * kv_heads
    outputs = []
    for row in torch.split(qkv.double(), lengths):
        q, k, v = row.transpose(0, 1).split([heads, kv_heads, kv_heads])
        k, v = (part.repeat_interleave(heads // kv_heads, dim=0) for part in (k, v))
        scores = q @ k.transpose(1, 2) / row.shape[-1] ** 0.5
        index = torch.arange(len(row), dtype=torch.float64)
        if slopes is not None:
            scores -= slopes.double()[:, None, None] * (index[:, None] - index).abs()
        if causal:
            scores.masked_fill_(index[:, None] < index, float("-inf"))
        outputs.append((torch.softmax(scores, dim=-1) @ v).permute(1, 0, 2).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("attend", [attend_by_runs, attend_padded])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 7])
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_attention_is_its_formula(attend: Attend, lengths: list[int], head_dim: int, alibi: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 3, head_dim)
    slopes = alibi_slopes(3, qkv.device) if alibi else None
    found = attend(*qkv.unbind(1), layout_of(lengths), slopes=slopes)
    assert found.shape == (sum(lengths), 3 * head_dim)
    assert (found.double() - exact(qkv, lengths, slopes)).abs().max() < 5e-6


@pytest.mark.parametrize("attend", [attend_by_runs, attend_padded])
@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_a_broken_row_leaves_its_neighbours_alone(attend: Attend, alibi: bool) -> None:
    lengths = [4, 4, 9]
    qkv = torch.randn(17, 3, 2, 8)
    slopes = alibi_slopes(2, qkv.device) if alibi else None
    clean = attend(*qkv.unbind(1), layout_of(lengths), slopes=slopes)
    qkv[5] = float("nan")
    found = attend(*qkv.unbind(1), layout_of(lengths), slopes=slopes)
    assert found[4:8].isnan().any()
    assert torch.equal(found[:4], clean[:4])
    assert torch.equal(found[8:], clean[8:])


@pytest.mark.parametrize(
    ("heads", "expected"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (8, [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (12, [2.0 ** -(head + 1) for head in range(8)] + [0.70710678, 0.35355339, 0.17677670, 0.08838835]),
        (16, [2 ** (-(head + 1) / 2) for head in range(16)]),
    ],
)
def test_slopes(heads: int, expected: list[float]) -> None:
    assert alibi_slopes(heads, torch.device("cpu")).tolist() == pytest.approx(expected, rel=1e-7)


def largest_allocation(attend: Attend, tokens: int) -> int:
    """Bytes of the largest piece of memory that attention with ALiBi takes for one row, 4 heads of 16."""
    qkv = torch.randn(tokens, 3, 4, 16)
    slopes = alibi_slopes(4, qkv.device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        attend(*qkv.unbind(1), layout_of([tokens]), slopes=slopes)
    return max(event.cpu_memory_usage for event in recorded.events())


def test_alibi_of_long_texts_takes_no_square_of_memory() -> None:
    # The whole bias would be 4 · 4096² floats, 256 MiB.
    assert largest_allocation(attend_by_runs, 4096) <= 4 << 20


def test_padded_alibi_goes_by_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_LARGEST_BIAS", 4 * 1000 * 300)
    assert largest_allocation(attend_padded, 1000) <= 4 * 4 * 1000 * 300
    lengths = [3, 77, 130]
    qkv = torch.randn(sum(lengths), 3, 4, 16)
    slopes = alibi_slopes(4, qkv.device)
    # 26 queries at a time, and 1, where even one is over the bound.
    for bound in (3 * 4 * 130 * 26, 1):
        monkeypatch.setattr(attention, "_LARGEST_BIAS", bound)
        found = attend_padded(*qkv.unbind(1), layout_of(lengths), slopes=slopes)
        assert (found.double() - exact(qkv, lengths, slopes)).abs().max() < 5e-6


@pytest.mark.parametrize("attend", [attend_by_runs, attend_padded, attend_varlen])
def test_alibi_together_with_causal_or_grouped_attention_is_refused(attend: Attend) -> None:
    q, k, v = torch.randn(3, 5, 4, 16).unbind(0)
    slopes = alibi_slopes(4, q.device)
    with pytest.raises(ValueError, match="ALiBi"):
        attend(q, k, v, layout_of([5]), causal=True, slopes=slopes)
    with pytest.raises(ValueError, match="ALiBi"):
        attend(q, k[:, :2], v[:, :2], layout_of([5]), slopes=slopes)


@pytest.mark.parametrize("attend", [attend_by_runs, attend_padded])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("causal", [False, True], ids=["both directions", "causal"])
def test_grouped_and_causal_attention_is_its_formula(
    attend: Attend, lengths: list[int], heads: int, kv_heads: int, causal: bool
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), heads + 2 * kv_heads, 24)
    found = attend(*qkv.split([heads, kv_heads, kv_heads], dim=1), layout_of(lengths), causal=causal)
    assert (found.double() - exact(qkv, lengths, kv_heads=kv_heads, causal=causal)).abs().max() < 5e-6


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("attend", [pytest.param(one, marks=GPU) for one in (attend_varlen, attend_padded)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("kind", ["plain", "alibi", "causal, grouped"])
@pytest.mark.parametrize("head_dim", [64, 26])
def test_attention_on_cuda_is_its_formula(
    attend: Attend, dtype: torch.dtype, lengths: list[int], kind: str, head_dim: int
) -> None:
    torch.manual_seed(0)
    causal = kind.startswith("causal")
    kv_heads = 2 if causal else 4
    qkv = torch.randn(sum(lengths), 4 + 2 * kv_heads, head_dim).to("cuda", dtype)
    slopes = alibi_slopes(4, qkv.device) if kind == "alibi" else None
    layout = layout_of(lengths, "cuda")
    found = attend(*qkv.split([4, kv_heads, kv_heads], dim=1), layout, causal=causal, slopes=slopes)
    expected = exact(qkv.cpu(), lengths, None if slopes is None else slopes.cpu(), kv_heads=kv_heads, causal=causal)
    assert (found.double().cpu() - expected).abs().max() < TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both directions", "causal"])
def test_our_kernel_agrees_with_the_librarys(dtype: torch.dtype, causal: bool) -> None:
    from embedserve.kernels.attention_triton import attend_triton

    torch.manual_seed(0)
    lengths = [1, 16, 513, 2, 2048, 33]
    qkv = torch.randn(sum(lengths), 3, 8, 64).to("cuda", dtype)
    layout = layout_of(lengths, "cuda")
    found, library = (attend(*qkv.unbind(1), layout, causal=causal) for attend in (attend_triton, attend_varlen))
    assert (found.float() - library.float()).abs().max() < TOLERANCE[dtype]


def test_more_rows_than_the_librarys_grid_takes_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="Triton is published for Linux alone")
    from embedserve.kernels import attention_triton

    monkeypatch.setattr(attention_triton, "attend_triton", lambda q, *_, **__: q.flatten(1))
    monkeypatch.setattr(attention, "_MOST_ROWS", 2)
    q = torch.randn(3, 2, 16, dtype=torch.float16)
    assert torch.equal(attend_varlen(q, q, q, layout_of([1, 1, 1])), q.flatten(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [65_535, 65_536])
def test_any_number_of_rows_runs(rows: int) -> None:
    qkv = torch.randn(rows, 3, 2, 32, device="cuda", dtype=torch.float16)
    # A token that sees itself alone is its own value.
    found = attend_varlen(*qkv.unbind(1), layout_of([1] * rows, "cuda"))
    assert torch.equal(found, qkv[:, 2].flatten(1))
