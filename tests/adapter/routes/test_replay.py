"""Activation checkpointing replays a forward under the route that it had (law 5)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbit.adapter import (
    AdapterConfig,
    RouteError,
    adapter_parameters,
    inject,
    remove,
    route,
    set_route,
)
from orbit.adapter.routes import replay
from orbit.adapter.routes.route import find_state

Make = Callable[..., nn.Module]
Run = Callable[..., Tensor]


def plain(function: Run, *args: Tensor) -> Tensor:
    return function(*args)


def non_reentrant(function: Run, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def reentrant(function: Run, *args: Tensor) -> Tensor:
    return checkpoint(function, *args, use_reentrant=True)


def nested(function: Run, *args: Tensor) -> Tensor:
    return reentrant(lambda *inner: reentrant(function, *inner), *args)


def mixed(function: Run, *args: Tensor) -> Tensor:
    return non_reentrant(lambda *inner: reentrant(function, *inner), *args)


# torch's tracer makes an instance of every autograd.Function that it meets, and looks at .grad of its inputs.
tracing = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*grad attribute of a Tensor that is not a leaf",
)
WAYS = [non_reentrant, reentrant, nested, mixed]


class Net(nn.Module):
    """Two blocks, run by `how`."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6), nn.Tanh()) for _ in range(2)
        )
        self.how = plain

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.how(block, x)
        return x


@pytest.fixture
def net(fill: Callable[..., None]) -> Net:
    model = Net().double()
    for seed, task in enumerate("abc"):
        inject(model, AdapterConfig(r=2, targets=("blocks",), dora=task == "b"), task)
        fill(model, task, seed)
    return model


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    found = {
        name: None if p.grad is None else p.grad.clone() for name, p in adapter_parameters(model).items()
    }
    model.zero_grad(set_to_none=True)
    return found


def same(model: nn.Module, how: Run, work: Callable[[], None]) -> None:
    """`work` leaves the same gradients whether the model is checkpointed or not."""
    model.how = plain
    work()
    expected = grads(model)
    model.how = how
    work()
    got = grads(model)
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient)


def leaf() -> Tensor:
    return torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6).requires_grad_()


@pytest.mark.parametrize("how", WAYS)
def test_tasks_of_calls(net: Net, how: Run) -> None:
    """Two losses under two tasks, one backward when neither is current."""

    def work() -> None:
        (net(leaf(), task="a").sum() + net(leaf(), task="b").square().sum() + net(leaf()).sum()).backward()

    same(net, how, work)


@pytest.mark.parametrize("how", WAYS)
def test_tasks_of_blocks_and_defaults(net: Net, how: Run) -> None:
    def work() -> None:
        set_route(net, "a")
        first = net(leaf())
        set_route(net, "b")
        second = net(leaf())
        with route(net, None):
            third = net(leaf())
        with route(net, "c"):
            (second.sum() + third.sum()).backward()
            with route(net, "b"):
                first.square().sum().backward()

    same(net, how, work)


@pytest.mark.parametrize("how", WAYS)
def test_forwards_after_a_replay_are_unharmed(net: Net, how: Run) -> None:
    def work() -> None:
        for _ in range(3):
            first = net(leaf(), task="a")
            second = net(leaf(), task="b")
            first.sum().backward()
            third = net(leaf(), task="c")
            (second.sum() + third.sum()).backward()

    same(net, how, work)


@pytest.mark.parametrize("how", WAYS)
def test_the_whole_model_checkpointed(net: Net, how: Run) -> None:
    def work(how: Run) -> None:
        first = how(lambda x: net(x, task="a"), leaf())
        second = how(lambda x: net(x, task="b"), leaf())
        (first.sum() + second.square().sum()).backward()

    work(plain)
    expected = grads(net)
    work(how)
    got = grads(net)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)
    assert not find_state(net)._holds


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_transformers_gradient_checkpointing(
    use_reentrant: bool, when: str, llama: Make, fill: Callable[..., None], tokens: Tensor
) -> None:
    model = llama().train()
    model.config.use_cache = False

    def work() -> None:
        first = model(tokens, labels=tokens, task="a").loss
        second = model(tokens, labels=tokens, task="b").loss
        (first + 2 * second).backward()

    options = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    if when == "before":
        model.gradient_checkpointing_enable(**options)
    for seed, task in enumerate("ab"):
        inject(model, AdapterConfig(r=2, targets=("layers",)), task)
        fill(model, task, seed)
    if when == "after":
        model.gradient_checkpointing_enable(**options)
    model.enable_input_require_grads()
    replays = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: replays.append(replay.in_backward())
    )
    work()
    assert True in replays
    got = grads(model)
    handle.remove()
    model.gradient_checkpointing_disable()
    work()
    for name, gradient in grads(model).items():
        torch.testing.assert_close(got[name], gradient)


