"""The laws of every optimizer of ours: a new one adds a row to `ROWS` and inherits them all."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orbit.optim
from orbit.core import Plugin
from orbit.engine import Engine
from orbit.optim import SAM, Muon
from tests import tiny

# name → an optimizer of a model's parameters: lr, foreach (None: torch chooses)
Row = Callable[[nn.Module, float, Any], torch.optim.Optimizer]
ROWS: dict[str, Row] = {
    "Muon": lambda model, lr, foreach: Muon.for_model(
        model, lr=lr, adamw_lr=lr / 2, weight_decay=0.01, foreach=foreach
    ),
    "Muon by shape": lambda model, lr, foreach: Muon(
        model.parameters(),
        lr=lr,
        adamw_lr=lr,
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
        foreach=foreach,
    ),
    "SAM": lambda model, lr, foreach: SAM(
        model.parameters(), torch.optim.SGD, rho=0.05, lr=lr, momentum=0.9, foreach=foreach
    ),
    "ASAM": lambda model, lr, foreach: SAM(
        model.parameters(), torch.optim.AdamW, rho=0.5, adaptive=True, lr=lr, foreach=foreach
    ),
    "SAM of Muon": lambda model, lr, foreach: SAM(
        model.parameters(), Muon.for_model(model, lr=lr, adamw_lr=lr, foreach=foreach), rho=0.02
    ),
}
LAW = pytest.mark.parametrize("name", ROWS)
FACES = pytest.mark.parametrize("face", ["engine", "trainer"])


def make(name: str, model: nn.Module, lr: float = 1e-2, foreach: bool | None = None) -> Any:
    return ROWS[name](model, lr, foreach)


def test_every_optimizer_is_in_the_table() -> None:
    public = {
        name
        for name in orbit.optim.__all__
        if isinstance(getattr(orbit.optim, name), type)
        and issubclass(getattr(orbit.optim, name), torch.optim.Optimizer)
    }
    assert public == {type(make(name, tiny.model())).__name__ for name in ROWS}


# ── it finds the minimum ──────────────────────────────────────────────────────────────────────────────────────


class Points(nn.Module):
    """A matrix in a linear layer, and a vector: both kinds of parameters, whose loss is a function of all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(3, 4, bias=False)])
        self.rest = nn.Parameter(torch.zeros(4))
        with torch.no_grad():
            self.hidden[0].weight.copy_(torch.linspace(-1.2, 0.8, 12).reshape(4, 3))


def quadratic(model: Points) -> Tensor:
    """Of condition 10; 0 at 1."""
    w = torch.cat([model.hidden[0].weight.flatten(), model.rest])
    return (torch.logspace(0, 1, 16) * (w - 1).square()).sum()


def rosenbrock(model: Points) -> Tensor:
    """A banana-shaped valley in every pair of neighbours; 0 at 1."""
    w = torch.cat([model.hidden[0].weight.flatten(), model.rest])
    x, y = w[0::2], w[1::2]
    return (10 * (y - x.square()).square() + (1 - x).square()).sum()


@LAW
@pytest.mark.parametrize(("function", "steps"), [(quadratic, 150), (rosenbrock, 500)])
def test_it_converges(name: str, function: Callable[[Points], Tensor], steps: int) -> None:
    model = Points()
    optimizer = make(name, model, lr={"SAM": 0.005, "Muon by shape": 0.4}.get(name, 0.1))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
        group["rho"] = group.get("rho", 0.0) / 10

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = function(model)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(steps):
        optimizer.step(closure)
        schedule.step()
    assert closure().item() < 1e-3 * first


# ── in a run ──────────────────────────────────────────────────────────────────────────────────────────────────


class StopAt(Plugin):
    """Take the state at a step boundary and leave."""

    def __init__(self, step: int) -> None:
        self.step, self.state = step, io.BytesIO()

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == self.step:
            torch.save(trainer.state_dict(), self.state)
            self.state.seek(0)
            trainer.stop("test", "half way")


class Trainer(tiny.Trainer):
    row: str

    def build_optimizer(self) -> torch.optim.Optimizer:
        return make(self.row, self.model)


