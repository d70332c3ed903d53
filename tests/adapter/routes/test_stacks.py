"""Several tasks at one linear layer: every way gives what each row's task gives alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, adapter_parameters, inject, route
from orbit.adapter.lora import fused
from orbit.adapter.routes.stacks import (
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
