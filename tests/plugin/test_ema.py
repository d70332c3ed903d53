from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import EMA, EmaHook, Plugin
from tests import tiny


def engine(*plugins: Plugin) -> Engine:
    model = tiny.model()
    return Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=list(plugins), device="cpu")


class Follow(Plugin):
    """The averages by the formula, written out."""

    priority = 1000

    def __init__(self, decay: float, every: int) -> None:
        self.decay, self.every = decay, every
        self.means: dict[str, torch.Tensor] = {}

    def on_before_train(self, trainer: Any) -> None:
        self.means = {name: t.clone() for name, t in trainer.model.state_dict().items()}

    def on_after_optimizer_step(self, trainer: Any) -> None:
        if trainer.step % self.every:
            return
        for name, t in trainer.model.state_dict().items():
            floats = t.is_floating_point()
            self.means[name] = self.decay * self.means[name] + (1 - self.decay) * t if floats else t.clone()


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_that_of_the_formula(every: int) -> None:
    ema, follow = EmaHook(0.8, update_interval=every), Follow(0.8, every)
    run = engine(follow, ema)
    run.run(tiny.loader(), num_epochs=2)
    assert ema.ema_model is not None
    found = ema.ema_model.state_dict()
    for name, mean in follow.means.items():
        torch.testing.assert_close(found[name], mean)
    assert not torch.equal(found["1.running_mean"], run.model.state_dict()["1.running_mean"])
    assert found["1.num_batches_tracked"] == (14 if every == 1 else 12)
    assert not any(p.requires_grad for p in ema.ema_model.parameters())


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, left, right))


@pytest.mark.parametrize("way_out", ["end", "break", "raise"])
def test_evaluation_runs_on_the_average_and_leaves_the_weights_as_they_were(way_out: str) -> None:
    ema = EMA(0.5)
    run = engine(ema)
    for _ in run.train(tiny.loader(), num_epochs=1):
        run.auto_update()
    assert ema.ema_model is not None
    own, mean = weights(run.model), weights(ema.ema_model)
    assert not same(own, mean)
    try:
        for _ in run.eval(tiny.loader()):
            run.auto_update()
            assert same(weights(run.model), mean)
            state = run.state_dict()
            assert same(list(state["model"].values()), own), "a checkpoint made here is of the model"
            assert same(list(state["EMA"].values()), mean)
            if way_out == "break":
                break
            if way_out == "raise":
                raise KeyError
    except KeyError:
        assert way_out == "raise"
    assert same(weights(run.model), own)
    assert same(weights(ema.ema_model), mean)


def test_without_swap_evaluation_runs_on_the_model() -> None:
    ema = EMA(0.5, swap=False)
    run = engine(ema)
    run.run(tiny.loader(), num_epochs=1)
    own = weights(run.model)
    for _ in run.eval(tiny.loader()):
        assert same(weights(run.model), own)


def test_a_run_that_began_without_it_starts_from_the_loaded_weights() -> None:
    first = engine()
    first.run(tiny.loader(), num_epochs=1)
    ema = EMA(0.9)
    second = engine(ema)
    second.load_state_dict(first.state_dict())
    second.build()
    assert ema.ema_model is not None
    assert same(weights(ema.ema_model), weights(first.model))


@pytest.mark.parametrize("arguments", [{"decay": 1.0}, {"decay": -0.1}, {"update_interval": 0}])
def test_bad_arguments(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"EMA\({next(iter(arguments))}="):
        EMA(**arguments)
