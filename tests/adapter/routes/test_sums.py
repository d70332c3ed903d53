"""Several tasks at once: weighted sums, and tasks weighted by a tensor that a router computed."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbit.adapter import (
    AdapterConfig,
    RouteError,
    Scaled,
    TaskError,
    adapter_parameters,
    current_route,
    inject,
    route,
    set_route,
    task_layers,
)
from orbit.adapter.graft import Graft
from tests.adapter.routes.gradients import assert_same, grads

Make = Callable[..., nn.Module]
Fill = Callable[..., None]

CONFIGS = {
    "lora": AdapterConfig(r=2),
    "dora": AdapterConfig(r=3, dora=True),
    "gated": AdapterConfig(r=4, gated=True),
    "first": AdapterConfig(r=2, targets=("0",)),
}
SUMS = [{"lora": 1.0}, {"lora": 0.5, "dora": -2.0}, {"gated": 1.5, "first": -0.25, "dora": 1, "lora": 0.0}]


@pytest.fixture
def many(fill: Fill) -> nn.Module:
    """A float64 model whose tasks differ in kind, rank and layers."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        inject(model, config, name)
        fill(model, name, seed)
    return model


def batch(*shape: int) -> Tensor:
    return torch.randn(*shape, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def dense(model: nn.Module, layer: Graft, task: str) -> Tensor:
    """The change of a layer's weight under a task, written out."""
    slot = layer.low_rank_slot(task)
    delta = slot.coefficient * slot.up.weight @ slot.down.weight
    if slot.magnitude is None:
        return delta
    V = layer.weight + delta
    return (slot.magnitude.weight / V.norm(dim=1).detach())[:, None] * V - layer.weight


def oracle(model: nn.Sequential, x: Tensor, weight_of: Callable[[int, str], Tensor | float]) -> Tensor:
    """The model with x·(W + ΔW)ᵀ + b written out, each task's part times its weight; layers numbered 0, 1."""
    number = 0
    for module in model:
        if not isinstance(module, Graft):
            x = module(x)
            continue
        y = x @ module.weight.T + module.bias
        for task in CONFIGS:
            if task in module.slots():
                weight = weight_of(number, task)
                weight = weight[..., None] if isinstance(weight, Tensor) and weight.dim() else weight
                y = y + weight * (x @ dense(model, module, task).T)
        x, number = y, number + 1
    return x


@pytest.mark.parametrize("weights", SUMS)
@pytest.mark.parametrize("shape", [(4,), (2, 3)])
def test_sums_of_tasks(many: nn.Module, weights: dict[str, float], shape: tuple[int, ...]) -> None:
    x = batch(*shape)
    expected = oracle(many, x, lambda _, task: weights.get(task, 0.0))
    torch.testing.assert_close(many(x, tasks=weights), expected)
    expected.square().sum().backward()
    oracle_grads = grads(many)
    many(x, tasks=weights).square().sum().backward()
    got = grads(many)
    for name in adapter_parameters(many):
        if any(f".{task}." in name for task in weights):
            torch.testing.assert_close(got[name], oracle_grads[name])
        else:
            assert got[name] is None
    assert current_route(many) == "first"


def test_a_list_adds_tasks_up(many: nn.Module) -> None:
    x = batch(4)
    assert torch.equal(many(x, tasks=["lora", "dora"]), many(x, tasks={"lora": 1.0, "dora": 1.0}))
    with route(many, tasks=["lora", "dora"]):
        assert torch.equal(many(x), many(x, tasks=["lora", "dora"]))
    torch.testing.assert_close(many(x, tasks=["lora"]), many(x, task="lora"))


def test_what_is_no_sum_is_refused(many: nn.Module) -> None:
    x = batch(4)
    for tasks, message in [
        ([], "not empty"),
        (["lora", "lora"], "twice"),
        ({"lora": float("nan")}, "finite"),
        ({"lora": True}, "finite number"),
        ({"lora": "1"}, "finite number"),
        (3, "a list of names or a dict"),
    ]:
        with pytest.raises(RouteError, match=message):
            many(x, tasks=tasks)
    with pytest.raises(RouteError, match="not both"):
        many(x, task="lora", tasks=["dora"])
    with pytest.raises(TaskError, match="no task 'x'"):
        many(x, tasks={"lora": 1.0, "x": 2.0})
    assert current_route(many) == "first"


# -- scaled by a tensor --------------------------------------------------------------------------------------


def places(model: nn.Module) -> dict[int, int]:
    """The adapted layers, numbered in order."""
    return {id(layer): place for place, layer in enumerate(task_layers(model, "lora").values())}


@pytest.mark.parametrize("names", [("lora", "dora"), ("first", "gated", "lora")])
def test_scalings_with_gradient_into_them(many: nn.Module, names: tuple[str, ...]) -> None:
    x = batch(2, 5)
    S = torch.randn(2, 5, 2, len(names), dtype=torch.float64, requires_grad=True)

    def weight_of(layer: int, task: str) -> Tensor | float:
        return S[:, :, layer, names.index(task)] if task in names else 0.0

    expected = oracle(many, x, weight_of)
    (wanted,) = torch.autograd.grad(expected.square().sum(), S, retain_graph=True)
    expected.square().sum().backward()
    S.grad, oracle_grads = None, grads(many)
    out = many(x, task=Scaled(names, S, places(many)))
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    torch.testing.assert_close(S.grad, wanted)
    got = grads(many)
    for name in adapter_parameters(many):
        if any(f".{task}." in name for task in names):
            torch.testing.assert_close(got[name], oracle_grads[name])
        else:
            assert got[name] is None


def test_layers_without_a_place_stay_at_their_base(many: nn.Module) -> None:
    x, S = batch(2, 5), torch.ones(2, 5, 1, 1, dtype=torch.float64)
    layer = next(iter(places(many)))
    got = many(x, task=Scaled(("lora",), S, {layer: 0}))
    torch.testing.assert_close(got, oracle(many, x, lambda i, task: float(i == 0 and task == "lora")))


def test_scalings_that_do_not_fit_are_refused(many: nn.Module) -> None:
    S = torch.ones(2, 4, 2, 1, dtype=torch.float64)
    for shape in [(2, 5), (8,), (4, 2)]:
        with pytest.raises(RouteError, match="do not fit"):
            many(batch(*shape), task=Scaled(("lora",), S, places(many)))
    assert current_route(many) == "first"


# -- activation checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_the_route_changed_before_backward(many: nn.Module, use_reentrant: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(2, 3, 2, 2, dtype=torch.float64)

    def work(run: Callable[..., Tensor]) -> tuple[dict[str, Tensor | None], Tensor]:
        x, S = batch(2, 3).requires_grad_(), values.clone().requires_grad_()
        with route(many, tasks={"lora": -0.5, "dora": 2.0}):
            first = run(many, x)
        with route(many, tasks={"lora": 3.0, "gated": 1.0}):
            second = run(many, x)
        with route(many, Scaled(("lora", "dora"), S, places(many))):
            third = run(many, x)
        set_route(many, "first")
        (first.square().sum() + second.sum() + third.exp().sum()).backward()
        return grads(many), x.grad if S.grad is None else torch.cat([x.grad.flatten(), S.grad.flatten()])

    def checked(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x, use_reentrant=use_reentrant)

    expected, leaves = work(lambda model, x: model(x))
    got, got_leaves = work(checked)
    assert_same(got, expected)
    # The reentrant variant gives gradients to its arguments alone: a router's tensor reaches it around them.
    n = 36 if use_reentrant else len(leaves)
    torch.testing.assert_close(got_leaves.flatten()[:n], leaves[:n])


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_transformers_gradient_checkpointing(
    use_reentrant: bool, llama: Make, fill: Fill, tokens: Tensor
) -> None:
    model = llama().train()
    model.config.use_cache = False
    for seed, (name, dora) in enumerate({"a": False, "b": True}.items()):
        inject(model, AdapterConfig(r=2, dora=dora), name)
        fill(model, name, seed)
    model.enable_input_require_grads()

    def work() -> dict[str, Tensor | None]:
        first = model(tokens, labels=tokens, tasks=["a", "b"]).loss
        second = model(tokens, labels=tokens, tasks={"b": -0.5, "a": 2}).loss
        set_route(model, "a")
        (first + 2 * second).backward()
        return grads(model)

    expected = work()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(work(), expected)


# -- generation, precision, compiled -------------------------------------------------------------------------


def test_generate(llama: Make, fill: Fill, tokens: Tensor) -> None:
    model = llama(initializer_range=0.4)
    for seed, name in enumerate("ab"):
        inject(model, AdapterConfig(r=4, alpha=64), name)
        fill(model, name, seed)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    with route(model, tasks={"a": 1.0, "b": 0.0}):
        got = model.generate(tokens, **options)
    with route(model, "a"):
        assert torch.equal(got, model.generate(tokens, **options))
    with route(model, tasks={"a": 1.0, "b": -1.0}):
        assert not torch.equal(got, model.generate(tokens, **options, num_beams=2))


def test_autocast(mlp: Make, fill: Fill) -> None:
    model = mlp()
    for seed, (name, dora) in enumerate({"a": False, "b": True}.items()):
        inject(model, AdapterConfig(r=2, dora=dora), name)
        fill(model, name, seed)
    x = torch.randn(4, 6)
    exact = model(x, tasks={"a": 0.5, "b": -1.0})
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, tasks={"a": 0.5, "b": -1.0})
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, atol=0.1, rtol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model).values())


