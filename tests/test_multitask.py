"""Document 004's face: many tasks on any module, chosen per call."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orbit.multitask as LoRA
from orbit import adapter
from orbit.adapter import ConfigError, StateError, TaskError
from orbit.adapter.kinds import registry


def nets() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(1)
    return {
        "a bare Linear": (nn.Linear(4, 3), torch.randn(2, 4)),
        "12 children": (nn.Sequential(*[nn.Linear(4, 4) for _ in range(12)]), torch.randn(2, 4)),
        "a picture net": (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2)),
            torch.randn(2, 3, 5, 5),
        ),
        "words": (
            nn.Sequential(nn.Embedding(9, 4), nn.Conv1d(5, 3, 2), nn.Linear(3, 2)),
            torch.randint(9, (2, 5)),
        ),
        "a transformer": (
            nn.TransformerEncoder(
                nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), 2, enable_nested_tensor=False
            ),
            torch.randn(2, 3, 8),
        ),
    }


def fill(model: LoRA.Model, task: str, seed: int = 0) -> None:
    noise = torch.Generator().manual_seed(seed)
    state = model.state_dict(task=task)
    model.load_state_dict(
        {key: value + 0.3 * torch.randn(value.shape, generator=noise) for key, value in state.items()},
        task=task,
    )


def make(name: str = "12 children", **settings: Any) -> tuple[LoRA.Model, Tensor]:
    module, x = nets()[name]
    return LoRA.Model(model=module.eval(), **settings), x


@pytest.mark.parametrize("name", nets())
@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"r": 1, "gated": True}])
def test_tasks_on_any_module(name: str, settings: dict[str, Any]) -> None:
    model, x = make(name, **settings)
    before, base = model(x), copy.deepcopy(model.state_dict())
    for task in ("minimalist", "anime"):
        report = model.add_task(task)
        assert torch.equal(model(x), before)
        assert torch.equal(model(x, task=task), before), "a new task changes nothing"
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d))]
    assert len(report.layers) >= len(layers) > 0, "every layer, the last one too"
    assert not report.skipped
    fill(model, "minimalist")
    assert not torch.allclose(model(x, task="minimalist"), before)
    torch.testing.assert_close(model(x, task="anime"), before)
    torch.testing.assert_close(model(x), before)
    model.remove_task("anime")
    assert model.tasks == ("minimalist",)
    with pytest.raises(TaskError, match="anime"):
        model(x, task="anime")
    state = model.state_dict()
    assert list(state) == list(base)
    assert all(torch.equal(state[key], value) for key, value in base.items())
    model.remove_task("minimalist")
    assert [type(m) for m in model.model.modules()] == [type(m) for m in nets()[name][0].modules()]
    with pytest.raises(TaskError, match="add_task"):
        model(x, task="minimalist")
    assert torch.equal(model(x, task=None), before)


def test_several_tasks_in_one_call() -> None:
    model, x = make("a bare Linear")
    for seed, task in enumerate("ab"):
        model.add_task(task, r=2)
        fill(model, task, seed)
    base, a, b = model(x), model(x, task="a"), model(x, task="b")
    torch.testing.assert_close(model(x, tasks=["a", "b"]), a + b - base)
    torch.testing.assert_close(model(x, tasks={"a": 0.5, "b": -1.0}), base + 0.5 * (a - base) - (b - base))
    torch.testing.assert_close(model(x, task=["b", None]), torch.stack([b[0], base[1]]))


def test_what_trains() -> None:
    model, x = make()
    model.add_task("a")
    model.add_task("b")
    trains = lambda: {name for name, p in model.named_parameters() if p.requires_grad}  # noqa: E731
    assert trains() == {name for name, _ in model.named_parameters()}, "nothing is frozen by itself"
    assert model.requires_grad_(requires_grad=False) is model
    assert all(".lora_" in name for name in trains())
    model.requires_grad_(requires_grad=False, task="a")
    assert trains()
    assert all(".b." in name for name in trains())
    model(x, task="b").sum().backward()
    assert all((p.grad is not None) == (".b." in name) for name, p in model.named_parameters())
    model.requires_grad_(True)
    model.requires_grad_(task="a")
    assert trains() == {name for name, _ in model.named_parameters()}
    with pytest.raises(TaskError, match="'c'"):
        model.requires_grad_(False, task="c")


@pytest.mark.parametrize("name", nets())
def test_states_go_from_model_to_model(name: str) -> None:
    model, x = make(name)
    model.add_task("1")
    model.add_task("10")
    fill(model, "1", 1)
    fill(model, "10", 10)
    state = copy.deepcopy(model.state_dict(task="1"))
    assert state
    before = model(x, task="1")
    assert not any(torch.equal(value, model.state_dict(task="10")[key]) for key, value in state.items())
    other, _ = make(name)
    other.add_task("under another name")
    other.load_state_dict(state, task="under another name")
    torch.testing.assert_close(other(x, task="under another name"), before, rtol=0, atol=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(other.state_dict(task="under another name"), state, rtol=0, atol=0)


def test_loading_is_strict_and_changes_nothing_when_it_fails() -> None:
    model, _ = make()
    model.add_task("1", r=2)
    state = copy.deepcopy(model.state_dict(task="1"))
    key = "10.lora_A.weight"
    for bad, message in [
        ({k: v for k, v in state.items() if k != key}, f"missing: {key}"),
        ({**state, "12.lora_A.weight": state[key]}, "unexpected: 12.lora_A.weight"),
        ({**state, key: torch.zeros(3, 4)}, rf"{key} is \(3, 4\) and should be \(2, 4\)"),
        (model.state_dict(), "missing: 0.lora_A.weight"),
    ]:
        with pytest.raises(StateError, match=message):
            model.load_state_dict({k: v + 1 for k, v in bad.items()}, task="1")
        torch.testing.assert_close(model.state_dict(task="1"), state, rtol=0, atol=0)
    with pytest.raises(StateError, match=r"no '0.lora_A.weight'.*task="):
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing"):
        model.load_state_dict({})
    with pytest.raises(TaskError):
        model.load_state_dict(state, task="0")
    missing, unexpected = model.load_state_dict({key: state[key], "x": state[key]}, strict=False, task="1")
    assert len(missing) == len(state) - 1
    assert unexpected == ["x"]


class Parent(nn.Module):
    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.first, self.child = nn.Linear(4, 4), child

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.child(self.first(x), **options)


def test_nested_in_another_module() -> None:
    parent, (plain, x) = Parent(make()[0]), nets()["12 children"]
    parent.child.add_task("a")
    fill(parent.child, "a")
    state = parent.state_dict()
    assert {f"child.{key}" for key in plain.state_dict()} < state.keys(), "the base keeps its names"
    assert {f"child.{i}.lora_A.a.weight" for i in range(12)} < state.keys()
    other = Parent(make()[0])
    other.child.add_task("a")
    other.load_state_dict(state)
    assert torch.equal(other(x, task="a"), parent(x, task="a"))
    assert not torch.equal(other(x, task="a"), other(x))
    before = Parent(nets()["12 children"][0]).state_dict()
    other.load_state_dict(before)
    with pytest.raises(RuntimeError, match="lora_A"):
        other.load_state_dict({k: v for k, v in state.items() if not k.startswith("child.3.lora_A")})
    parent.double().train()
    assert parent.child.model[0].training
    assert parent(x.double(), task="a").dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", nets())
def test_copies_stand_alone(name: str, copied: Any) -> None:
    model, x = make(name)
    model.add_task("a")
    fill(model, "a")
    before = model(x, task="a")
    twin = copied(model)
    assert torch.equal(twin(x, task="a"), before)
    fill(twin, "a", 3)
    assert not torch.equal(twin(x, task="a"), before)
    assert torch.equal(model(x, task="a"), before)
    twin.remove_task("a")
    assert torch.equal(model(x, task="a"), before)


@pytest.fixture
def registered() -> Iterator[None]:
    """Forgets what a test registers."""
    before = dict(registry._WRAPPERS)
    yield
    registry._WRAPPERS.clear()
    registry._WRAPPERS.update(before)


class Gain(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.gain = module, nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.gain * self.module(*args, **kwargs)


@pytest.mark.usefixtures("registered")
def test_registered_modules() -> None:
    LoRA.register_base_module_wrapper(nn.TransformerEncoderLayer, lambda module: Gain(module))
    model, x = make("a transformer")
    before = model(x)
    model.add_task("a")
    assert set(model.state_dict(task="a")) == {f"layers.{i}.lora_module.gain" for i in range(2)}
    assert torch.equal(model(x, task="a"), before)
    model.load_state_dict({key: torch.tensor(2.0) for key in model.state_dict(task="a")}, task="a")
    assert not torch.allclose(model(x, task="a"), before)
    assert torch.equal(copy.deepcopy(model)(x, task="a"), model(x, task="a"))
    assert list(model.state_dict()) == list(nets()["a transformer"][0].state_dict())
    own = LoRA.Model(model=nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
    own.add_task("a")
    torch.testing.assert_close(own(x, task="a"), own(x))


def test_settings_names_and_what_is_passed_on() -> None:
    model, x = make(r=100)
    model.in_the_way = 3
    report = model.add_task("keys", targets=("3", "11"), dora=True)
    assert report.layers == ("model.3", "model.11")
    assert model.state_dict(task="keys")["3.lora_A.weight"].shape == (4, 4), "no rank above the layer's"
    with pytest.raises(ConfigError, match="r is 5"):
        model.add_task("b", r=5)
    model.rename_task("keys", "a.b")
    assert model.tasks == ("a.b",)
    assert torch.equal(model(x, task="a.b"), model(x))
    with pytest.raises(TaskError, match="already"):
        model.add_task("a.b")
    assert model.append.__self__ is model.model
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    with pytest.raises(ConfigError, match="alpha"):
        LoRA.Model(nn.Linear(2, 2), alpha=float("nan"))
    with pytest.raises(TypeError):
        LoRA.Model(model=3)  # type: ignore[arg-type]


def test_a_training_runs_checkpoint_holds_base_and_tasks(tmp_path: Path) -> None:
    from orbit.engine import Engine

    def engine() -> Engine:
        model, _ = make()
        model.add_task("a")
        model.requires_grad_(False)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return Engine(model, torch.optim.SGD(trained, 0.1), device="cpu")

    first, second, x = engine(), engine(), torch.randn(2, 4)
    fill(first.model, "a")
    first.save(tmp_path / "run.pt")
    second.load(tmp_path / "run.pt")
    assert torch.equal(second.model(x, task="a"), first.model(x, task="a"))
    assert not torch.equal(second.model(x, task="a"), second.model(x))


def test_files_have_the_models_own_names(tmp_path: Path) -> None:
    """What is written is an adapter of the wrapped model, and what was written for that is read."""
    model, x = make()
    model.add_task("a")
    fill(model, "a")
    adapter.save(model, tmp_path / "a", "a")
    plain = make()[0].model
    adapter.load(plain, tmp_path / "a")
    assert torch.equal(plain(x), model(x, task="a"))
    empty = make()[0]
    adapter.load(empty, tmp_path / "a", "b")
    assert torch.equal(empty(x, task="b"), model(x, task="a"))
    empty.add_task("c")
    adapter.load(empty, tmp_path / "a", "b")
    empty.remove_task("b")
    assert torch.equal(empty(x, task="c"), model(x))


def test_merged_weights_under_the_models_own_names() -> None:
    (model, x), fresh = make(), make()[0].model
    model.add_task("a")
    fill(model, "a")
    fresh.load_state_dict(adapter.merged_state_dict(model, "a"))
    torch.testing.assert_close(fresh(x), model(x, task="a"))


def test_tasks_that_were_added_to_what_the_model_is_part_of() -> None:
    body, x = make()
    whole = nn.Sequential(body)
    adapter.inject(whole, adapter.AdapterConfig(r=2), "a")
    fill(body, "a")
    assert body.tasks == ("a",)
    assert torch.equal(body(x, task="a"), whole(x, task="a"))
    assert torch.equal(body(x, tasks=["a"]), whole(x, tasks=["a"]))
    with pytest.raises(TaskError, match="no task 'b'"):
        body(x, task="b")


def test_ranks_that_fit_layers_of_like_names(tmp_path: Path) -> None:
    """A pattern for "1" would match "0.1" too."""
    module = nn.Sequential(nn.Sequential(nn.Tanh(), nn.Linear(12, 12)), nn.Linear(12, 2))
    model, x = LoRA.Model(copy.deepcopy(module)), torch.randn(3, 12)
    model.add_task("a")
    ranks = [layer.settings("a").r for layer in adapter.task_layers(model, "a").values()]
    assert ranks == [8, 2]
    fill(model, "a")
    adapter.load(module, adapter.save(model, tmp_path / "a", "a"))
    assert torch.equal(module(x), model(x, task="a"))
    bare, one = nn.Linear(4, 3), torch.randn(2, 4)
    small = LoRA.Model(copy.deepcopy(bare))
    small.add_task("a")
    fill(small, "a")
    adapter.load(bare, adapter.save(small, tmp_path / "b", "a"))
    assert torch.equal(bare(one), small(one, task="a"))


def test_a_merged_task_is_not_loaded_into() -> None:
    model, _ = make()
    model.add_task("a")
    state = model.state_dict(task="a")
    adapter.merge(model, "a")
    with pytest.raises(adapter.MergeError, match="unmerge it first"):
        model.load_state_dict(state, task="a")
    adapter.unmerge(model)
    model.load_state_dict(state, task="a")
