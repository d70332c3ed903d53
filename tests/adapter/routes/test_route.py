"""Routes: who decides which task runs, and for how long (laws 2 and 3)."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from orbit.adapter import (
    AdapterConfig,
    RouteError,
    TaskError,
    current_route,
    inject,
    merge,
    remove,
    route,
    set_route,
    task_config,
    tasks,
)
from orbit.adapter.routes.route import find_state

Make = Callable[..., nn.Module]


@pytest.fixture
def two(mlp: Make, fill: Callable[..., None]) -> nn.Module:
    """An mlp with tasks a and b, b current."""
    model = mlp()
    inject(model, AdapterConfig(r=2), "a")
    inject(model, AdapterConfig(r=2), "b")
    fill(model, "a", seed=1)
    fill(model, "b", seed=2)
    return model


def test_a_new_task_is_current_and_trains(mlp: Make) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2), "a")
    assert current_route(model) == "a"
    inject(model, AdapterConfig(r=2), "b")
    assert current_route(model) == "b"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{i}.lora_{x}.{t}.weight" for i in (0, 2) for x in "AB" for t in "ab"
    }


def test_three_ways_to_choose(two: nn.Module) -> None:
    """Law 3."""
    x = torch.randn(4, 6)
    base = copy.deepcopy(two)
    remove(base, "a")
    remove(base, "b")
    a, b, off = two(x, task="a"), two(x, task="b"), two(x, task=None)
    assert torch.equal(off, base(x))
    assert not torch.allclose(a, b)
    assert torch.equal(two(x), b)
    with route(two, "a"):
        assert torch.equal(two(x), a)
        assert torch.equal(two(x, task=None), off)
        with route(two, None):
            assert torch.equal(two(x), off)
            assert torch.equal(two(x, task="b"), b)
        assert current_route(two) == "a"
    assert current_route(two) == "b"
    set_route(two, None)
    assert torch.equal(two(x), off)
    set_route(two, "a")
    assert torch.equal(two(x), a)


def test_routes_are_released_when_something_raises(two: nn.Module) -> None:
    """Law 3: the post-hook is called always."""
    with pytest.raises(RuntimeError, match="shapes"):
        two(torch.randn(4, 5), task="a")
    assert current_route(two) == "b"
    with pytest.raises(ZeroDivisionError), route(two, "a"):
        _ = 1 / 0
    assert current_route(two) == "b"
    with pytest.raises(TaskError, match=r"no task 'c'; the model has \['a', 'b'\]"):
        two(torch.randn(4, 6), task="c")
    with pytest.raises(RouteError, match="a task's name, None for"):
        two(torch.randn(4, 6), task=["a", 3])
    with pytest.raises(
        RouteError, match="one task for each of 3 rows, and Sequential was called with a batch of 4"
    ):
        two(torch.randn(4, 6), task=["a", None, "b"])
    assert not find_state(two)._holds
    assert current_route(two) == "b"


def test_an_interrupted_call_leaves_nothing_behind(two: nn.Module) -> None:
    """torch does not run always_call hooks on a KeyboardInterrupt."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    x = torch.randn(4, 6)
    b = two(x, task="b")
    handle = two[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        two(x, task="a")
    handle.remove()
    assert torch.equal(two(x), b)
    assert current_route(two) == "b"
    handle = two[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        two(x, task="a")
    handle.remove()
    with route(two, "b"):
        assert torch.equal(two(x), b)
    set_route(two, "a")
    assert not find_state(two)._holds


def test_a_model_that_calls_itself(fill: Callable[..., None]) -> None:
    """The inner call's task is released by the inner call, and is not mistaken for a stale one."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, depth: int = 0) -> torch.Tensor:
            x = self.fc(x)
            if depth == 0:
                x = self(x, depth=1, task="b")
                x = self(x, depth=1)
            return self.fc(x)

    model, x = Twice(), torch.randn(2, 4)
    for seed, task in enumerate("ab"):
        inject(model, AdapterConfig(r=2), task)
        fill(model, task, seed)

    def fc(x: torch.Tensor, task: str) -> torch.Tensor:
        with route(model, task):
            return model.fc(x)

    expected = fc(x, "a")
    for task in "bbaaa":
        expected = fc(expected, task)
    torch.testing.assert_close(model(x, task="a"), expected)
    assert not find_state(model)._holds


def test_transformers_models_do_not_swallow_task(
    llama: Make, fill: Callable[..., None], tokens: torch.Tensor
) -> None:
    """Law 3: without the hook, `task=` would vanish in **kwargs."""
    model = llama()
    before = model(tokens).logits
    inject(model, AdapterConfig(r=4), "a")
    fill(model)
    assert torch.equal(model(tokens, task=None).logits, before)
    assert not torch.allclose(model(tokens, task="a").logits, before)
    set_route(model, None)
    assert torch.equal(model(input_ids=tokens).logits, before)


def test_generate_follows_the_route(llama: Make, fill: Callable[..., None], tokens: torch.Tensor) -> None:
    model = llama()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(tokens)}
    base = model.generate(tokens, **options)
    inject(model, AdapterConfig(r=4, alpha=64), "a")
    assert torch.equal(model.generate(tokens, **options), base)
    fill(model, size=0.5)
    tuned = model.generate(tokens, **options)
    assert not torch.equal(tuned, base)
    with route(model, None):
        assert torch.equal(model.generate(tokens, **options), base)
    set_route(model, None)
    assert torch.equal(model.generate(tokens, **options), base)
    with route(model, "a"):
        assert torch.equal(model.generate(tokens, **options), tuned)


def test_a_models_own_task_argument_stays_its_own() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor, task: int = 0) -> torch.Tensor:
            return self.fc(x) + task

    model, x = Own(), torch.randn(1, 2)
    inject(model, AdapterConfig(r=1))
    assert torch.equal(model(x, task=5), model(x) + 5)


def test_merged_weights_cannot_be_routed(two: nn.Module) -> None:
    merge(two, "a")
    two.eval()
    x = torch.randn(4, 6)
    two(x)
    for attempt in (lambda: two(x, task="b"), lambda: two(x, task=None), lambda: set_route(two, "a")):
        with pytest.raises(RouteError, match="merged into the weights"):
            attempt()
    with pytest.raises(RouteError, match="merged"), route(two, "b"):
        pass
    assert not find_state(two)._holds


def test_the_default_cannot_change_under_a_block(two: nn.Module) -> None:
    with route(two, "a"):
        for attempt in (
            lambda: set_route(two, "b"),
            lambda: remove(two, "a"),
            lambda: inject(two, AdapterConfig(r=2), "c"),
            lambda: merge(two, "a"),
        ):
            with pytest.raises(RouteError, match="running"):
                attempt()
    assert tasks(two) == ("a", "b")


def in_thread(work: Callable[[], object]) -> object:
    """The result of `work` in a thread of its own, or what it raised."""
    result: list[object] = []

    def run() -> None:
        try:
            result.append(work())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(30)
    return result[0]


def test_threads_get_an_error_and_not_each_others_task(two: nn.Module) -> None:
    x = torch.randn(4, 6)
    b = two(x)
    with route(two, "a"):
        for attempt in (
            lambda: two(x),
            lambda: two(x, task="b"),
            lambda: set_route(two, "b"),
            lambda: two[0](x),
        ):
            error = in_thread(attempt)
            assert isinstance(error, RouteError), error
        assert current_route(two) == "a"
    assert torch.equal(in_thread(lambda: two(x)), b)  # type: ignore[arg-type]
    assert not find_state(two)._holds


def test_a_thread_cannot_switch_under_a_running_forward(two: nn.Module) -> None:
    x = torch.randn(4, 6)
    seen: list[object] = []
    handle = two[1].register_forward_hook(lambda *_: seen.append(in_thread(lambda: two(x, task="a"))))
    b = two(x)
    handle.remove()
    assert isinstance(seen[0], RouteError)
    assert "one route at a time" in str(seen[0])
    assert torch.equal(two(x), b)


def test_threads_may_share_the_default(two: nn.Module) -> None:
    x = torch.randn(4, 6)
    seen: list[object] = []

    def other(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            seen.append(in_thread(lambda: two(x)))

    handle = two[2].register_forward_pre_hook(other)
    b = two(x)
    handle.remove()
    assert torch.equal(seen[0], b)  # type: ignore[arg-type]


def test_parts_adapted_apart_are_united(fill: Callable[..., None]) -> None:
    model = nn.ModuleDict({"left": nn.Sequential(nn.Linear(3, 3)), "right": nn.Sequential(nn.Linear(3, 3))})
    inject(model["left"], AdapterConfig(r=1), "l")
    inject(model["right"], AdapterConfig(r=1), "r")
    fill(model["left"])
    fill(model["right"])
    x = torch.randn(2, 3)
    on, off = model["right"](x), model["right"](x, task=None)
    assert tasks(model) == ("l", "r")
    with route(model, "l"):
        assert torch.equal(model["right"](x), off)
    set_route(model, "r")
    assert torch.equal(model["right"](x), on)
    assert torch.equal(model["left"](x, task="l"), model["left"](x, task="l"))
    assert not torch.equal(model["left"](x, task="l"), model["left"](x))


def test_parts_with_different_tasks_of_one_name_are_refused() -> None:
    model = nn.ModuleDict({"left": nn.Sequential(nn.Linear(3, 3)), "right": nn.Sequential(nn.Linear(3, 3))})
    inject(model["left"], AdapterConfig(r=1))
    inject(model["right"], AdapterConfig(r=1, dora=True))
    with pytest.raises(
        TaskError, match=r"different tasks named 'default' \(dora is False in one layer and True"
    ):
        tasks(model)


def test_parts_whose_tasks_differ_in_rank_are_one_task_of_several_ranks() -> None:
    model = nn.ModuleDict({"left": nn.Sequential(nn.Linear(3, 3)), "right": nn.Sequential(nn.Linear(3, 3))})
    inject(model["left"], AdapterConfig(r=1, alpha=4))
    inject(model["right"], AdapterConfig(r=2))
    config = task_config(model, "default")
    assert (config.rank_of("left.0"), config.alpha_of("left.0")) == (1, 4)
    assert (config.rank_of("right.0"), config.alpha_of("right.0")) == (2, 32)


def test_a_layer_that_was_replaced_is_missed(two: nn.Module) -> None:
    """Law 4: nothing vanishes silently."""
    two[0] = nn.Linear(6, 10)
    with pytest.raises(RouteError, match=r"left the model.*in_features=6"):
        two(torch.randn(2, 6))
    set_route(two, "b")
    two(torch.randn(2, 6))


# -- compiled ------------------------------------------------------------------------------------------------

# torch's tracer makes an instance of every autograd.Function that it meets, and looks at .grad of its inputs.
tracing = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*grad attribute of a Tensor that is not a leaf",
)


@tracing
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("part", ["whole", "blocks"])
def test_one_graph_serves_all_tasks_of_equal_shape(dora: bool, part: str, fill: Callable[..., None]) -> None:
    """Law 2: fullgraph, no recompilation, forward and backward."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(3)))
    names = ["a", "b", "c", "a.b", "train", *(f"t{i}" for i in range(6))]  # more than dynamo's limit of 8
    for seed, name in enumerate(names):
        inject(model, AdapterConfig(r=2, alpha=seed + 1, dora=dora), name)
        fill(model, name, seed)
    x = torch.randn(4, 6)
    expected = {name: model(x, task=name) for name in names}
    counter = CompileCounterWithBackend("aot_eager")
    compiled = model
    if part == "whole":
        compiled = torch.compile(model, backend=counter, fullgraph=True)
    else:
        for block in model:
            block.compile(backend=counter, fullgraph=True)
    frames = 0
    for index, name in enumerate(names * 2):
        with route(model, name):
            out = compiled(x)
        torch.testing.assert_close(out, expected[name])
        out.sum().backward()
        if index == 0:
            frames = counter.frame_count
        assert counter.frame_count == frames
    assert all(
        p.grad is not None for name, p in model.named_parameters() if "lora" in name and ".2.lora" not in name
    )
    with route(model, None):
        off = compiled(x)
        torch.testing.assert_close(off, model(x, task=None))
    assert counter.frame_count <= 2 * frames
    torch._dynamo.reset()


@tracing
def test_compiled_models_take_task_where_the_graph_may_break(two: nn.Module) -> None:
    torch._dynamo.reset()
    x = torch.randn(4, 6)
    expected = {name: two(x, task=name) for name in ("a", "b", None)}
    compiled = torch.compile(two, backend="aot_eager")
    for name in ("a", "b", None, "a"):
        torch.testing.assert_close(compiled(x, task=name), expected[name])
        torch.testing.assert_close(compiled(x), expected["b"])
    assert not find_state(two)._holds
    torch._dynamo.reset()


def test_blocks_that_do_not_end_in_order_say_so(two: nn.Module) -> None:
    """Two coroutines or generators of one thread, each with a block, one suspended inside of the other's."""
    set_route(two, None)
    one, other = route(two, "a"), route(two, "b")
    one.__enter__()
    other.__enter__()
    with pytest.raises(RouteError, match="task 'a' ended while the one of task 'b'"):
        one.__exit__(None, None, None)
    assert current_route(two) == "b"  # whose block still runs
    other.__exit__(None, None, None)
    assert current_route(two) is None
    set_route(two, "a")


def test_a_block_may_end_in_another_thread(two: nn.Module) -> None:
    """As that of a generator does which a server resumes in whatever thread is free."""
    set_route(two, None)
    block = route(two, "a")
    thread = threading.Thread(target=block.__enter__)
    thread.start()
    thread.join()
    assert current_route(two) == "a"
    block.__exit__(None, None, None)
    assert current_route(two) is None
    set_route(two, "b")


def test_a_route_used_inside_itself(two: nn.Module) -> None:
    set_route(two, None)
    block = route(two, "a")
    with block:
        with block:
            pass
        assert current_route(two) == "a"
    assert current_route(two) is None
