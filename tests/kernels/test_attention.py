"""Packed attention: each row attends to itself alone, in both directions, whatever stands beside it."""

import itertools

import pytest
import torch

from embedserve.kernels.attention import Attend, Layout, attend_by_runs, attend_padded, attend_varlen

LENGTHS = [[1], [5], [1, 1, 1], [5, 123], [2, 2, 7, 7, 7, 96, 97, 97, 300], [128] * 3]


def layout_of(lengths: list[int], device: str = "cpu") -> Layout:
    cu = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    runs, start = [], 0
    for length, group in itertools.groupby(lengths):
        rows = len(list(group))
        runs.append((start, rows, length))
        start += rows * length
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])
    rows_of = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    return Layout(cu.to(device), rows_of.to(device), positions.to(device), max(lengths), tuple(runs))


def exact(qkv: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The formula, row by row, in float64."""
    outputs = []
    for row in torch.split(qkv.double(), lengths):
        q, k, v = row.permute(1, 2, 0, 3)
        weights = torch.softmax(q @ k.transpose(1, 2) / row.shape[-1] ** 0.5, dim=-1)
        outputs.append((weights @ v).permute(1, 0, 2).flatten(1))
    return torch.cat(outputs)


@pytest.mark.parametrize("attend", [attend_by_runs, attend_padded])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 7])
def test_attention_is_its_formula(attend: Attend, lengths: list[int], head_dim: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 3, head_dim)
    found = attend(*qkv.unbind(1), layout_of(lengths))
    assert found.shape == (sum(lengths), 3 * head_dim)
    assert (found.double() - exact(qkv, lengths)).abs().max() < 5e-6


@pytest.mark.parametrize("attend", [attend_by_runs, attend_padded])
def test_a_broken_row_leaves_its_neighbours_alone(attend: Attend) -> None:
    lengths = [4, 4, 9]
    qkv = torch.randn(17, 3, 2, 8)
    clean = attend(*qkv.unbind(1), layout_of(lengths))
    qkv[5] = float("nan")
    found = attend(*qkv.unbind(1), layout_of(lengths))
    assert found[4:8].isnan().any()
    assert torch.equal(found[:4], clean[:4])
    assert torch.equal(found[8:], clean[8:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_varlen_attention_agrees_with_the_formula(dtype: torch.dtype, lengths: list[int]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 3, 64).to("cuda", dtype)
    found = attend_varlen(*qkv.unbind(1), layout_of(lengths, "cuda"))
    tolerance = 4e-3 if dtype == torch.float16 else 3e-2
    assert (found.double().cpu() - exact(qkv.cpu(), lengths)).abs().max() < tolerance


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_padded_attention_on_cuda_agrees_with_the_formula(lengths: list[int]) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, 3, 64, device="cuda")
    found = attend_padded(*qkv.unbind(1), layout_of(lengths, "cuda"))
    assert (found.double().cpu() - exact(qkv.cpu(), lengths)).abs().max() < 2e-5
