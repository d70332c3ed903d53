"""Buffers that forwards move are put back; the others are not copied."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orbit.core.buffers import Buffers


class Assigned(nn.Module):
    """A mean that is replaced, not changed in place, and grows."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = torch.cat([0.9 * self.mean, x.mean().reshape(1)])
        return x


def values(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in model.buffers()]


class Uncounted(nn.Module):
    """torch's kernel moves its buffers and counts no version; it has no count of its own either."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.mean, self.var, training=True)


MODELS: dict[str, Any] = {
    "batch norm": lambda: nn.BatchNorm1d(3),
    "instance norm": lambda: nn.InstanceNorm1d(3, track_running_stats=True),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
    "assigned": Assigned,
    "uncounted": Uncounted,
    "none": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("windows", [0, 1, 3])
def test_what_forwards_move_is_put_back(name: str, windows: int) -> None:
    model = MODELS[name]()
    batch = torch.randn(4, 3) if name != "instance norm" else torch.randn(2, 3, 4)
    buffers = Buffers(model)
    for _ in range(windows):
        buffers.keep()
        model(batch)
    for _ in range(2):  # dropped twice in a row
        buffers.keep()
        before = values(model)
        model(batch)
        model(batch * math.nan)
        buffers.put_back()
        assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))


def test_a_norm_that_begins_to_move_later_is_seen_by_its_count() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[1].eval()
    buffers = Buffers(model)
    for window in range(4):
        if window == 2:
            model[1].train()
        buffers.keep()
        before = values(model)
        model(torch.randn(4, 3))
        if window > 2:
            buffers.put_back()
            assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
    assert buffers._moving == {0, 1, 2, 3, 4, 5}


def test_what_stays_is_not_copied() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), Assigned())
    model[1].mean = torch.zeros(1)
    model[1].forward = lambda x: x + model[1].table  # type: ignore[method-assign]
    model.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool))
    buffers = Buffers(model)
    for _ in range(3):
        buffers.keep()
        model(torch.randn(4, 6))
    assert buffers._moving is not None
    moving = {buffers._places[i][1] for i in buffers._moving}
    assert moving == {"running_mean", "running_var", "num_batches_tracked"}


def test_nothing_kept_nothing_put_back() -> None:
    model = nn.BatchNorm1d(3)
    before = values(model)
    Buffers(model).put_back()
    assert all(torch.equal(a, b) for a, b in zip(values(model), before, strict=True))
