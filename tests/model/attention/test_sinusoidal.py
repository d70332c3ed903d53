"""Sinusoidal positions against the paper's formula in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orbit.model import SinusoidalPositionalEmbedding
from orbit.model.errors import SettingError, ShapeError

D = 12


def paper(positions: np.ndarray, base: float = 10000.0) -> torch.Tensor:
    table = np.zeros((*positions.shape, D))
    for i in range(D // 2):
        table[..., 2 * i] = np.sin(positions / base ** (2 * i / D))
        table[..., 2 * i + 1] = np.cos(positions / base ** (2 * i / D))
    return torch.from_numpy(table).float()


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_formula(base: float):
    block = SinusoidalPositionalEmbedding(D, base)
    torch.testing.assert_close(block.encode(torch.arange(50)), paper(np.arange(50), base), atol=5e-6, rtol=0)


def test_adds_to_what_comes_in():
    block, x = SinusoidalPositionalEmbedding(D), torch.randn(2, 7, D)
    torch.testing.assert_close(block(x), x + paper(np.arange(7)))
    positions = torch.tensor([[0, 0, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8, 9]])
    torch.testing.assert_close(block(x, positions), x + paper(positions.numpy()))
    torch.testing.assert_close(block(x, positions[1]), x + paper(positions[1].numpy()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_of_the_input(dtype: torch.dtype):
    """Positions are made in float32: bfloat16 cannot count beyond 256."""
    x = torch.zeros(1, 1, D, dtype=dtype)
    found = SinusoidalPositionalEmbedding(D)(x, torch.tensor([301]))
    assert found.dtype is dtype
    torch.testing.assert_close(found.float(), paper(np.array([[301]])), atol=5e-3, rtol=0)


def test_nothing_is_stored():
    assert SinusoidalPositionalEmbedding(D).state_dict() == {}


def test_bad_input():
    for width in (7, 0):
        with pytest.raises(SettingError, match=f"hidden_size {width}"):
            SinusoidalPositionalEmbedding(width)
    with pytest.raises(SettingError, match="base 0"):
        SinusoidalPositionalEmbedding(D, 0.0)
    block = SinusoidalPositionalEmbedding(D)
    with pytest.raises(ShapeError, match=r"\(B, T, 12\)"):
        block(torch.zeros(2, 3, D + 2))
    with pytest.raises(ShapeError, match="do not fit"):
        block(torch.zeros(2, 3, D), torch.arange(4))
    with pytest.raises(ShapeError, match="integers"):
        block(torch.zeros(2, 3, D), torch.zeros(3))
