"""One task per row of a batch: outputs, gradients, checkpointing, generation, compiling, and what is refused."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbit.adapter import (
    AdapterConfig,
    GraftError,
    PerRow,
    RouteError,
    adapter_parameters,
    current_route,
    inject,
    route,
    set_route,
)
from orbit.adapter.routes import plan
from orbit.adapter.routes.route import find_state
from orbit.adapter.routes.stacks import Sorting, sorting
from tests.adapter.routes.gradients import assert_same, grads

Make = Callable[..., nn.Module]
Fill = Callable[..., None]

CONFIGS = {
    "lora": AdapterConfig(r=2),
    "dora": AdapterConfig(r=3, dora=True),
    "gated": AdapterConfig(r=4, gated=True, rslora=True),
    "first": AdapterConfig(r=2, targets=("0",)),
    "last": AdapterConfig(r=1, dora=True, targets=("2",)),
}
ROWS = [
    ("lora", "lora", "lora"),
    ("lora", None, "dora"),
    ("dora", "gated", None, "lora", "dora", "dora"),
    ("first", "last", "first", None),
    (None, None),
]


@pytest.fixture
def many(fill: Fill) -> nn.Module:
    """A float64 model whose tasks differ in kind, rank and layers."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Linear(6, 10), nn.ReLU(inplace=True), nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    model.double()
    for seed, (name, config) in enumerate(CONFIGS.items()):
        inject(model, config, name)
        fill(model, name, seed)
    return model


