"""A state that cannot be loaded, at whatever stage that shows, leaves the run as it was."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

from orbit.core import CheckpointError
from orbit.engine import Engine
from orbit.plugin import EMA, EarlyStopping, Plugin
from tests import tiny


class Moody(Plugin):
    """Remembers one number, and takes no other kind of thing."""

    value = 1

    def on_state_dict(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        state_dict["Moody"] = {"value": self.value}

    def on_load_state_dict(self, trainer: Any, state_dict: dict[str, Any]) -> None:
        self.value = state_dict["Moody"]["value"] + 0


def run(steps: int, state: Any = None) -> tiny.Trainer:
    torch.manual_seed(7)
    plugins = [EMA(0.9), EarlyStopping("train_loss", patience=50), Moody()]
    trainer = tiny.Trainer(max_steps=steps, plugins=plugins)
    if state is not None:
        trainer.load_state_dict(state)
    trainer.train()
    return trainer


def set_at(*way: Any) -> Callable[[dict[str, Any]], None]:
    *parents, last, value = way

    def change(state: dict[str, Any]) -> None:
        node: Any = state
        for key in parents:
            node = node[key]
        node[last] = value

    return change


def nan_in(*way: Any) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        node: Any = state
        for key in way:
            node = node[key]
        node.view(-1)[0] = float("nan")

    return change


SPOILT: dict[str, tuple[Callable[[dict[str, Any]], None], str | None]] = {
    "model: another kind": (set_at("model", [1]), "checkpoint's model is a list"),
    "model: a tensor is a number": (set_at("model", "0.weight", 3.0), "0.weight is a float"),
    "model: another shape": (set_at("model", "0.weight", torch.ones(2)), "is of another model"),
    "model: NaN": (nan_in("model", "0.weight"), "model '0.weight' is not finite"),
    "model: NaN in a buffer": (nan_in("model", "1.running_mean"), "model '1.running_mean' is not finite"),
    "optimizer: NaN": (nan_in("optimizer", "state", 0, "exp_avg"), r"optimizer\['state'\]\[0\]\['exp_avg'\]"),
    "optimizer: no groups": (set_at("optimizer", "param_groups", []), "parameter groups"),
    "optimizer: another kind": (set_at("optimizer", "adamw"), "checkpoint's optimizer is a str"),
    "scheduler: another kind": (set_at("lr_scheduler", 3), "checkpoint's lr_scheduler is a int"),
    "updater: another kind": (set_at("updater", []), "checkpoint's updater is a list"),
    "updater: empty": (set_at("updater", {}), None),
    "counters: missing": (set_at("state", {}), r"checkpoint's state\['step'\] is absent"),
    "counters: negative": (set_at("state", "epoch", -1), r"state\['epoch'\] is -1"),
    "counters: another step": (set_at("step", 999), "step is 999, and the counters say"),
    "metrics": (set_at("state", "metrics", 3), "'metrics'.* is no dict"),
    "losses: another kind": (set_at("ranks", 0, "epoch_losses", 3), "epoch_losses.* is no list"),
    "losses: garbled": (set_at("ranks", 0, "epoch_losses", [3]), None),
    "feed: another kind": (set_at("ranks", 0, "feed", 3), "no place in the data"),
    "feed: cursor": (set_at("ranks", 0, "feed", "cursor", 10**30), r"\['cursor'\] is 1000"),
    "rng: another kind": (set_at("ranks", 0, "rng", None), "no state of the random generators"),
    "rng: PyTorch's": (set_at("ranks", 0, "rng", "torch", torch.ones(3)), "no state of the random"),
    "rng: Python's": (set_at("ranks", 0, "rng", "python", [3, [1], None]), "no state of the random"),
    "rng: NumPy's": (set_at("ranks", 0, "rng", "numpy", "MT"), "no state of the random"),
    "rng: of the epoch": (set_at("ranks", 0, "feed", "start", "rng", {}), "start.* no state of the random"),
    "ranks: none": (set_at("ranks", []), "ranks is empty"),
    "EMA: another model": (set_at("EMA", {"w": torch.ones(1)}), "Missing key"),
    "EMA: another kind": (set_at("EMA", 3), None),
    "a plugin of the user's": (set_at("Moody", "value", "x"), None),
}


@pytest.mark.parametrize("name", SPOILT)
def test_the_run_goes_on_as_if_nothing_had_been_tried(name: str) -> None:
    spoil, message = SPOILT[name]
    source = run(10)
    spoilt = deepcopy(source.state_dict())
    spoil(spoilt)
    trainer = run(5)
    before = deepcopy(trainer.state_dict())
    generator = torch.get_rng_state()
    with pytest.raises(
        (CheckpointError, ValueError, RuntimeError, TypeError, LookupError, AttributeError), match=message
    ):
        trainer.load_state_dict(spoilt)
    assert torch.equal(torch.get_rng_state(), generator)
    after = trainer.state_dict()
    assert str(after) == str(before)
    assert same(after, before)
    trainer.load_state_dict(source.state_dict())
    assert trainer.step == 10, "and a good one can be loaded after it"


def same(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


def test_infinity_is_refused_in_what_trains_and_allowed_in_buffers_and_frozen_weights() -> None:
    trainer = run(3)
    state = deepcopy(trainer.state_dict())
    state["model"]["1.running_var"][0] = float("inf")
    trainer.load_state_dict(state)
    state["model"]["4.bias"][0] = float("-inf")
    with pytest.raises(CheckpointError, match=r"model '4.bias' is not finite"):
        trainer.load_state_dict(state)
    trainer.model.get_parameter("4.bias").requires_grad_(False)
    trainer.load_state_dict(state)


def test_a_criterion_that_learns_is_put_back_too() -> None:
    class Failing(Plugin):
        fails = False

        def on_load_state_dict(self, trainer: Any, state_dict: dict[str, Any]) -> None:
            if self.fails:
                self.fails = False
                raise RuntimeError("not now")

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return ((output * self.scale - target) ** 2).mean()

    model, criterion, failing = nn.Linear(2, 1), Scaled(), Failing()
    optimizer = torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)
    engine = Engine(model, optimizer, criterion, plugins=[failing], device="cpu")
    early = deepcopy(engine.state_dict())
    for _ in engine.train([(torch.ones(4, 2), torch.zeros(4, 1))] * 2):
        engine.auto_update()
    learned, failing.fails = criterion.scale.item(), True
    assert learned != 1.0
    with pytest.raises(RuntimeError, match="not now"):
        engine.load_state_dict(early)
    assert criterion.scale.item() == learned
