"""The graft: names, placing, refusals, removal, copies (laws 1 and 8)."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from orbit.adapter import (
    AdapterConfig,
    GraftError,
    TargetError,
    TaskError,
    adapter_parameters,
    inject,
    merge,
    remove,
    route,
    set_route,
    task_layers,
    tasks,
)
from orbit.adapter.owners import escape, unescape

Make = Callable[..., nn.Module]


def test_names_and_identity(llama: Make) -> None:
    """Law of section 4: base names, shapes and storage stay; task tensors lie beside them."""
    model = llama()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    layer = model.model.layers[0].self_attn.q_proj
    inject(model, AdapterConfig(r=4, dora=True, targets=("q_proj",)), "math")
    after = dict(model.named_parameters())
    assert {name: after[name].data_ptr() for name in before} == before
    assert sorted(set(after) - set(before)) == [
        f"model.layers.{i}.self_attn.q_proj.{bank}.math.weight"
        for i in range(2)
        for bank in ("lora_A", "lora_B", "lora_magnitude")
    ]
    assert layer is model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear)
    assert layer.lora_A.math.weight.shape == (4, 32)
    assert layer.lora_B.math.weight.shape == (32, 4)
    assert layer.lora_magnitude.math.weight.shape == (32,)


def test_removing_the_last_task_restores_the_class(mlp: Make) -> None:
    model = mlp()
    types = [type(m) for m in model.modules()]
    state = [sorted(m.__dict__) for m in model.modules()]
    x = torch.randn(4, 6)
    before = model(x)
    inject(model, AdapterConfig(r=2), "a")
    inject(model, AdapterConfig(r=2, dora=True), "b")
    remove(model, "a")
    assert tasks(model) == ("b",)
    assert type(model[0]) is not nn.Linear
    remove(model, "b")
    assert [type(m) for m in model.modules()] == types
    assert [sorted(m.__dict__) for m in model.modules()] == state
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert torch.equal(model(x), before)
    with pytest.raises(TaskError, match="no adapters"):
        remove(model, "b")


class Doubling(nn.Linear):
    """Computes its input itself, then calls super().forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(2 * x)


class Renamed(nn.Linear):
    """Has torch's forward."""


class Deaf(nn.Linear):
    """Has a forward of its own that nothing can be put into."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x.tanh(), self.weight, self.bias)


def test_placing() -> None:
    """Law 1: between a subclass that calls super().forward and torch's class, else in front."""
    x = torch.randn(3, 6)
    for cls, seen in [(Doubling, 2 * x), (Renamed, x), (type("Sub", (Doubling,), {}), 2 * x)]:
        layer = cls(6, 4)
        base = layer(x)
        inject(layer, AdapterConfig(r=2, alpha=2))
        assert isinstance(layer, cls)
        slot = layer.slots()["default"]
        nn.init.normal_(slot.up.weight)
        torch.testing.assert_close(layer(x), base + seen @ slot.down.weight.T @ slot.up.weight.T)


def test_a_forward_that_cannot_be_placed_is_refused() -> None:
    """Law 1."""
    model = nn.ModuleDict({"deaf": Deaf(6, 4), "plain": nn.Linear(6, 4), "head": nn.Linear(6, 4)})
    with pytest.raises(TargetError, match=r"'deaf' cannot be adapted: .*Deaf has a forward of its own"):
        inject(model, AdapterConfig(targets=("deaf",)))
    report = inject(model, AdapterConfig(r=2))
    assert report.layers == ("plain",)
    assert set(report.skipped) == {"deaf", "head"}


def test_explicit_class_calls_are_refused() -> None:
    """Law 1: nn.Linear.forward(self, x) would jump over the adapter."""

    class Jumping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.Linear.forward(self, x)

    with pytest.raises(TargetError, match="no layer is left"):
        inject(Jumping(6, 4), AdapterConfig())


def test_a_forward_replaced_on_the_instance_is_refused(mlp: Make) -> None:
    """Law 4."""
    model = mlp()
    model[0].forward = lambda x: x
    with pytest.raises(TargetError, match="replaced on the instance"):
        inject(model, AdapterConfig(targets=("0",)))
    assert type(model[0]) is nn.Linear


