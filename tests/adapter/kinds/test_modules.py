"""Modules that stand in for a layer: a user's own for a task, and copies that are trained whole."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    GraftError,
    RouteError,
    TargetError,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    inject,
    merge,
    register_base_module_wrapper,
    remove,
    rename,
    route,
    set_route,
    task_layers,
    tasks,
    unmerge,
)
from orbit.adapter.kinds import registry
from orbit.adapter.kinds.modules import Shell


class Block(nn.Module):
    """A user's layer, with a layer below."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.register_buffer("shift", torch.ones(width))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return torch.tanh(self.inner(x) + self.shift) * scale


class Special(Block):
    """A subclass without a constructor of its own."""


class Adds(nn.Module):
    """A task module that holds its layer, and parts of it."""

    def __init__(self, layer: Block) -> None:
        super().__init__()
        self.layer, self.theirs, self.weight_of_theirs = layer, layer.inner, layer.inner.weight
        self.gain = nn.Parameter(torch.zeros(layer.inner.in_features))
        self.own = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(x, scale=scale) + self.gain * self.own(x)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """Registers Adds for Block while a test runs."""
    before = dict(registry._WRAPPERS)
    register_base_module_wrapper(Block, lambda layer: Adds(layer))
    yield
    registry._WRAPPERS.clear()
    registry._WRAPPERS.update(before)


def make() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 4), Special(), nn.Linear(4, 3))


def batch() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(4))


EVERYTHING = AdapterConfig(r=2, targets=("re:",))


def test_a_constructor_is_called_once_per_task_and_its_module_stands_in(fill: Callable[..., None]) -> None:
    seen: list[Any] = []
    register_base_module_wrapper(Block, lambda layer: seen.append(layer) or Adds(layer))
    model, x = make(), batch()
    before = model(x)
    report = inject(model, EVERYTHING, "a")
    inject(model, EVERYTHING, "b")
    assert report.layers == ("0", "1", "2")
    assert report.skipped == {"1.inner": "it lies within a module that is adapted as a whole"}
    assert len(seen) == 2
    assert all(isinstance(shell, Special) and isinstance(shell, Shell) for shell in seen)
    assert torch.equal(model(x), before)
    fill(model, "a")
    torch.testing.assert_close(model(x, task="b"), before)
    layer = model[1]
    module = layer.slots()["a"].module
    h = layer.base(x)
    with route(model, "a"):
        torch.testing.assert_close(layer(x), h + module.gain * module.own(x))
        torch.testing.assert_close(layer(x, scale=2.0), 2 * h + module.gain * module.own(x))
    assert type(layer.inner) is nn.Linear


def test_the_tasks_tensors_are_its_own() -> None:
    model = make()
    base = copy.deepcopy(model.state_dict())
    inject(model, EVERYTHING, "a")
    module = model[1].slots()["a"].module
    own = {"gain", "own.0.weight", "own.0.bias", "own.1.weight", "own.1.bias"}
    assert module.theirs is model[1].inner
    assert module.weight_of_theirs is model[1].inner.weight
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()} == own
    assert {f"1.lora_module.a.{name}" for name in own} < adapter_parameters(model, "a").keys()
    assert all(torch.equal(base_state_dict(model)[key], value) for key, value in base.items())
    assert base_state_dict(model).keys() == base.keys()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {
        id(p) for p in adapter_parameters(model).values()
    }
    model(batch()).sum().backward()
    check_gradients(model, may_be_empty=False) if model[1].slots()["a"].module.gain.grad is None else None
    model.double()
    assert model(batch().double()).dtype == torch.float64
    remove(model, "a")
    assert type(model[1]) is Special
    assert model.state_dict().keys() == base.keys()


def test_rows_and_sums(fill: Callable[..., None]) -> None:
    model, x = make(), batch()
    inject(model, EVERYTHING, "a")
    inject(model, AdapterConfig(r=2, targets=("0", "1.inner")), "b")  # named below: adapted itself
    fill(model)
    rows = model(x, task=["b", None, "a"])
    for row, task in enumerate(["b", None, "a"]):
        torch.testing.assert_close(rows[row], model(x, task=task)[row])
    only = make()
    inject(only, AdapterConfig(targets=("1",)), "a")
    inject(only, AdapterConfig(targets=("1",)), "b")
    fill(only)
    only[2] = nn.Identity()
    base, a, b = (only(x, task=task) for task in (None, "a", "b"))
    torch.testing.assert_close(only(x, tasks={"a": 0.5, "b": -2.0}), base + 0.5 * (a - base) - 2 * (b - base))


