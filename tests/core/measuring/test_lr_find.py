"""The range test finds a rate that trains, and leaves everything bit for bit as it was."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orbit.core import FeedError, Plugin
from orbit.core.measuring.lr_find import LRFind
from orbit.engine import Engine
from orbit.plugin import EMA, CheckpointingHook, GradientAccumulation, LoRA, Mentor, MetricsFile, Warmup
from tests import tiny


class Counting(nn.Module):
    """State of every kind: batch norm, a buffer outside of the state_dict, one that is replaced, extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.body = tiny.model()
        self.register_buffer("calls", torch.zeros(1), persistent=False)
        self.register_buffer("replaced", torch.zeros(1))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls.add_(1)
            self.replaced = self.replaced + 1
            self.seen += 1
        return self.body(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"seen": self.seen}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


def shuffled() -> Any:
    return tiny.loader(generator=torch.Generator().manual_seed(9))


def engine(plugins: list[Plugin] | None = None, **options: Any) -> Engine:
    model = Counting()
    optimizer = tiny.optimizer(model)
    options = {"device": "cpu", "plugins": plugins or []} | options
    return Engine(model, optimizer, nn.CrossEntropyLoss(), tiny.scheduler(optimizer), **options)


def everything(trainer: Any) -> dict[str, Any]:
    return flat({**trainer.state_dict(), "calls": trainer.unwrapped_model.calls.clone()})


def flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return flat(dict(enumerate(value)), name)
    return {name: value.clone() if isinstance(value, Tensor) else value}