def run(face: str, name: str, plugins: list[Plugin] | None = None, state: Any = None, **options: Any) -> Any:
    """14 steps, in windows of one, of the tiny model with dropout and batch norm."""
    torch.manual_seed(5)
    if face == "trainer":
        trainer: Any = type("Row", (Trainer,), {"row": name})(14, plugins=plugins, **options)
        if state is not None:
            trainer.load_state_dict(state)
        trainer.train()
        return trainer
    model = tiny.model()
    optimizer = make(name, model)
    trainer = Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        tiny.scheduler(optimizer),
        plugins or [],
        device="cpu",
        **options,
    )
    if state is not None:
        trainer.load_state_dict(state)
    for _ in trainer.train(tiny.loader(), num_epochs=2):
        trainer.auto_update()
    return trainer


@LAW
@FACES
def test_a_resumed_run_is_the_uninterrupted_one(face: str, name: str) -> None:
    """Through a file that holds tensors and plain values alone."""
    whole, stop = run(face, name), StopAt(5)
    run(face, name, [stop])
    resumed = run(face, name, state=torch.load(stop.state, weights_only=True))
    assert tiny.same(resumed.model, whole.model)
    assert resumed.step == 14


@LAW
def test_both_faces_come_to_the_same_bits(name: str) -> None:
    assert tiny.same(run("engine", name).model, run("trainer", name).model)


@LAW
def test_states_by_parameters_names(name: str) -> None:
    """torch.distributed.checkpoint's way, which steps an optimizer without a state once, with zero gradients."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole, stop = run("trainer", name, state_dict_options=options), StopAt(5)
    run("trainer", name, [stop], state_dict_options=options)
    resumed = run(
        "trainer", name, state=torch.load(stop.state, weights_only=True), state_dict_options=options
    )
    assert tiny.same(resumed.model, whole.model)


@LAW
def test_a_learning_rate_is_looked_for_without_a_trace(name: str) -> None:
    model = tiny.model()
    engine = Engine(model, make(name, model), nn.CrossEntropyLoss(), plugins=[], device="cpu")
    before = deepcopy(model.state_dict())
    found = engine.lr_find(tiny.loader(), steps=4)
    assert len(found.losses) == 4
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not engine.optimizer.state


@LAW
def test_a_scheduler_keeps_the_ratios_of_the_groups(name: str) -> None:
    groups = run("engine", name).optimizer.param_groups
    factors = [group["lr"] / group["initial_lr"] for group in groups]
    assert 0 < factors[0] < 1
    assert factors == pytest.approx([factors[0]] * len(groups), rel=1e-12)


@LAW
def test_foreach_is_the_loop(name: str) -> None:
    results = []
    for foreach in (True, False):
        model = tiny.model()
        optimizer = make(name, model, foreach=foreach)
        assert any(group.get("foreach") is foreach for group in optimizer.param_groups)
        train(model, optimizer)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def train(model: nn.Module, optimizer: Any, steps: int = 5) -> None:
    x, y = tiny.dataset(8).tensors
    for step in range(steps):

        def closure(seed: int = step) -> Tensor:
            torch.manual_seed(seed)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)


@LAW
@pytest.mark.parametrize("copy", [deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_goes_on_alike_and_apart(name: str, copy: Callable[[Any], Any]) -> None:
    model = tiny.model()
    optimizer = make(name, model)
    train(model, optimizer, 3)
    other, its = copy((model, optimizer))
    assert its.param_groups[0]["params"][0] is next(other.parameters())
    train(other, its, 3)
    assert not tiny.same(model, other)
    train(model, optimizer, 3)
    assert tiny.same(model, other)


@LAW
def test_groups_can_be_added(name: str) -> None:
    model, more = tiny.model(), nn.Linear(3, 3, bias=False)
    optimizer = make(name, model)
    before, number = more.weight.detach().clone(), len(optimizer.param_groups)
    optimizer.add_param_group({"params": more.parameters(), "lr": 0.5})
    assert len(optimizer.param_groups) == number + 1
    train(nn.Sequential(model, more), optimizer, 1)
    assert not torch.equal(before, more.weight)
    again = make(name, model)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        again.load_state_dict(optimizer.state_dict())


@LAW
def test_parameters_without_a_gradient_stay(name: str) -> None:
    model = tiny.model()
    optimizer = make(name, model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not optimizer.state