# torch's tracer makes an instance of every autograd.Function that it meets, and looks at .grad of its inputs.
@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*grad attribute of a Tensor that is not a leaf",
)
@pytest.mark.parametrize("kind", ["sum", "scaled"])
@pytest.mark.parametrize("dora", [False, True])
def test_one_graph_serves_all_sums(kind: str, dora: bool, fill: Fill) -> None:
    """Law 2: 20 switches among sums of two tasks, other weights and other tasks."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    names = [f"t{i}" for i in range(5)]
    for seed, name in enumerate(names):
        inject(model, AdapterConfig(r=2, alpha=seed + 1, dora=dora), name)
        fill(model, name, seed)
    x = torch.randn(4, 3, 6)
    layers = {id(layer): place for place, layer in enumerate(task_layers(model, "t0").values())}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(20):
        pair = (names[i % 5], names[(i + 1 + i // 5 % 4) % 5])
        if kind == "sum":
            options: dict[str, object] = {"tasks": {pair[0]: i / 10 - 1, pair[1]: 1.0}}
        else:
            options = {"task": Scaled(pair, torch.randn(4, 3, 2, 2), layers)}
        model(x, **options).square().sum().backward()
        expected = grads(model)
        with route(model, **options):
            out = compiled(x)
        torch.testing.assert_close(out, model(x, **options))
        out.square().sum().backward()
        assert_same(grads(model), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_weights_are_not_rounded(default: torch.dtype, many: nn.Module) -> None:
    """0.3 is neither a float32 nor a bfloat16 number, and the model's dtype counts, not torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = many(batch(4), tasks={"lora": 0.3, "dora": -1.7})
        single = many(batch(4), tasks={"first": 0.3})
    finally:
        torch.set_default_dtype(before)
    weights = {"lora": 0.3, "dora": -1.7}
    expected = oracle(many, batch(4), lambda _, task: weights.get(task, 0.0))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    expected = oracle(many, batch(4), lambda _, task: 0.3 * (task == "first"))
    torch.testing.assert_close(single, expected, rtol=1e-12, atol=1e-12)
    assert many.float()(batch(4).float(), tasks=weights).dtype == torch.float32


def test_scalings_are_not_copied_with_a_model(many: nn.Module) -> None:
    """They are found by the identity of layers, which copies do not have: they would run their base."""
    scaled = Scaled(("lora",), torch.ones(1, 4, 2, 1), places(many))
    set_route(many, scaled)
    with pytest.raises(RouteError, match="set_route"):
        copy.deepcopy(many)
    set_route(many, "lora")
    with route(many, scaled):
        torch.testing.assert_close(copy.deepcopy(many)(batch(1, 4)), many(batch(1, 4), task="lora"))
