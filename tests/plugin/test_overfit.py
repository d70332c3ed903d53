from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from orbit.engine import Engine
from orbit.plugin import Overfit, Plugin
from tests import tiny


def plain(seed: int = 1) -> nn.Module:
    """The tiny model without dropout."""
    model = tiny.model(seed)
    model[3].p = 0.0
    return model


class Batches(Plugin):
    """What is trained on."""

    priority = 900

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def on_after_batch(self, trainer: Any) -> None:
        self.seen.append(trainer.batch[0].clone())


def run(model: nn.Module, *plugins: Plugin, epochs: int = 30, lr: float = 1e-2, **options: Any) -> Engine:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=list(plugins), device="cpu", **options)
    for _ in engine.train(tiny.loader(), num_epochs=epochs):
        engine.auto_update()
    return engine


@pytest.mark.parametrize("face", ["engine", "trainer"])
def test_a_sound_program_memorises_and_stops(face: str) -> None:
    out = io.StringIO()
    plugin, batches = Overfit(until=0.1, console=Console(file=out, width=200)), Batches()
    if face == "engine":
        trainer: Any = run(plain(), plugin, batches)
    else:

        class Trainer(tiny.Trainer):
            def build_model(self) -> nn.Module:
                return plain()

        trainer = Trainer(max_steps=300, plugins=[plugin, batches])
        trainer.train()
    assert plugin.succeeded is True
    assert plugin.loss < 0.1
    assert trainer.step % 10 == 0
    assert trainer.step < 200
    assert all(torch.equal(x, batches.seen[0]) for x in batches.seen)
    assert trainer.state.stop[0] == "Overfit"
    assert (
        f"memorised the batch by step {trainer.step}: the loss is {plugin.loss:.4g}, under 0.1"
        in out.getvalue()
    )


def test_several_batches_come_in_turn_across_epochs_and_windows() -> None:
    batches = Batches()
    run(plain(), Overfit(batches=3, until=-1.0), batches, epochs=3, gradient_accumulation_steps=2)
    assert len(batches.seen) == 21  # epochs are as long as the loader
    assert not torch.equal(batches.seen[0], batches.seen[1])
    assert all(torch.equal(x, batches.seen[i % 3]) for i, x in enumerate(batches.seen))


def test_evaluation_sees_its_own_data() -> None:
    engine = run(plain(), Overfit(until=-1.0), epochs=1)
    rows = 0
    for _ in engine.eval(tiny.loader(20)):
        rows += len(engine.batch[0])
        engine.auto_update()
    assert rows == 20


def test_a_program_with_a_fault_gets_a_list_with_evidence() -> None:
    out = io.StringIO()
    model = tiny.model()
    model[0].requires_grad_(False)
    plugin = Overfit(until=1e-3, console=Console(file=out, width=200))
    run(model, plugin, epochs=4, lr=1e-6)
    assert plugin.succeeded is False
    hardly, frozen, dropout = plugin.suspects
    assert "hardly moved: is the learning rate (1e-06) too low" in hardly
    assert frozen.startswith("144 of 227 parameters are frozen")
    assert "(3): set it to 0" in dropout
    assert "not memorised in 28 steps: the loss went from" in out.getvalue()
    assert all(f"  - {line}" in out.getvalue() for line in plugin.suspects)


def test_a_rate_too_high_and_parameters_left_out() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model[1].parameters(), lr=5.0, weight_decay=0.1)
    plugin = Overfit(until=1e-3, interval=2)
    engine = Engine(model, optimizer, nn.MSELoss(), plugins=[plugin], device="cpu")
    for _ in engine.train([(torch.randn(4, 8), torch.randn(4, 3))] * 8):
        engine.auto_update()
    assert plugin.succeeded is False
    text = " | ".join(plugin.suspects)
    assert "the loss rose from" in text
    assert "lower the learning rate (5)" in text
    assert "36 of 51 parameters are not in the optimizer" in text
    assert "weight decay (0.1)" in text


def test_resumed_it_goes_on_with_the_same_batches() -> None:
    def halves(stop: int | None, state: Any = None) -> tuple[Engine, Overfit, Batches]:
        model = plain()
        plugin, batches = Overfit(batches=2, until=-1.0, interval=4), Batches()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[plugin, batches], device="cpu")
        if state is not None:
            engine.load_state_dict(state)
        for _ in engine.train(tiny.loader(), num_epochs=2):
            engine.auto_update()
            if engine.step == stop:
                engine.stop()
        return engine, plugin, batches

    torch.manual_seed(0)
    whole, plugin, seen = halves(None)
    torch.manual_seed(0)
    first, _, before = halves(5)
    resumed, other, after = halves(None, first.state_dict())
    assert tiny.same(resumed.model, whole.model)
    assert all(torch.equal(a, b) for a, b in zip([*before.seen, *after.seen], seen.seen, strict=True))
    assert (other.loss, other._first) == (plugin.loss, plugin._first)


def test_a_run_that_had_succeeded_stays_stopped_when_resumed() -> None:
    state = run(plain(), Overfit(until=0.1)).state_dict()
    engine = Engine(
        model := plain(), torch.optim.Adam(model.parameters()), nn.CrossEntropyLoss(), plugins=[Overfit(until=0.1)],
        device="cpu",
    )  # fmt: skip
    engine.load_state_dict(state)
    assert list(engine.train(tiny.loader(), num_epochs=30)) == []


@pytest.mark.parametrize("options", [{"batches": 0}, {"until": math.nan}, {"interval": 0}])
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Overfit"):
        Overfit(**options)