def test_a_strict_load_of_the_base_and_of_all(fill: Callable[..., None]) -> None:
    base, model, x = make().state_dict(), make(), batch()
    inject(model, EVERYTHING, "a")
    fill(model)
    before = model(x)
    for assign in (False, True):
        held = adapter_parameters(model, "a")
        model.load_state_dict(base, assign=assign)
        assert torch.equal(model(x), before)
        assert all(adapter_parameters(model, "a")[name] is parameter for name, parameter in held.items())
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    del state["1.lora_module.a.gain"]
    with pytest.raises(RuntimeError, match="gain"):
        model.load_state_dict(state)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stand_alone(copied: Callable[[Any], Any], fill: Callable[..., None]) -> None:
    model, x = make(), batch()
    inject(model, EVERYTHING, "a")
    inject(model, EVERYTHING, "b")
    fill(model)
    before = model(x)
    twin = copied(model)
    assert torch.equal(twin(x), before)
    assert twin[1].slots()["b"].module.layer.inner is twin[1].inner
    assert twin[1].slots()["b"].module.theirs is twin[1].inner
    with torch.no_grad():
        twin[1].inner.weight.zero_()
    assert not torch.equal(twin(x), before)
    assert torch.equal(model(x), before)
    assert twin.eval()[1].slots()["b"].module.layer.training is False


def test_the_layers_hooks_run_once() -> None:
    model, calls = make(), []
    model[1].register_forward_hook(lambda module, args, output: calls.append(output))
    inject(model, AdapterConfig(targets=("1",)), "a")
    model(batch())
    assert len(calls) == 1


def test_containers_of_the_task_may_hold_the_layer() -> None:
    register_base_module_wrapper(Block, lambda layer: nn.Sequential(layer, nn.Identity()))
    model, x = make(), batch()
    before = model(x)
    inject(model, AdapterConfig(targets=("1",)), "a")
    assert torch.equal(model(x), before)
    assert not list(model[1].slots()["a"].module.parameters())


@pytest.mark.parametrize("constructor", [lambda layer: layer, lambda layer: layer.inner, lambda layer: None])
def test_a_constructor_must_give_a_module_of_its_own(constructor: Any) -> None:
    register_base_module_wrapper(Block, constructor)
    model = make()
    with pytest.raises(
        GraftError, match="layer '1' cannot be adapted: the constructor for Special must give"
    ):
        inject(model, EVERYTHING, "a")
    assert type(model[0]) is nn.Linear
    assert type(model[1]) is Special


def test_what_cannot_be_registered() -> None:
    for cls, constructor in [(nn.Module, Adds), (nn.ModuleList, Adds), (int, Adds), (Block, "Adds")]:
        with pytest.raises(GraftError, match=r"registered|callable"):
            register_base_module_wrapper(cls, constructor)  # type: ignore[arg-type]


def test_the_most_specific_class_counts() -> None:
    class Nearer(nn.Linear):
        pass

    model = nn.Sequential(Nearer(4, 4), nn.Linear(4, 4))
    register_base_module_wrapper(Nearer, lambda layer: nn.Linear(4, 4))
    inject(model, EVERYTHING, "a")
    assert isinstance(model[0].slots()["a"].module, nn.Linear)
    assert hasattr(model[1].slots()["a"], "up")


# ── save_modules ──────────────────────────────────────────────────────────────────────────────────────────────────


class Headed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.LayerNorm(6)
        self.score = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.norm(self.body(x)))


def headed() -> Headed:
    torch.manual_seed(6)
    return Headed()


SAVED = AdapterConfig(r=2, targets=("body", "score"), save_modules=("score", "norm"))


