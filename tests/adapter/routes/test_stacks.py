"""Several tasks at one linear layer: every way gives what each row's task gives alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, adapter_parameters, inject, route, set_route, set_trainable
from orbit.adapter.lora import fused
from orbit.adapter.routes.plan import Scaled
from orbit.adapter.routes.stacks import (
    Stack,
    Terms,
    by_rank,
    end_to_end,
    grouped,
    per_row,
    sorting,
    stacked,
    together,
)

RANKS = (2, 3, 3)


def tasks(dora: bool) -> tuple[Tensor, Tensor, list[Terms]]:
    """W, b and the terms of three tasks of several ranks; the second is plain LoRA in any case."""
    torch.manual_seed(0)

    def t(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    terms = [Terms(t(r, 6), t(5, r), t(), t(5) if dora and k != 1 else None) for k, r in enumerate(RANKS)]
    return t(5, 6).detach(), t(5).detach(), terms


def sum_of(terms: list[Terms], weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return together(end_to_end(terms), weights, by_rank(weights, RANKS))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("length", [(), (4,), (2, 3)])
@pytest.mark.parametrize(
    "rows", [[[0], [1], [2], []], [[0, 1], [2, 3], [4, 5], []], [[4, 1], [0], [5, 2, 6], [3]]]
)
def test_each_way_is_each_rows_task(dora: bool, length: tuple[int, ...], rows: list[list[int]]) -> None:
    W, b, terms = tasks(dora)
    count = sum(map(len, rows))
    x = torch.randn(count, *length, 6, dtype=torch.float64)
    expected: list[Tensor] = [nn.functional.linear(x[row], W, b) for row in range(count)]
    for task, found in zip(terms, rows, strict=False):
        for row in found:
            expected[row] = fused(x[row], W, b, *task)
    truth = torch.stack(expected)
    order = sorting(rows, x.device)
    stack = stacked(terms, order.none)
    mask = torch.zeros(count, len(terms), dtype=torch.float64)
    for task, found in enumerate(rows[:-1]):
        mask[found, task] = 1
    weights = mask.view(count, *[1] * len(length), -1)
    ways = [
        fused(x, W, b, *sum_of(terms, weights)),
        fused(x, W, b, *per_row(stack, order, x.dim())),
    ]
    wanted = [t for task in terms for t in task if t is not None]
    best = torch.autograd.grad(truth.square().sum(), wanted, retain_graph=True)
    for y in ways:
        torch.testing.assert_close(y, truth)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), wanted, retain_graph=True), best)
    with torch.no_grad():
        torch.testing.assert_close(grouped(nn.functional.linear(x, W, b), b, x, stack, order), truth)


@pytest.mark.parametrize("dora", [False, True])
def test_a_weighted_sum_adds_up_what_each_task_adds(dora: bool) -> None:
    W, b, terms = tasks(dora)
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    u = nn.functional.linear(x, W, b)
    for weights in (torch.randn(3).double(), torch.randn(2, 4, 3).double()):
        expected = u + sum(weights[..., k, None] * (fused(x, W, b, *t) - u) for k, t in enumerate(terms))
        torch.testing.assert_close(fused(x, W, b, *sum_of(terms, weights)), expected)


def test_blocks_are_seen() -> None:
    cpu = torch.device("cpu")
    assert sorting([[0, 1], [2, 3], []], cpu).blocks
    assert sorting([[0], [1], [2]], cpu).blocks
    assert not sorting([[1], [0], []], cpu).blocks
    assert not sorting([[0, 1], [2], []], cpu).blocks


@pytest.mark.parametrize("dora", [False, True])
def test_what_is_kept_under_a_route_follows_its_sources(dora: bool) -> None:
    """32 rows of one token are grouped, and the stack is kept until a tensor that went into it changes."""
    layer = nn.Linear(6, 5)
    for name in "ab":
        inject(layer, AdapterConfig(r=2, dora=dora), name)
    with torch.no_grad():
        for parameter in adapter_parameters(layer).values():
            parameter.add_(torch.rand_like(parameter))
    x, rows = torch.randn(8, 6), [*"abbaba", None, None]

    def check() -> None:
        each = torch.stack([layer(x[i : i + 1], task=task)[0] for i, task in enumerate(rows)])
        with route(layer, rows):
            torch.testing.assert_close(layer(x), each)
            torch.testing.assert_close(layer(x), each)
            with torch.no_grad():
                for parameter in adapter_parameters(layer, "b").values():
                    parameter.mul_(1.5)
            after = layer(x)
        each = torch.stack([layer(x[i : i + 1], task=task)[0] for i, task in enumerate(rows)])
        torch.testing.assert_close(after, each)

    with torch.no_grad():
        check()
        layer.load_state_dict({k: 2 * v for k, v in layer.state_dict().items()}, assign=True)
        check()


def frozen(trains: bool = False) -> tuple[nn.Module, Tensor]:
    """A linear layer of two tasks that move nothing, unless they train, and an input."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    for task in ("a", "b"):
        inject(model, AdapterConfig(r=2, targets=["0"]), task)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_().requires_grad_(trains)
    return model, torch.randn(3, 6)