def batch(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def one_by_one(model: nn.Module, x: Tensor, rows: Sequence[str | None]) -> Tensor:
    """Every row in a batch of its own."""
    each = len(x) // len(rows)
    return torch.cat([model(x[i : i + 1], task=rows[i // each]) for i in range(len(x))])


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("shape", [(), (5,)])
@pytest.mark.parametrize("each", [1, 3])
def test_every_row_has_its_task(
    many: nn.Module, rows: tuple[str | None, ...], shape: tuple[int, ...], each: int
) -> None:
    x = batch(each * len(rows), *shape)
    with torch.no_grad():
        torch.testing.assert_close(many(x, task=list(rows)), one_by_one(many, x, rows))
    assert current_route(many) == "last"


@pytest.mark.parametrize("rows", ROWS[:-1])
def test_gradients_are_the_sum_of_separate_batches(many: nn.Module, rows: tuple[str | None, ...]) -> None:
    """And a task without a row has none, not zeros."""
    x = batch(len(rows), 4)
    one_by_one(many, x, rows).square().sum().backward()
    expected = grads(many)
    many(x, task=list(rows)).square().sum().backward()
    got = grads(many)
    assert_same(got, expected)
    absent = set(CONFIGS) - set(rows)
    assert all(got[n] is None for task in absent for n in adapter_parameters(many, task))
    assert any(gradient is not None for gradient in got.values())


def test_gradients_of_the_input(many: nn.Module) -> None:
    rows = ("lora", None, "dora", "gated")
    x, z = batch(4).requires_grad_(), batch(4).requires_grad_()
    many(x, task=list(rows)).square().sum().backward()
    one_by_one(many, z, rows).square().sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_rows_without_a_task_are_the_base(many: nn.Module) -> None:
    x = batch(4)
    out = many(x, task=["dora", None, None, "gated"])
    torch.testing.assert_close(out[1:3], many(x, task=None)[1:3])
    assert torch.equal(many(x, task=[None] * 4), many(x, task=None))


def test_blocks_and_defaults(many: nn.Module) -> None:
    x, rows = batch(4), ["lora", None, "dora", "dora"]
    expected = many(x, task=rows)
    with route(many, rows):
        assert torch.equal(many(x), expected)
        torch.testing.assert_close(many(x, task="lora")[0], expected[0])
        assert torch.equal(many(x), expected)
    set_route(many, rows)
    assert torch.equal(many(x), expected)
    assert current_route(many) == PerRow(tuple(rows))
    for clone in (copy.deepcopy(many), pickle.loads(pickle.dumps(many))):
        assert torch.equal(clone(x), expected)
        assert current_route(clone) == PerRow(tuple(rows))


def test_a_route_chosen_in_inference_mode_trains(many: nn.Module) -> None:
    rows = ["lora", None, "dora", "dora"]
    with torch.inference_mode():
        set_route(many, rows)
        many(batch(4))
    many(batch(4)).sum().backward()
    assert all(p.grad is not None for p in adapter_parameters(many, "lora").values())


def test_dropout_of_each_task_is_its_own(mlp: Make, fill: Fill) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2, dropout=0.5), "wet")
    inject(model, AdapterConfig(r=2), "dry")
    fill(model)
    x = torch.randn(2, 6)
    model.train()
    outs = [model(x, task=["wet", "dry"]) for _ in range(8)]
    assert all(torch.allclose(out[1], outs[0][1]) for out in outs)
    assert len({tuple(out[0].tolist()) for out in outs}) > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_half_precision(dtype: torch.dtype, mlp: Make, fill: Fill) -> None:
    model = mlp()
    for seed, (name, dora) in enumerate({"a": False, "b": True}.items()):
        inject(model, AdapterConfig(r=2, dora=dora), name)
        fill(model, name, seed)
    x, rows = torch.randn(4, 6), ["a", None, "b", "a"]
    with torch.autocast("cpu", dtype):
        out = model(x, task=rows)
        assert out.dtype == dtype
        torch.testing.assert_close(out, one_by_one(model, x, rows))
        out.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapter_parameters(model).values())
    half = model.to(dtype)
    out = half(x.to(dtype), task=rows)
    assert out.dtype == dtype
    torch.testing.assert_close(out, one_by_one(half, x.to(dtype), rows), atol=0.02, rtol=0.02)


# -- activation checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_the_route_changed_before_backward(many: nn.Module, use_reentrant: bool) -> None:
    rows, others = ["lora", None, "dora", "gated"], ["gated", "lora", None, None]

    def work(run: Callable[..., Tensor]) -> dict[str, Tensor | None]:
        x = batch(4, 3).requires_grad_()
        with route(many, rows):
            first = run(many, x)
        with route(many, others):
            second = run(many, x)
        set_route(many, "first")
        (first.square().sum() + second.sum()).backward()
        return grads(many)

    expected = work(lambda model, x: model(x))
    assert_same(work(lambda model, x: checkpoint(model, x, use_reentrant=use_reentrant)), expected)


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
        first = model(tokens, labels=tokens, task=["a", None, "b"]).loss
        second = model(tokens, labels=tokens, task=["b", "b", "a"]).loss
        set_route(model, "a")
        (first + 2 * second).backward()
        return grads(model)

    expected = work()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    assert_same(work(), expected)


# -- generation ----------------------------------------------------------------------------------------------


@pytest.fixture
def speaker(llama: Make, fill: Fill) -> nn.Module:
    model = llama(initializer_range=0.4)
    for seed, name in enumerate("ab"):
        inject(model, AdapterConfig(r=4, alpha=64, dora=name == "b"), name)
        fill(model, name, seed, size=0.3)
    return model


@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": False, "num_beams": 3}, {"do_sample": False, "use_cache": False}],
    ids=["greedy", "beams", "no cache"],
)
def test_generate(speaker: nn.Module, options: dict[str, object], tokens: Tensor) -> None:
    options = {**options, "max_new_tokens": 6, "attention_mask": torch.ones_like(tokens)}
    rows = ["a", None, "b"]
    with route(speaker, rows):
        got = speaker.generate(tokens, **options)
    for row, task in enumerate(rows):
        with route(speaker, task):
            assert torch.equal(got[row], speaker.generate(tokens, **options)[row])
    assert not torch.equal(got[0], got[1])


def test_generate_samples_and_returns_several(speaker: nn.Module, tokens: Tensor) -> None:
    """Each row's samples are neighbours, and from one seed those of its task alone."""

    def sample(rows: object) -> Tensor:
        torch.manual_seed(0)
        with route(speaker, rows):
            return speaker.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=4,
                do_sample=True,
                num_return_sequences=2,
            )

    got = sample(["a", None, "b"])
    for row, task in enumerate(["a", None, "b"]):
        assert torch.equal(got[2 * row : 2 * row + 2], sample(task)[2 * row : 2 * row + 2])
    assert not torch.equal(got, sample(None))


def test_generate_takes_no_task(speaker: nn.Module, tokens: Tensor) -> None:
    """transformers refuses keywords that the model's forward does not have; the way is a block."""
    with pytest.raises(ValueError, match=r"not used by the model: \['task'\]"):
        speaker.generate(tokens, attention_mask=torch.ones_like(tokens), task="a", max_new_tokens=2)
    assert current_route(speaker) == "b"


# -- compiled ------------------------------------------------------------------------------------------------

# torch's tracer makes an instance of every autograd.Function that it meets, and looks at .grad of its inputs.
tracing = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*grad attribute of a Tensor that is not a leaf",
)