def test_accelerate_hooks_are_rebound(mlp: Make, fill: Callable[..., None]) -> None:
    """Law 4: hooks put on before grafting keep working, and keep the adapter."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class AddOne(ModelHook):
        def post_forward(self, module: nn.Module, output: torch.Tensor) -> torch.Tensor:
            return output + 1

    model, plain, x = mlp(), mlp(), torch.randn(4, 6)
    add_hook_to_module(model[2], AddOne())
    for each in (model, plain):
        torch.manual_seed(0)
        inject(each, AdapterConfig(r=2, targets=("2",)))
        fill(each)
    expected = plain[3](plain[2](plain[1](plain[0](x))) + 1)
    assert torch.equal(model(x), expected)
    remove_hook_from_module(model[2])
    assert torch.equal(model(x), plain(x))
    add_hook_to_module(model[2], AddOne())
    remove(model, "default")
    assert torch.equal(model(x), model[3](nn.functional.linear(plain[1](plain[0](x)), model[2].weight) + 1))


@pytest.mark.parametrize("dora", [False, True])
def test_offloaded_weights(dora: bool, mlp: Make, fill: Callable[..., None]) -> None:
    """Law 4: adapters are created where the forward runs, and DoRA sees the real weight."""
    from accelerate import cpu_offload

    x = torch.randn(4, 6)
    model, plain = cpu_offload(mlp(), execution_device=torch.device("cpu")), mlp()
    assert model[0].weight.is_meta
    for each in (model, plain):
        torch.manual_seed(0)
        inject(each, AdapterConfig(r=2, dora=dora))
        assert not any(p.is_meta for p in adapter_parameters(each).values())
        fill(each)
    assert model[0].weight.is_meta
    torch.testing.assert_close(model(x), plain(x))
    model(x).sum().backward()
    plain(x).sum().backward()
    for mine, theirs in zip(
        adapter_parameters(model).values(), adapter_parameters(plain).values(), strict=True
    ):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_offloading_after_grafting_is_refused(mlp: Make) -> None:
    """Law 4: a matrix on the meta device multiplies to garbage without an error."""
    from accelerate import cpu_offload

    model = mlp()
    inject(model, AdapterConfig(r=2))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(GraftError, match="offload the model before injecting"):
        model(torch.randn(4, 6))


def test_meta_weights_are_refused() -> None:
    """Law 4, and nothing is left half-grafted."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"), nn.Linear(4, 4))
    with pytest.raises(GraftError, match=r"'1' cannot be adapted: .*meta device"):
        inject(model, AdapterConfig(r=2))
    assert type(model[0]) is nn.Linear
    assert sorted(model.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight", "2.bias", "2.weight"]


def test_lazy_and_scripted_modules_are_refused() -> None:
    """Law 4."""
    lazy = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4))
    with pytest.raises(TargetError, match="run one batch"):
        inject(lazy, AdapterConfig(targets=("re:.*",)))
    lazy(torch.randn(2, 3))
    assert inject(lazy, AdapterConfig(r=2, targets=("re:.*",))).layers == ("0", "1")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_scripted_modules_are_refused() -> None:
    """Law 4."""
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(GraftError, match="scripted"):
        inject(scripted)
    model = nn.ModuleDict({"s": scripted, "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    assert "scripted" in inject(model, AdapterConfig(r=2)).skipped["s.0"]


def test_other_libraries_adapters_are_refused(mlp: Make) -> None:
    import peft

    theirs = peft.get_peft_model(mlp(), peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(GraftError, match="PEFT"):
        inject(theirs)


@pytest.mark.parametrize(
    "name", ["keys", "train", "a.b", "a", "weight", "%2E", "größe", " ", "a/b", "_x", "1"]
)
def test_any_name_is_a_task(name: str, mlp: Make, fill: Callable[..., None]) -> None:
    """Law 8: names are escaped in storage and never shown escaped."""
    assert unescape(escape(name)) == name
    model, x = mlp(), torch.randn(4, 6)
    inject(model, AdapterConfig(r=2), "a.b.c")
    inject(model, AdapterConfig(r=2), name)
    fill(model, name)
    y = model(x, task=name)
    assert tasks(model) == ("a.b.c", name)
    assert len(adapter_parameters(model, name)) == 4
    twin = mlp()
    inject(twin, AdapterConfig(r=2), name)
    inject(twin, AdapterConfig(r=2), "a.b.c")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x, task=name), y)
    assert torch.equal(
        twin.get_parameter(next(iter(adapter_parameters(twin, name)))), model[0].slots()[name].down.weight
    )
    with pytest.raises(TaskError, match="already") as error:
        inject(model, AdapterConfig(r=2), name)
    assert repr(name) in str(error.value)
    remove(model, name)
    assert tasks(model) == ("a.b.c",)


@pytest.mark.parametrize("name", ["", None, 3, ("a",)])
def test_other_names_are_refused(name: object, mlp: Make) -> None:
    with pytest.raises(TaskError, match="non-empty string"):
        inject(mlp(), name=name)  # type: ignore[arg-type]


def roundtrips(tmp: Path) -> dict[str, Callable[[nn.Module], nn.Module]]:
    def saved(model: nn.Module) -> nn.Module:
        torch.save(model, tmp / "m.pt")
        return torch.load(tmp / "m.pt", weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_independent(
    how: str, mlp: Make, fill: Callable[..., None], tmp_path: Path
) -> None:
    """Law 8, and law 3: a running call's route is dropped, and layers follow their copy's RouteState."""
    model, x = mlp(), torch.randn(4, 6)
    inject(model, AdapterConfig(r=2), "a")
    inject(model, AdapterConfig(r=2, dora=True, targets=("2",)), "b")
    fill(model)
    model(x).sum().backward()
    set_route(model, "a")
    with route(model, "b"):
        twin = roundtrips(tmp_path)[how](model)
    for task in ("a", "b", None):
        assert torch.equal(twin(x, task=task), model(x, task=task))
    assert torch.equal(twin(x), model(x, task="a"))
    set_route(twin, None)
    assert torch.equal(model(x), model(x, task="a"))
    assert torch.equal(twin(x), model(x, task=None))
    remove(twin, "a")
    remove(twin, "b")
    assert type(twin[0]) is nn.Linear
    assert tasks(model) == ("a", "b")


def test_a_copied_layer_does_not_drag_its_model_along(mlp: Make, fill: Callable[..., None]) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2))
    fill(model)
    alone = pickle.loads(pickle.dumps(model[0]))
    x = torch.randn(4, 6)
    assert torch.equal(alone(x), model[0](x))
    assert list(task_layers(alone, "default")) == [""]
    assert len(pickle.dumps(model[0])) < 8000