def sum_under(model: nn.Module, x: Tensor) -> Tensor:
    with route(model, tasks={"a": 0.5, "b": 2.0}):
        return model(x)


def test_frozen_tasks_are_brought_end_to_end_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from orbit.adapter.kinds import linear

    calls: list[int] = []

    def counted(terms: list[Terms]) -> Stack:
        calls.append(len(terms))
        return end_to_end(terms)

    monkeypatch.setattr(linear, "end_to_end", counted)
    model, x = frozen()
    expected = sum_under(model, x)
    assert torch.equal(sum_under(model, x), expected)
    assert calls == [2]
    with torch.inference_mode():
        assert torch.equal(sum_under(model, x), expected)
    assert calls == [2]
    with torch.no_grad():
        adapter_parameters(model, "a")["0.lora_B.a.weight"].mul_(2)
    changed = sum_under(model, x)
    assert calls == [2, 2]
    assert not torch.equal(changed, expected)
    assert not torch.equal(sum_under(copy.deepcopy(model), 2 * x), changed)
    model.double()
    torch.testing.assert_close(sum_under(model, x.double()), changed.double(), rtol=1e-4, atol=1e-4)
    model.float()
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    assert sum_under(model, x).abs().max() == 0
    trained, _ = frozen(trains=True)
    calls.clear()
    sum_under(trained, x)
    sum_under(trained, x).sum().backward()
    assert calls == [2, 2]
    assert all(p.grad is not None for p in adapter_parameters(trained).values())


def step(model: nn.Module, x: Tensor, task: str) -> None:
    """One of a fused optimizer, which writes without a mark on versions."""
    parameters = [p.requires_grad_(True) for p in adapter_parameters(model, task).values()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, fused=True)
    model(x, task=task).square().sum().backward()
    optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None


def test_training_is_seen_where_the_optimizer_leaves_no_mark() -> None:
    model, x = frozen()
    x, rows = x[:2], ["a", "b"]
    set_route(model, rows)
    for _ in range(2):
        each = {task: model(x, task=task) for task in rows}
        base = model(x, task=None)
        summed = base + 0.5 * (each["a"] - base) + 2.0 * (each["b"] - base)
        torch.testing.assert_close(sum_under(model, x), summed)
        with torch.no_grad():
            torch.testing.assert_close(model(x), torch.stack([each["a"][0], each["b"][1]]))
        step(model, x, "a")


@pytest.mark.parametrize("then", [nn.Module.eval, lambda model: set_trainable(model, "a", False)])
def test_writing_to_data_is_seen_later_and_an_exchange_of_it_at_once(
    then: Callable[[nn.Module], object],
) -> None:
    model, x = frozen()
    parameter = adapter_parameters(model, "a")["0.lora_B.a.weight"]
    before = sum_under(model, x)
    parameter.data.mul_(2)
    then(model)
    after = sum_under(model, x)
    assert not torch.equal(after, before)
    parameter.data = parameter.data / 2
    assert torch.equal(sum_under(model, x), before)


def test_what_was_made_in_inference_mode_serves_a_training_step() -> None:
    model, x = frozen()
    with torch.inference_mode():
        sum_under(model, x)
    x.requires_grad_(True)
    sum_under(model, x).sum().backward()
    assert x.grad is not None


def test_scalings_of_all_layers_are_spread_over_ranks_once_and_with_their_gradient() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    for task, r in (("a", 1), ("b", 3)):
        inject(model, AdapterConfig(r=r, targets=["0", "1"]), task)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.normal_().requires_grad_(False)
    x, places = torch.randn(2, 4, 6), {id(layer): k for k, layer in enumerate(model)}
    once = torch.rand(2, 4, 1, 2, requires_grad=True)
    grads = []
    for scalings in (once.expand(2, 4, 2, 2), once.repeat(1, 1, 2, 1)):
        scaled = Scaled(("a", "b"), scalings, places)
        with route(model, scaled):
            grads.append(torch.autograd.grad(model(x).square().sum(), once)[0])
        shared = scalings.stride(2) == 0
        found = [made[1] for key, made in scaled.cache.items() if len(key) == 4]
        assert len(found) == (1 if shared else 2)
        assert all(len(derived) == 1 for derived in found)
    torch.testing.assert_close(grads[0], grads[1])