def same(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """The names of what differs."""
    return [
        name
        for name in left.keys() | right.keys()
        if name not in left
        or name not in right
        or not (
            torch.equal(left[name], right[name])
            if isinstance(left[name], Tensor)
            else left[name] == right[name]
        )
    ]


class Boom(Exception):
    pass


def boom(trainer: Any) -> None:
    if trainer.batch_idx == 2:
        raise Boom
    trainer.auto_update()


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "to its end": lambda trainer, loader: trainer.lr_find(loader, steps=12, max_lr=1e-2),
    "diverging": lambda trainer, loader: trainer.lr_find(loader, steps=12, min_lr=1.0, max_lr=1e30),
    "raising": lambda trainer, loader: trainer.lr_find(loader, steps=12, body=lambda: boom(trainer)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_everything_is_bitwise_as_before(way: str, precision: str | None) -> None:
    """In the middle of a run: optimizer and scheduler have a state, the loader an order to come."""
    plain, tested = engine(mixed_precision=precision), engine(mixed_precision=precision)
    for trainer, test in ((plain, None), (tested, WAYS[way])):
        loader = shuffled()
        torch.manual_seed(3)
        for _ in trainer.train(loader, max_steps=4):
            trainer.auto_update()
        if test is not None:
            trainer.model.body[1].eval()
            before, attributes = everything(trainer), dict(vars(trainer))
            flags = [module.training for module in trainer.model.modules()]
            if way == "raising":
                with pytest.raises(Boom):
                    test(trainer, loader)
            else:
                found = test(trainer, loader)
                assert found.diverged is (way == "diverging")
            assert same(before, everything(trainer)) == []
            assert vars(trainer) == attributes
            assert [module.training for module in trainer.model.modules()] == flags
            assert all(p.grad is None for p in trainer.model.parameters())
        for _ in trainer.train(loader, num_epochs=2):
            trainer.auto_update()
    assert same(everything(plain), everything(tested)) == []


def test_plugins_see_nothing_and_their_model_changes_hold(tmp_path: Path) -> None:
    def plugins(folder: Path) -> list[Plugin]:
        return [
            LoRA(target_names=["body.4"], r=2), GradientAccumulation(2), Warmup(3), EMA(0.9), Mentor(),
            MetricsFile(folder / "metrics.jsonl", 1), CheckpointingHook(1, path=folder / "checkpoints"),
        ]  # fmt: skip

    runs = []
    for test in (False, True):
        folder = tmp_path / str(test)
        trainer = engine(plugins(folder))
        loader = shuffled()
        torch.manual_seed(3)
        trainer.build()
        if test:
            base = trainer.model.body[0].weight.clone()
            found = trainer.lr_find(loader, steps=5)
            assert len(found.lrs) == 5
            assert not folder.exists()
            assert torch.equal(base, trainer.model.body[0].weight)
            assert trainer.state.micro_step == 0
        trainer.run(loader)
        runs.append(everything(trainer))
    assert [name for name in same(*runs) if not name.endswith("_time")] == []


class Keep(Plugin):
    """The state after step 4, as a checkpoint has it."""

    def __init__(self) -> None:
        self.file = io.BytesIO()

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == 4:
            torch.save(trainer.state_dict(), self.file)
            self.file.seek(0)


def test_before_a_resumed_run_goes_on() -> None:
    whole = engine([keep := Keep()])
    torch.manual_seed(3)
    for _ in whole.train(shuffled(), num_epochs=2):
        whole.auto_update()
    resumed = engine()
    resumed.load_state_dict(torch.load(keep.file, weights_only=True))
    resumed.lr_find(tiny.loader(16), steps=6)  # other data, where the run's place does not exist
    for _ in resumed.train(shuffled(), num_epochs=2):
        resumed.auto_update()
    assert same(everything(whole), everything(resumed)) == [".calls"], "a resume knows nothing of this buffer"


def test_base_trainer() -> None:
    plain, tested = tiny.Trainer(5), tiny.Trainer(5)
    for trainer in (plain, tested):
        torch.manual_seed(3)
        trainer.build()
    found = tested.lr_find(steps=20)
    assert len(found.losses) == 20
    for trainer in (plain, tested):
        torch.manual_seed(3)
        trainer.train()
    assert tiny.same(plain.model, tested.model)


def test_the_suggestion_trains_and_the_ends_of_the_range_do_not() -> None:
    """Least squares by SGD: the loss explodes beyond 2/λ, λ the largest curvature."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(256, 5, generator=generator)
    y = x @ torch.randn(5, 1, generator=generator)
    batches = [(x[i : i + 32], y[i : i + 32]) for i in range(0, 256, 32)]
    highest = 2 / torch.linalg.eigvalsh(2 * x.T @ x / 256).max().item()

    def make(lr: float) -> Engine:
        torch.manual_seed(0)
        model = nn.Linear(5, 1)
        return Engine(model, torch.optim.SGD(model.parameters(), lr), nn.MSELoss(), plugins=[], device="cpu")

    found = make(1e-3).lr_find(batches, min_lr=1e-6, max_lr=1e2, steps=120)
    assert found.diverged
    assert len(found.lrs) < 120
    assert found.suggestion is not None
    assert 0.01 * highest < found.suggestion < highest
    losses = {lr: make(lr).run(batches, num_epochs=5)["train_loss"] for lr in (1e-6, found.suggestion)}
    assert losses[found.suggestion] < 0.1 * losses[1e-6]
    assert str(found).startswith(f"suggested lr {found.suggestion:.2e}; {len(found.lrs)} steps from 1.0e-06")
    assert str(found).endswith("(diverged)")


def test_rates_grow_geometrically_and_groups_keep_their_ratios() -> None:
    seen: list[list[float]] = []
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD([{"params": [model.weight], "lr": 0.1}, {"params": [model.bias], "lr": 0.4}])
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)  # a warm-up's rate of 0 is not the ratio
    optimizer.register_step_pre_hook(
        lambda *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    trainer = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[], device="cpu")
    found = trainer.lr_find(tiny.loader(), min_lr=1e-4, max_lr=1e-1, steps=4)
    assert found.lrs == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1])
    assert [first for first, _ in seen] == pytest.approx(found.lrs)
    assert [second / first for first, second in seen] == pytest.approx([4.0] * 4)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_a_body_of_your_own() -> None:
    trainer = engine()
    trainer.criterion = None
    found = trainer.lr_find(
        tiny.loader(), steps=5, body=lambda: trainer.update(trainer.model(trainer.data).square().mean())
    )
    assert len(found.losses) == 5


def falling(k: int) -> float:
    return 2.0 - 1.5 / (1 + math.exp(-(k - 50) / 4)) if k < 80 else 0.5 + (k - 80) ** 2


def test_the_steepest_fall_of_a_known_curve(tmp_path: Path) -> None:
    lrs = [10 ** (-6 + 6 * k / 99) for k in range(100)]
    generator = torch.Generator().manual_seed(4)
    noise = (0.02 * torch.randn(100, generator=generator)).tolist()
    found = LRFind(lrs, [falling(k) + noise[k] for k in range(100)], False)
    assert found.suggestion is not None
    assert abs(lrs.index(found.suggestion) - 50) <= 5
    assert LRFind(lrs, [1.0 + k for k in range(100)], False).suggestion is None
    assert LRFind(lrs[:2], [2.0, 1.0], False).suggestion is None
    assert str(LRFind([], [], True)) == "the loss does not fall; no step (diverged)"
    pytest.importorskip("matplotlib")
    figure = found.plot(tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert [line.get_label() for line in figure.axes[0].lines][:2] == ["loss", "smoothed"]


def test_values_and_places_that_are_refused() -> None:
    trainer = engine()
    for options, message in (
        ({"min_lr": 1.0, "max_lr": 0.1}, "0 < min_lr < max_lr"),
        ({"steps": 1}, "steps=1"),
        ({"stop_at": 1.0}, "stop_at=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer.lr_find(tiny.loader(), **options)
    with pytest.raises(FeedError, match="one-shot generator"):
        trainer.lr_find(batch for batch in tiny.loader())
    for _ in trainer.train(tiny.loader()):
        with pytest.raises(RuntimeError, match="inside a running loop"):
            trainer.lr_find(tiny.loader())
        break
    with pytest.raises(RuntimeError, match="no optimizer"):
        Engine(tiny.model(), plugins=[], device="cpu").lr_find(tiny.loader())
