"""Norms and ratios against those computed by hand; one copy to the host; the run's bits are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import GradientStats, Plugin
from orbit.plugin.gradient_stats import norms
from tests import tiny


class Logged(Plugin):
    def __init__(self) -> None:
        self.records: list[tuple[int, dict[str, Any]]] = []

    def on_log(self, trainer: Any, records: dict[str, Any], dry_run: bool) -> None:
        self.records.append((trainer.step, records))


class ByHand(Plugin):
    """The gradients and weights around each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_before_optimizer_step(self, trainer: Any) -> None:
        named = dict(trainer.model.named_parameters())
        self.steps.append({"grad": {n: p.grad.clone() for n, p in named.items()}})
        self.steps[-1]["before"] = {n: p.detach().clone() for n, p in named.items()}

    def on_after_optimizer_step(self, trainer: Any) -> None:
        self.steps[-1]["after"] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def train(plugins: list[Plugin], **options: Any) -> nn.Module:
    model = tiny.model()
    torch.manual_seed(7)
    engine = Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=plugins, device="cpu", **options
    )
    for _ in engine.train(tiny.loader()):
        engine.auto_update()
    return model


def norm(tensors: dict[str, Any], layer: str = "") -> float:
    return torch.cat([t.flatten() for name, t in tensors.items() if name.startswith(layer)]).norm().item()


def test_norms_and_ratios_of_every_layer() -> None:
    logged, hand = Logged(), ByHand()
    model = train([GradientStats(3), logged, hand], grad_clip_norm=0.1)
    assert [step for step, _ in logged.records] == [3, 6]
    for step, records in logged.records:
        seen = hand.steps[step - 1]
        moved = {name: seen["after"][name] - seen["before"][name] for name in seen["before"]}
        layers = ["0", "1", "4"]
        assert records["gradients"]["norm"] == pytest.approx(0.1, rel=1e-4)
        assert records["gradients"]["layer"] == pytest.approx({x: norm(seen["grad"], x) for x in layers})
        assert records["gradients"]["update"] == pytest.approx(
            {x: norm(moved, x) / norm(seen["before"], x) for x in layers}
        )
    assert tiny.same(model, train([], grad_clip_norm=0.1))


def test_layers_by_parts_of_the_name_or_the_whole_alone() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
    for per_layer, layers in (
        (1, ["0", "1"]),
        (2, ["0.0", "0.1", "1.weight", "1.bias"]),
        (True, ["0.0", "0.1", "1"]),
    ):
        plugin = GradientStats(1, per_layer=per_layer)
        engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[plugin], device="cpu")
        engine.run(tiny.loader(8))
        assert list(plugin.last["gradients"]["layer"]) == layers
    whole = GradientStats(1, per_layer=False)
    train([whole])
    assert set(whole.last["gradients"]) == {"norm", "update"}
    assert isinstance(whole.last["gradients"]["update"], float)
    bare = GradientStats(1, per_layer=False, updates=False)
    train([bare])
    assert set(bare.last["gradients"]) == {"norm"}


def test_frozen_and_unused_parameters_are_left_out_and_zero_weights_have_no_ratio() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    model.forward = lambda x: nn.Sequential.forward(model[:2], x)
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    plugin = GradientStats(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[plugin], device="cpu")
    engine.run(tiny.loader(8))
    assert plugin.last["gradients"]["update"] == {"1": 0.0}


def test_norms_of_sparse_and_half_precision_tensors() -> None:
    sparse = torch.sparse_coo_tensor([[0, 0]], [3.0, 4.0], (5,), check_invariants=True)
    half = torch.full((4, 1000), 100.0, dtype=torch.float16)  # its squares overflow float16
    assert norms([sparse, half]).tolist() == pytest.approx([7.0, half.float().norm().item()])


def test_values_outside_their_range() -> None:
    with pytest.raises(ValueError, match="interval=0"):
        GradientStats(0)
    with pytest.raises(ValueError, match="per_layer=0"):
        GradientStats(per_layer=0)