@tracing
@pytest.mark.parametrize("dora", [False, True])
def test_one_graph_serves_all_assignments(dora: bool, fill: Fill) -> None:
    """Law 2: 20 assignments of two tasks to rows, whoever gets how many rows."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    names = [f"t{i}" for i in range(5)]
    for seed, name in enumerate(names):
        inject(model, AdapterConfig(r=2, alpha=seed + 1, dora=dora), name)
        fill(model, name, seed)
    x = torch.randn(4, 6)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for i in range(20):
        first, second = names[i % 5], names[(i + 1 + i // 5 % 4) % 5]
        rows = [first, second, *[(None, first, second)[(i * k + k) % 3] for k in (1, 2)]]
        model(x, task=rows).square().sum().backward()
        expected = grads(model)
        with route(model, rows):
            out = compiled(x)
        torch.testing.assert_close(out, model(x, task=rows))
        out.square().sum().backward()
        assert_same(grads(model), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@tracing
def test_one_graph_serves_all_batches(mlp: Make, fill: Fill) -> None:
    """Where torch lets tensors on torch's own modules have shapes that change; else it is a graph per batch size."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = mlp()
    for seed, name in enumerate("ab"):
        inject(model, AdapterConfig(r=2), name)
        fill(model, name, seed)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    frames = []
    with torch._dynamo.config.patch(force_nn_module_property_static_shapes=False):
        for size in (4, 6, 10, 16):
            rows = ["a", None, *["b"] * (size - 2)]
            x = torch.randn(size, 6)
            with route(model, rows):
                out = compiled(x)
            frames.append(counter.frame_count)
            torch.testing.assert_close(out, model(x, task=rows))
    assert len(set(frames)) == 1
    torch._dynamo.reset()


