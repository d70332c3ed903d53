"""FiLM: identity at the start, its equation on both sides, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orbit import adapter
from orbit.model import FiLM, auto_initialize
from orbit.model.errors import SettingError, ShapeError


def moved(**options: int) -> FiLM:
    film = FiLM(3, 4, **options)
    nn.init.normal_(film.proj.weight)
    nn.init.normal_(film.proj.bias)
    return film


def test_a_fresh_block_is_the_identity() -> None:
    x, c = torch.randn(2, 5, 4), torch.randn(2, 3)
    film = FiLM(3, 4)
    assert torch.equal(film(x, c), x)
    film(x, c).sum().backward()
    assert film.proj.weight.grad.abs().sum() > 0


def test_auto_initialize_leaves_it_the_identity() -> None:
    x, c, net = torch.randn(2, 5, 4), torch.randn(2, 3), nn.ModuleList([moved(), nn.Linear(4, 4)])
    assert auto_initialize(net).counts == {"modulation": 1, "linear": 1}
    assert torch.equal(net[0](x, c), x)
    adapter.inject(net, adapter.AdapterConfig(r=2, targets=("proj",)), "task")  # and it is a Linear still
    assert torch.equal(net[0](x, c), x)


def test_the_equation_with_channels_first_and_last() -> None:
    x, c = torch.randn(2, 4, 6, 5), torch.randn(2, 3)
    film = moved(channel_dim=1)
    gamma, beta = film.proj(c).chunk(2, 1)
    wanted = x * (1 + gamma)[:, :, None, None] + beta[:, :, None, None]
    torch.testing.assert_close(film(x, c), wanted)
    film.channel_dim = -1
    torch.testing.assert_close(film(x.movedim(1, -1), c), wanted.movedim(1, -1))


def test_a_context_for_every_position() -> None:
    x, c, film = torch.randn(2, 5, 4), torch.randn(2, 5, 3), moved()
    each = torch.stack([film(x[:, t : t + 1], c[:, t])[:, 0] for t in range(5)], 1)
    torch.testing.assert_close(film(x, c), each)


def test_refused() -> None:
    film = FiLM(3, 4, channel_dim=1)
    with pytest.raises(ShapeError, match=r"\(2, 5, 4\).*dimension 1 of width 4"):
        film(torch.randn(2, 5, 4), torch.randn(2, 3))
    with pytest.raises(ShapeError, match=r"give one a sample, \(2, 3\)"):
        film(torch.randn(2, 4, 5), torch.randn(3, 3))
    with pytest.raises(ShapeError, match=r"context of the shape \(2, 5\): this block reads 3 features"):
        film(torch.randn(2, 4, 5), torch.randn(2, 5))
    with pytest.raises(SettingError, match="channel_dim=2"):
        FiLM(3, 4, channel_dim=2)
    with pytest.raises(SettingError, match="features=0"):
        FiLM(3, 0)
