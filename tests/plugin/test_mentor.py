from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from orbit.core.update import NonFiniteGradientError
from orbit.engine import Engine
from orbit.plugin import Mentor, Plugin
from tests import tiny


def advice(train: list[float], val: list[float] | None = None, **options: float) -> list[str]:
    """What Mentor says over these epochs, and that each line is printed."""
    out = io.StringIO()
    mentor = Mentor(console=Console(file=out, width=200), **options)  # type: ignore[arg-type]
    engine = Engine(tiny.model(), None, nn.CrossEntropyLoss(), plugins=[mentor], device="cpu")
    mentor.on_before_train(engine)
    for epoch, loss in enumerate(train):
        engine.state.epoch = epoch
        engine.metrics["train_loss"] = loss
        if val is not None:
            engine.metrics["val_loss"] = val[epoch]
        mentor.on_after_epoch(engine)
    lines = out.getvalue().splitlines()
    assert f"epoch {len(train)}  step 0  train_loss {train[-1]:.4f}" in "\n".join(lines)
    assert len(lines) == len(train) + len(mentor.advice)
    assert all(str(verdict) in out.getvalue() for verdict in mentor.verdicts)
    return mentor.advice


def test_a_healthy_run_gets_no_advice() -> None:
    assert advice([3.0, 2.0, 1.5, 1.2, 1.0], [3.0, 2.1, 1.8, 1.6, 1.5]) == []


def test_divergence() -> None:
    assert "2.5 times its best" in advice([2.0, 1.0, 2.5])[0]


def test_not_finite() -> None:
    assert "training loss of the epoch is not finite (loss nan)" in advice([2.0, math.nan])[0]
    assert "validation loss is not finite (val loss inf)" in advice([2.0, 1.0], [2.0, math.inf])[0]


def test_plateau() -> None:
    assert "has not fallen for 3 epochs (it is 1)" in advice([2.0, 1.0, 1.0, 1.0, 1.0], patience=3)[0]
    assert advice([2.0, 1.0, 1.0, 0.9], patience=3) == []


def test_overfitting() -> None:
    (line,) = advice([3.0, 2.0, 1.5], [1.0, 1.1, 1.2])
    assert "validation loss rises while the training loss falls: 1.2 after 1 2 epochs ago" in line
    assert "stop earlier, regularise, or find more data" in line


def test_oscillation() -> None:
    assert "swings up and down by 1 around 1.5" in advice([2.0, 1.0] * 4)[0]


def test_a_verdict_is_given_once_until_it_was_untrue_for_a_while() -> None:
    down = [1.0 * 0.8**n for n in range(10)]
    assert len(advice([1.0] * 12)) == 1
    assert len(advice([1.0] * 6 + [0.5, 0.4] + [0.4] * 6)) == 1
    assert len(advice([1.0] * 6 + [0.9 * loss for loss in down] + [0.05] * 6)) == 2