def test_models_die_at_once(mlp: Make) -> None:
    """No reference cycle keeps an adapted model's memory until the garbage collector runs."""
    import gc
    import weakref

    model = mlp()
    inject(model, AdapterConfig(r=2, dora=True))
    model(torch.randn(4, 6), task="default").sum().backward()
    gone = weakref.ref(model[0])
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def test_spawned_processes_take_adapted_models(mlp: Make, fill: Callable[..., None]) -> None:
    """Law 8."""
    model, x = mlp(), torch.randn(4, 6)
    inject(model, AdapterConfig(r=2), "a")
    fill(model)
    data = pickle.dumps(model)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(run_pickled, (data, x.tolist())) == model(x, task="a").tolist()


def run_pickled(data: bytes, x: list[list[float]]) -> list[list[float]]:
    return pickle.loads(data)(torch.tensor(x), task="a").tolist()


def test_data_parallel_is_refused(mlp: Make) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2))
    with pytest.raises(GraftError, match="DistributedDataParallel"):
        model[0]._replicate_for_data_parallel()


def test_moving_and_casting_keep_the_scale_exact(mlp: Make) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=5, alpha=32, rslora=True))
    up = model[0].slots()["default"].up
    for dtype in (torch.bfloat16, torch.float64):
        model.to(dtype)
        assert up.weight.dtype == dtype
        assert up.scale.dtype in (torch.float32, torch.float64)
        assert abs(float(up.scale) - 32 / 5**0.5) < 1e-5
    assert model(torch.randn(2, 6).double()).dtype == torch.float64


@pytest.mark.parametrize("parametrise", [weight_norm, spectral_norm])
def test_copies_of_parametrised_layers_follow_their_own_route(
    parametrise: Callable[[nn.Module], nn.Module], fill: Callable[..., None]
) -> None:
    """torch's parametrizations bring a `__deepcopy__` of their own, which does not rebuild layers."""
    torch.manual_seed(1)
    model = nn.Sequential(parametrise(nn.Linear(5, 6)), nn.Linear(6, 3)).eval()
    for seed, task in enumerate("ab"):
        inject(model, AdapterConfig(r=2, targets=("0", "1")), task)
        fill(model, task, seed)
    twin, x = copy.deepcopy(model), torch.randn(2, 5)
    for task in ("a", "b", None):
        torch.testing.assert_close(twin(x, task=task), model(x, task=task))
    assert not torch.equal(twin(x, task="a"), twin(x, task="b"))
    before = model(x, task="a")
    fill(twin, "a", 9)
    assert not torch.equal(twin(x, task="a"), before)
    assert torch.equal(model(x, task="a"), before)


def test_a_class_with_its_own_deepcopy(fill: Callable[..., None]) -> None:
    class Mine(nn.Linear):
        def __deepcopy__(self, memo: dict[int, object]) -> nn.Module:
            twin = type(self).__new__(type(self))
            memo[id(self)] = twin
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo), copied=True)
            return twin

    model = nn.Sequential(Mine(5, 6), nn.Linear(6, 3))
    inject(model, AdapterConfig(r=2, targets=("0",)), "a")
    fill(model)
    with route(model, tasks={"a": 0.5}):  # a plan with tensors
        twin = copy.deepcopy(model)
    x = torch.randn(2, 5)
    assert twin[0].copied
    torch.testing.assert_close(twin(x, task=None), model(x, task=None))
    torch.testing.assert_close(twin(x), model(x, task="a"))


def test_complex_layers_are_refused() -> None:
    model = nn.Sequential(nn.Linear(5, 6, dtype=torch.complex64))
    with pytest.raises(GraftError, match="layer '0' cannot be adapted: its weight is complex64"):
        inject(model, AdapterConfig(r=2))
    assert type(model[0]) is nn.Linear


def test_repr_shows_names_as_they_were_given_and_what_holds(mlp: Make) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2, alpha=7, dropout=0.25, rslora=True, targets=("0",)), "a.b/c")
    assert "(a.b/c): Down(2x6, dropout=0.25)" in repr(model)
    assert "(a.b/c): Up(10x2, alpha=7, rslora)" in repr(model)
    assert "merged" not in repr(model)
    merge(model.eval(), "a.b/c")
    assert "merged='a.b/c'" in repr(model[0])
    assert "merged" not in repr(model[2])
