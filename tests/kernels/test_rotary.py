"""Rotary positions against complex numbers in float64, and against transformers."""

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding, apply_rotary_pos_emb

from embedserve.kernels.rotary import rotary_angles, rotate

THETA = 1e6
POSITIONS = torch.cat([torch.arange(200), torch.arange(32_700, 32_768)]).int()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def turned(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`(x_i + i x_(i+d/2)) · e^(i · position · theta^(-2i/d))`, in float64."""
    half = x.shape[-1] // 2
    frequencies = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = positions.double()[:, None, None] * frequencies
    product = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angles)
    return torch.cat([product.real, product.imag], dim=-1)


@pytest.mark.parametrize("heads", [1, 3, 24])
@pytest.mark.parametrize("head_dim", [2, 16, 128])
def test_rotation_is_its_formula(heads: int, head_dim: int) -> None:
    positions = torch.arange(200).int()
    x = torch.randn(200, heads, head_dim)
    found = rotate(x, *rotary_angles(positions, head_dim, THETA))
    # An angle is a float32 product: 200 radians come with an error of 1e-5.
    assert (found.double() - turned(x, positions)).abs().max() < 1e-4


def test_position_zero_stays_and_no_length_changes() -> None:
    x = torch.randn(len(POSITIONS), 3, 128)
    found = rotate(x, *rotary_angles(POSITIONS, 128, THETA))
    assert torch.equal(found[0], x[0])
    assert torch.allclose(found.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_products_depend_on_the_distance_alone() -> None:
    """What rotary positions are for: q at position 5 sees k at 3 as q at 1005 sees k at 1003."""
    q, k = torch.randn(128), torch.randn(128)

    def product(first: int, second: int) -> float:
        angles = rotary_angles(torch.tensor([first, second]).int(), 128, THETA)
        a, b = rotate(torch.stack([q, k])[:, None], *angles)
        return float((a * b).sum())

    assert product(5, 3) == pytest.approx(product(1005, 1003), abs=1e-3)
    assert abs(product(5, 3) - product(3, 5)) > 1e-2


def test_angles_and_rotation_are_those_of_transformers_at_every_position() -> None:
    reference = Qwen3RotaryEmbedding(Qwen3Config(head_dim=128, rope_theta=THETA))
    x = torch.randn(len(POSITIONS), 3, 128)
    cos, sin = reference(x[None], POSITIONS[None].long())
    ours = rotary_angles(POSITIONS, 128, THETA)
    assert torch.equal(ours[0], cos[0, :, :64])
    assert torch.equal(ours[1], sin[0, :, :64])
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos, sin, unsqueeze_dim=2)
    assert (rotate(x, *ours) - expected[0]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(len(POSITIONS), 3, 128).to(dtype)
    angles = rotary_angles(POSITIONS, 128, THETA)
    found = rotate(x, *angles)
    assert found.dtype == dtype
    assert torch.equal(found, rotate(x.float(), *angles).to(dtype))


def test_strided_views_are_read_and_left() -> None:
    wide = torch.randn(200, 5, 16)
    before = wide.clone()
    angles = rotary_angles(torch.arange(200).int(), 16, THETA)
    assert torch.equal(rotate(wide[:, 1:4], *angles), rotate(wide[:, 1:4].contiguous(), *angles))
    assert torch.equal(wide, before)