def test_a_saved_module_trains_whole_and_the_base_keeps_its_own(fill: Callable[..., None]) -> None:
    model, x = headed(), batch()
    before, base = model(x), copy.deepcopy(model.state_dict())
    report = inject(model, SAVED, "a")
    assert report.layers == ("body", "norm", "score")
    assert report.skipped == dict.fromkeys(("score.0", "score.2"), "it lies within score, trained whole")
    assert torch.equal(model(x), before)
    assert sum(name.startswith("score.lora_module.a.") for name in adapter_parameters(model)) == 4
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    for _ in range(2):
        model(x).square().sum().backward()
        check_gradients(model)
        optimizer.step()
    assert not torch.allclose(model(x), before)
    assert torch.equal(model(x, task=None), before)
    assert all(torch.equal(base_state_dict(model)[key], value) for key, value in base.items())
    inject(model, SAVED, "b")
    assert torch.equal(model(x), before), "a second copy is one of the base"
    rows = model(x, task=["a", "b", None])
    torch.testing.assert_close(rows[0], model(x, task="a")[0])
    torch.testing.assert_close(rows[1:], before[1:])


def test_a_saved_module_below_which_others_adapt(fill: Callable[..., None]) -> None:
    model, x = headed(), batch()
    before = model(x)
    inject(model, AdapterConfig(r=2, targets=("score",)), "low")
    fill(model)
    low = model(x)
    inject(model, SAVED, "whole")
    assert not any("lora" in name for name in model.score.slots()["whole"].module.state_dict())
    assert torch.equal(model(x), before)
    assert torch.equal(model(x, task="low"), low)
    remove(model, "low")
    assert torch.equal(model(x, task="whole"), before)
    remove(model, "whole")
    assert type(model.score) is nn.Sequential


def test_merging_leaves_the_copy_in_place(fill: Callable[..., None]) -> None:
    model, x = headed().eval(), batch()
    inject(model, SAVED, "a")
    fill(model)
    state, routed = copy.deepcopy(model.state_dict()), model(x)
    merge(model)
    torch.testing.assert_close(model(x), routed)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(RouteError):
        model(x, task=None)
    with pytest.raises(RouteError, match="merged"):
        model.train()(x)
    unmerge(model.eval())
    assert torch.equal(model(x), routed)
    set_route(model, None)
    assert not torch.allclose(model(x), routed)


def test_what_save_modules_refuses() -> None:
    model = headed()
    for names, message in [
        (("scores",), "did you mean 'score'"),
        (("score", "score.0"), "'score.0', which lies within a module that is adapted"),
        (("score.1",), "it has no parameters to train"),
    ]:
        with pytest.raises(TargetError, match=message):
            inject(model, AdapterConfig(r=2, targets=("body",), save_modules=names), "a")
        assert not tasks(model)
    assert type(model.score) is nn.Sequential


# ── rename ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_rename_keeps_tensors_places_and_routes(fill: Callable[..., None]) -> None:
    model, x = make(), batch()
    inject(model, EVERYTHING, "a")
    inject(model, EVERYTHING, "b")
    fill(model)
    set_route(model, ["a", "b", None])
    held, before = list(adapter_parameters(model, "a").values()), model(x)
    rename(model, "a", "x.y")
    assert tasks(model) == ("x.y", "b")
    assert list(task_layers(model, "x.y")) == ["0", "1", "2"]
    renamed = list(adapter_parameters(model, "x.y").values())
    assert all(mine is theirs for mine, theirs in zip(renamed, held, strict=True))
    assert torch.equal(model(x), before)
    assert torch.equal(model(x, task=["x.y", "b", None]), before)
    for old, new in [("a", "c"), ("b", "x.y"), ("b", "")]:
        with pytest.raises(ValueError, match=r"no task 'a'|a task 'x.y' already|non-empty"):
            rename(model, old, new)
    with route(model, "b"), pytest.raises(RouteError, match="renamed"):
        rename(model, "b", "c")


def test_a_replay_after_a_rename_finds_its_task(fill: Callable[..., None]) -> None:
    from torch.utils.checkpoint import checkpoint

    model, x = make(), batch()
    inject(model, EVERYTHING, "a")
    inject(model, EVERYTHING, "b")
    fill(model)
    wanted = torch.autograd.grad(model(x, task="a").sum(), list(adapter_parameters(model, "a").values()))
    with route(model, "a"):
        loss = checkpoint(model, x, use_reentrant=False).sum()
    rename(model, "a", "c")
    got = torch.autograd.grad(loss, list(adapter_parameters(model, "c").values()))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_sequential_is_still_counted_and_indexed() -> None:
    model = headed()
    own = list(model.score)
    inject(model, SAVED, "a")
    assert list(model.score) == own
    assert len(model.score) == 3
    assert model.score[-1] is own[-1]
    assert type(model.score[1:]) is nn.Sequential
    assert list(model.score[1:]) == own[1:]