def test_a_forward_inside_a_backward_takes_the_task_that_it_asks_for(net: Net) -> None:
    """It is no replay: a hook on a gradient evaluates the model under a task of its own."""
    seen = []
    expected = {task: net(leaf(), task=task).detach() for task in "ab"}
    out = net(leaf(), task="a")
    with torch.no_grad():
        out.register_hook(lambda _: seen.append(net(leaf(), task="b").detach()))

    def under_a_block(_: Tensor) -> None:
        with route(net, "a"):
            seen.append(net(leaf()).detach())

    out.register_hook(under_a_block)
    out.sum().backward()
    assert torch.equal(seen[0], expected["b"])
    assert torch.equal(seen[1], expected["a"])
    assert not find_state(net)._holds


def test_a_replay_that_cannot_be_pinned_raises(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """More switches than are remembered lie between the forward and its replay."""
    monkeypatch.setattr(replay, "LIMIT", 8)
    net.how = non_reentrant
    out = net(leaf(), task="a")
    for _ in range(10):
        net(leaf(), task="b")
    with pytest.raises(RouteError, match="switches lie between"):
        out.sum().backward()


def test_a_replay_of_several_threads_forwards_raises(net: Net) -> None:
    """Nodes are numbered per thread, so their numbers do not tell whose task it was."""
    net.how = non_reentrant
    results = []

    def forward(task: str) -> None:
        results.append(net(leaf(), task=task))

    for task in "ab":
        thread = threading.Thread(target=forward, args=(task,))
        thread.start()
        thread.join()
    with pytest.raises(RouteError, match="threads"):
        results[0].sum().backward()


@pytest.mark.parametrize("how", [non_reentrant, reentrant])
def test_a_replay_of_a_task_that_was_removed_raises(net: Net, how: Run) -> None:
    """A layer without the task would run its base, and the layers before it would get its gradients."""
    net.how = how
    with route(net, "a"):
        loss = net(leaf()).square().sum()
    remove(net, "a")
    with pytest.raises(RouteError, match="under task 'a', which was removed"):
        loss.backward()


def test_one_route_needs_no_history(net: Net) -> None:
    """As long as nothing is switched, replays in any thread are plain."""
    for task in "ab":
        remove(net, task)
    model = copy.deepcopy(net)
    set_route(model, "c")
    model = copy.deepcopy(model)
    model.how = non_reentrant
    out = []
    thread = threading.Thread(target=lambda: out.append(model(leaf())))
    thread.start()
    thread.join()
    out[0].sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(model).values())


def test_history_stays_small(net: Net) -> None:
    for _ in range(50):
        with torch.no_grad():
            net(leaf(), task="a")
    numbers, tasks = find_state(net)._history._switches[threading.get_ident()]
    assert len(numbers) == len(tasks) < 20


def test_history_keeps_few_tensors(net: Net) -> None:
    """What a route of rows derives for its layers is let go soon, though the route itself is remembered."""
    with route(net, ["a", "b", None]):
        first = non_reentrant(net, leaf()).square().sum()
    routes = find_state(net)._history._switches[threading.get_ident()][1]  # type: ignore[union-attr]
    for _ in range(40):
        net(leaf(), task=["b", "a", "a"])
    kept = [r for r in routes if getattr(r, "cache", None)]
    assert len(routes) > 40
    assert 0 < len(kept) <= 16
    first.backward()  # and is made anew
    got = grads(net)
    with route(net, ["a", "b", None]):
        net(leaf()).square().sum().backward()
    for name, gradient in grads(net).items():
        torch.testing.assert_close(got[name], gradient)


@tracing
@pytest.mark.parametrize("how", [non_reentrant, reentrant])
def test_compiled_blocks(net: Net, how: Run) -> None:
    """A compiled layer cannot ask what its forward saw; the outputs' hooks tell it."""
    torch._dynamo.reset()

    def work() -> None:
        set_route(net, "b")
        first = net(leaf(), task="a")
        with route(net, "c"):
            second = net(leaf())
        third = net(leaf())
        (first.sum() + second.square().sum()).backward()
        set_route(net, None)
        third.exp().sum().backward()

    work()
    expected = grads(net)
    for block in net.blocks:
        block.compile(backend="aot_eager")
    net.how = how
    work()
    got = grads(net)
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient)
    set_route(net, "b")
    before = net(leaf())
    out = net(leaf(), task="a")
    out.register_hook(lambda _: 1 / 0)  # this backward fails after the route was shown
    with pytest.raises(ZeroDivisionError):
        out.sum().backward()
    net.how = plain
    torch.testing.assert_close(net(leaf()), before)
    torch._dynamo.reset()