@tracing
def test_a_language_model_compiles_once(llama: Make, fill: Fill, tokens: Tensor) -> None:
    """Training a whole transformers model, among assignments of tasks to rows."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model = llama(use_cache=False, num_hidden_layers=1).train()
    for seed, name in enumerate("abcd"):
        inject(model, AdapterConfig(r=2, targets=("v_proj", "down_proj")), name)
        fill(model, name, seed, size=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (["a", None, "b"], ["b", "c", "c"], ["d", "a", None], ["c", "d", "c"]):
        model(tokens, labels=tokens, task=rows).loss.backward()
        expected = grads(model)
        with route(model, rows):
            compiled(tokens, labels=tokens).loss.backward()
        assert_same(grads(model), expected)
    assert counter.frame_count == 1
    torch._dynamo.reset()


# -- refused -------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_fit_is_refused_before_anything_runs(many: nn.Module) -> None:
    ran = []
    many[0].register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(
        RouteError, match="one task for each of 3 rows, and Sequential was called with a batch of 4"
    ):
        many(batch(4), task=["lora", None, "dora"])
    set_route(many, ["lora", None, "dora"])
    with pytest.raises(RouteError, match="batch of 4"):
        many(batch(4))
    assert ran == []
    assert not find_state(many)._holds
    many(batch(3))
    with pytest.raises(RouteError, match="a single vector"):
        many(batch(1)[0])


class Gathers(nn.Module):
    """A mixture of experts: some tokens of the batch go through the layer."""

    def __init__(self, chosen: list[int]) -> None:
        super().__init__()
        self.fc, self.expert, self.chosen = nn.Linear(4, 4), nn.Linear(4, 4), chosen

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.fc(x.flatten(0, 1))  # every token of every row: neighbours stay together
        return self.expert(tokens[self.chosen]).sum()


@pytest.mark.parametrize("chosen", [[0, 1, 2], [0, 2, 4, 6], [1, 3, 5, 7, 9, 11, 13, 15]])
def test_gathered_tokens_are_refused(chosen: list[int], fill: Fill) -> None:
    """Also where their number is a multiple of the rows."""
    model = Gathers(chosen)
    inject(model, AdapterConfig(r=2, targets=("fc", "expert")), "a")
    fill(model)
    x = torch.randn(2, 10, 4)
    with pytest.raises(RouteError, match="the call has 2 rows, and an adapted layer was given"):
        model(x, task=["a", None])
    model(x, task="a")
    assert not find_state(model)._holds


def test_sequence_first_transformers_are_refused(fill: Fill) -> None:
    for batch_first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first).eval()
        inject(layer, AdapterConfig(r=2, targets=("linear1", "linear2")), "a")
        fill(layer)
        x = torch.randn(4, 4, 8)
        if batch_first:
            out = layer(x, task=["a", None, "a", "a"])
            torch.testing.assert_close(out[1:2], layer(x[1:2], task=None))
            torch.testing.assert_close(out[2:3], layer(x[2:3], task="a"))
        else:
            with pytest.raises(RouteError, match="batch_first=False"):
                layer(x, task=["a", None, "a", "a"])
            layer(x, task="a")


def test_transposed_inputs_are_refused(fill: Fill) -> None:
    class Transposes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.transpose(0, 1))

    model = Transposes()
    inject(model, AdapterConfig(r=2, targets=("fc",)), "a")
    fill(model)
    with pytest.raises(RouteError, match=r"was given \(6, 2, 4\)"):
        model(torch.randn(2, 6, 4), task=["a", None])


def test_data_parallel_copies_are_refused(many: nn.Module) -> None:
    with pytest.raises(GraftError, match="DistributedDataParallel"):
        many[0]._replicate_for_data_parallel()


# -- models in models, threads -------------------------------------------------------------------------------


def test_a_graft_inside_another_grafted_model(fill: Fill) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.fc = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x.flatten(0, -2)).view_as(x))

    model = Outer()
    inject(model.inner, AdapterConfig(r=2, targets=("0", "2")), "a")
    inject(model, AdapterConfig(r=2, targets=("fc",)), "b")
    inject(model, AdapterConfig(r=2, targets=("fc", "inner")), "c")
    fill(model)
    x, rows = torch.randn(4, 3, 4), ["a", "b", None, "c"]
    with torch.no_grad():
        torch.testing.assert_close(model(x, task=rows), one_by_one(model, x, rows))
        y = torch.randn(4, 4)
        torch.testing.assert_close(model.inner(y, task=rows), one_by_one(model.inner, y, rows))


def test_an_adapted_part_that_gathers_is_refused_too(fill: Fill) -> None:
    """The part's own call has other rows; the outer one's count."""
    model = Gathers([0, 2, 4, 6])
    model.expert = nn.Sequential(model.expert, nn.Identity())  # type: ignore[assignment]
    inject(model.expert, AdapterConfig(r=2, targets=("0",)), "b")
    inject(model, AdapterConfig(r=2, targets=("fc",)), "a")
    fill(model)
    with pytest.raises(RouteError, match=r"the call has 2 rows, and an adapted layer was given \(4, 4\)"):
        model(torch.randn(2, 10, 4), task=["a", "b"])
    model.expert(torch.randn(4, 4), task=["b", None])


def test_a_part_of_a_plain_model(fill: Fill) -> None:
    part = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    inject(part, AdapterConfig(r=2, targets=("0", "2")), "a")
    fill(part)
    model = nn.Sequential(nn.Linear(4, 4), part, nn.Linear(4, 2))
    x, rows = torch.randn(3, 4), ["a", None, "a"]
    with route(model, rows):
        got = model(x)
    for row, task in enumerate(rows):
        with route(model, task):
            torch.testing.assert_close(got[row : row + 1], model(x[row : row + 1]))
    with pytest.raises(TypeError, match="task"):
        model(x, task=rows)  # the hook is on the part


def test_threads_share_rows_with_batches_of_their_own(many: nn.Module) -> None:
    """The rows of a call are its thread's."""
    set_route(many, ["lora", None])
    expected, results = many(batch(6)), []

    def other(*_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=lambda: results.append(many(batch(6))))
            thread.start()
            thread.join(30)

    handle = many[2].register_forward_pre_hook(other)
    many(batch(2))
    handle.remove()
    assert torch.equal(results[0], expected)
    with route(many, ["lora", "dora"]):
        errors: list[Exception] = []

        def stranger() -> None:
            try:
                many(batch(2))
            except RouteError as error:
                errors.append(error)

        thread = threading.Thread(target=stranger)
        thread.start()
        thread.join(30)
        assert "one route at a time" in str(errors[0])


def test_rows_are_spread_once_for_each_size_of_batch(
    many: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams and flattened tokens: all layers and calls under a route share what is derived of the size."""
    made: list[int] = []

    def counted(rows: Sequence[Sequence[int]], device: torch.device) -> Sorting:
        made.append(sum(map(len, rows)))
        return sorting(rows, device)

    monkeypatch.setattr(plan, "sorting", counted)
    with route(many, ["lora", None]), torch.no_grad():
        for size in (4, 8, 4, 8, 2):
            torch.testing.assert_close(
                many(batch(size)), one_by_one(many, batch(size), ["lora", None]), check_stride=False
            )
        assert made == [2, 4, 8]
        for size in range(2, 200, 2):
            many(batch(size))
    with torch.inference_mode(), route(many, ["lora", "dora"]):
        many(batch(4))
    set_route(many, ["lora", "dora"])
    with torch.inference_mode():
        many(batch(6))
    many(batch(6)).sum().backward()  # of what inference derived nothing may be unfit for training