@pytest.mark.parametrize("options", [{"patience": 0}, {"divergence_threshold": 1.0}, {"interval": 0}])
def test_bad_arguments(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Mentor"):
        Mentor(**options)  # type: ignore[arg-type]


def test_it_prints_in_a_real_run(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.model()
    Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), device="cpu").run(
        tiny.loader(), tiny.loader(20), num_epochs=2
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "epoch 2  step 14" in lines[1]
    assert "val_acc" in lines[1]


# ── real runs, healthy and sick ───────────────────────────────────────────────────────────────────────────────


def data(samples: int, seed: int = 0, wrong: float = 0.1) -> TensorDataset:
    """A linear rule with noise, and a share of labels drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 10, generator=draw)
    rule = torch.randn(10, 2, generator=torch.Generator().manual_seed(99))
    y = (x @ rule + 0.3 * torch.randn(samples, 2, generator=draw)).argmax(1)
    random = torch.rand(samples, generator=draw) < wrong
    return TensorDataset(x, torch.where(random, torch.randint(2, (samples,), generator=draw), y))


def run(
    optimizer: Any, train: TensorDataset, epochs: int, batch: int = 16, val: Any = None, **options: Any
) -> list[Any]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
    mentor = Mentor(console=Console(file=io.StringIO()), **options)
    engine = Engine(
        model, optimizer(model.parameters()), nn.CrossEntropyLoss(), plugins=[mentor], device="cpu"
    )
    engine.run(
        DataLoader(train, batch, shuffle=True),
        None if val is None else DataLoader(val, 512),
        num_epochs=epochs,
    )
    return mentor.verdicts


def sgd(lr: float) -> Any:
    return lambda p: torch.optim.SGD(p, lr=lr)


def adam(lr: float) -> Any:
    return lambda p: torch.optim.Adam(p, lr=lr)


@pytest.mark.parametrize(
    ("optimizer", "batch", "epochs"),
    [(adam(1e-3), 16, 8), (adam(1e-5), 16, 8), (sgd(1e-2), 4, 3), (adam(1e-3), 4, 1), (sgd(0.1), 1, 1)],
    ids=["adam", "small rate", "noisy batches", "one epoch", "single samples"],
)
def test_healthy_runs_get_no_advice(optimizer: Any, batch: int, epochs: int) -> None:
    assert run(optimizer, data(2000), epochs, batch, val=data(500, seed=5)) == []


def test_a_rate_too_high_diverges_within_its_only_epoch() -> None:
    first = run(sgd(500.0), data(2000), epochs=1)[0]
    assert (first.kind, first.epoch, first.step) == ("divergence", 0, 50)
    assert first.evidence["loss"] > 100 * first.evidence["best"]
    assert "lower the learning rate" in first.suggestion
    assert f"{first.evidence['loss']:.4g}" in first.finding


def test_memorising_a_small_set_is_overfitting() -> None:
    verdicts = run(adam(3e-3), data(60, wrong=0.3), 40, batch=20, val=data(500, seed=5, wrong=0.3))
    assert [verdict.kind for verdict in verdicts] == ["overfitting"]
    assert verdicts[0].evidence["val_loss"] > verdicts[0].evidence["best"]
    assert verdicts[0].evidence["train_fell"] > 0


def test_what_does_not_train_is_a_plateau_over_epochs_and_within_one() -> None:
    (over_epochs,) = run(sgd(1e-12), data(400), 8)
    assert (over_epochs.kind, over_epochs.epoch) == ("plateau", 3)
    assert abs(over_epochs.evidence["fall"]) < 1e-4
    within = run(sgd(1e-12), data(64_000), 1, batch=64, interval=20)
    assert [(verdict.kind, verdict.epoch) for verdict in within] == [("plateau", 0)]
    assert "intervals of 20 steps" in within[0].finding


@pytest.mark.parametrize("lr", [6.0, 8.0, 12.0])
def test_at_the_edge_of_stability_the_loss_oscillates(lr: float) -> None:
    """The whole set in every step, so that nothing but the rate moves the loss."""
    kinds = [verdict.kind for verdict in run(sgd(lr), data(64, wrong=0.0), 12, batch=64)]
    assert "oscillation" in kinds
    assert "oscillation" not in [v.kind for v in run(sgd(0.3), data(64, wrong=0.0), 12, batch=64)]


class Poison(Plugin):
    """Makes the gradient of some steps not finite."""

    priority = -1

    def __init__(self, steps: range) -> None:
        self.steps = steps

    def on_before_batch(self, trainer: Any) -> None:
        if trainer.state.micro_step in self.steps:
            trainer.use_batch([trainer.batch[0] * math.nan, trainer.batch[1]])


@pytest.mark.parametrize("face", ["engine", "trainer"])
def test_a_gradient_that_is_not_finite(face: str) -> None:
    def train(mentor: Mentor, steps: range, retries: int | None) -> None:
        if face == "trainer":
            plugins = [mentor, Poison(steps)]
            tiny.Trainer(max_steps=6, plugins=plugins, max_non_finite_grad_retries=retries).train()
            return
        model = tiny.model()
        engine = Engine(
            model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[mentor, Poison(steps)], device="cpu",
            max_non_finite_grad_retries=retries,
        )  # fmt: skip
        engine.run(tiny.loader(samples=56), num_epochs=1)

    dropped = Mentor(console=Console(file=io.StringIO()))
    train(dropped, range(3, 5), retries=2)
    (verdict,) = dropped.verdicts
    assert (verdict.kind, verdict.step, verdict.evidence) == ("nan", 2, {"dropped": 1})

    out = io.StringIO()
    ended = Mentor(console=Console(file=out, width=200))
    with pytest.raises(NonFiniteGradientError):
        train(ended, range(3, 4), retries=None)
    (verdict,) = ended.verdicts
    assert (verdict.kind, verdict.step) == ("nan", 2)
    assert math.isnan(verdict.evidence["grad_norm"])
    assert verdict.evidence["best_loss"] <= verdict.evidence["last_loss"] < 10
    assert "The gradient is not finite (grad norm nan, last loss" in out.getvalue()


def test_an_overflow_of_the_fp16_scale_is_no_finding() -> None:
    model = tiny.model()
    mentor = Mentor(console=Console(file=io.StringIO()))
    engine = Engine(
        model,
        tiny.optimizer(model),
        nn.CrossEntropyLoss(),
        plugins=[mentor],
        device="cpu",
        mixed_precision="fp16",
    )
    engine.build()
    assert engine.grad_scaler is not None
    engine.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    engine._make_updater()
    engine.run(tiny.loader(samples=200))
    assert engine.grad_scaler.get_scale() < 2.0**30
    assert mentor.verdicts == []


def test_losses_stay_on_their_device_between_intervals() -> None:
    mentor = Mentor(console=Console(file=io.StringIO()), interval=4)
    model, waiting = tiny.model(), []
    engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[mentor], device="cpu")
    for _ in engine.train(tiny.loader(), num_epochs=1):
        waiting.append(len(mentor._losses))
        assert all(isinstance(loss, torch.Tensor) for loss in mentor._losses)
        engine.auto_update()
    assert waiting == [0, 1, 2, 3, 0, 1, 2]
    assert len(mentor._windows) == 1


def test_verdicts_survive_a_resume_and_are_those_of_the_uninterrupted_run() -> None:
    def half(stop: int | None, state: Any = None) -> tuple[Engine, Mentor]:
        model = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 2))
        mentor = Mentor(console=Console(file=io.StringIO()), interval=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=200.0)
        engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[mentor], device="cpu")
        if state is not None:
            engine.load_state_dict(state)
        for _ in engine.train(DataLoader(data(400), 16, shuffle=True), num_epochs=3):
            engine.auto_update()
            if engine.step == stop:
                engine.stop()
        return engine, mentor

    torch.manual_seed(0)
    _, whole = half(None)
    torch.manual_seed(0)
    first, before = half(33)
    _, resumed = half(None, first.state_dict())
    assert len(before.verdicts) > 0
    assert resumed.verdicts == whole.verdicts
    assert resumed._windows == whole._windows
