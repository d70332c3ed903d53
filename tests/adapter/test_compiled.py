"""torch.compile: every kind in one graph, whichever task is current.

`aot_eager` traces forward and backward as inductor would and runs them by torch's own kernels, so that results
are those of eager to the bit. One test goes through inductor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import AdapterConfig, adapter_parameters, inject, set_route
from tests.adapter.test_offload import ONE_OF_EACH
from tests.laws.peft_oracle import KINDS
from tests.laws.test_adapters import config, outputs, refused

# torch itself makes an instance of a Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*Function.*should not be instantiated:DeprecationWarning")

CELLS = [
    (kind, variant)
    for kind in ONE_OF_EACH
    for variant in ("LoRA", "DoRA", "gated")
    if refused(kind, variant) is None
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter() -> Any:
    from torch._dynamo.testing import CompileCounterWithBackend

    return CompileCounterWithBackend("aot_eager")


def three(kind: str, variant: str, fill: Callable[..., None]) -> nn.Module:
    model = KINDS[kind].make().eval()
    for seed, task in enumerate("abc"):
        torch.manual_seed(seed)
        inject(model, config(kind, variant), task)
        fill(model, task, seed)
    return model


def step(kind: str, model: nn.Module, called: Any) -> dict[str, Tensor | None]:
    """The output and every task's gradients."""
    y = outputs(kind, called)
    y.square().sum().backward()
    found = {"y": y.detach(), **{name: p.grad for name, p in adapter_parameters(model).items()}}
    model.zero_grad()
    return found


def compare(mine: dict[str, Tensor | None], true: dict[str, Tensor | None], tolerance: float = 1e-6) -> None:
    for name, value in true.items():
        theirs = mine[name]
        if value is None or theirs is None:
            assert value is theirs, name
        else:
            assert (theirs - value).norm() <= tolerance * value.norm(), name


@pytest.mark.parametrize(("kind", "variant"), CELLS)
def test_one_graph_for_all_tasks(kind: str, variant: str, fill: Callable[..., None], counter: Any) -> None:
    model = three(kind, variant, fill)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for task in "abcabc":
        set_route(model, task)
        compare(step(kind, model, compiled), step(kind, model, model))
    assert counter.frame_count == 1
    set_route(model, None)
    with torch.no_grad():
        torch.testing.assert_close(outputs(kind, compiled), outputs(kind, model))  # attention has a fast path
    assert counter.frame_count == 2


ROUTES: dict[str, list[dict[str, Any]]] = {
    "rows": [{"task": row} for row in (["a", "b"], ["b", "a"], ["b", "b"])],
    "sums": [{"tasks": sums} for sums in ({"a": 0.5, "b": 2.0}, {"c": 1.0, "a": -1.0})],
}


@pytest.mark.parametrize("routes", ROUTES)
@pytest.mark.parametrize(
    "kind", ["Embedding with padding_idx", "Conv2d with groups", "MultiheadAttention", "Mixtral's experts"]
)
def test_several_tasks_in_full_graphs(
    kind: str, routes: str, fill: Callable[..., None], counter: Any
) -> None:
    model = three(kind, "LoRA", fill)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    rows = len(KINDS[kind].batch()[0])
    for way in ROUTES[routes]:
        if routes == "rows":
            way = {"task": (way["task"] * rows)[:rows]}
        set_route(model, **way)
        compare(step(kind, model, compiled), step(kind, model, model), 1e-5)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # inductor's own import
def test_inductor(fill: Callable[..., None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8))
    inject(model, AdapterConfig(r=4, dora=True))
    fill(model)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 16)
    mine, true = compiled(x), model(x)
    torch.testing.assert_close(mine, true)
    names = list(adapter_parameters(model))
    grads = [
        torch.autograd.grad(y.square().sum(), list(adapter_parameters(model).values())) for y in (mine, true)
    ]
    for name, one, other in zip(names, *grads, strict=True):
        torch.testing.assert_close(one, other, msg=name)
