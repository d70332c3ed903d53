"""The window run again at w + e: the same window, the same random numbers, and no trace of it besides the step."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.core import Outcome, Plugin
from orbit.core.second_pass import SecondPassError
from orbit.engine import Engine
from orbit.optim import SAM
from orbit.trainer import BaseTrainer
from tests import tiny

RHO, LR = 0.1, 1e-2
FACES = pytest.mark.parametrize("face", ["auto_update", "update", "outcome", "trainer"])


def sam(model: nn.Module) -> SAM:
    return SAM(model.parameters(), torch.optim.AdamW, rho=RHO, lr=LR)


def smooth(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def data(rows: int, samples: int = 48, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    x, y = tiny.dataset(samples).tensors
    return list(zip(x.to(dtype).split(rows), y.split(rows), strict=True))


class Trainer(BaseTrainer):
    def __init__(self, model: nn.Module, batches: Any, steps: int, **options: Any) -> None:
        super().__init__(steps, device="cpu", **options)
        self.given, self.batches = model, batches

    def build_data_loader(self) -> Any:
        return self.batches

    def build_model(self) -> nn.Module:
        return self.given

    def build_optimizer(self) -> Any:
        return sam(self.model)

    def forward(self, input: Any) -> Outcome:
        return Outcome(F.cross_entropy(self.model(input[0]), input[1]), len(input[1]))


def run(face: str, model: nn.Module, batches: Any, accumulation: int, **options: Any) -> Any:
    options["gradient_accumulation_steps"] = accumulation
    torch.manual_seed(5)
    if face == "trainer":
        trainer = Trainer(model, batches, -(-len(batches) // accumulation), **options)
        trainer.train()
        return trainer
    engine = Engine(model, sam(model), nn.CrossEntropyLoss(), plugins=[], device="cpu", **options)
    for _ in engine.train(batches):
        if face == "auto_update":
            engine.auto_update()
        elif face == "update":
            engine.update(
                lambda: F.cross_entropy(engine.model(engine.data), engine.target), len(engine.target)
            )
        else:
            engine.update(
                lambda: Outcome(F.cross_entropy(engine.model(engine.data), engine.target), len(engine.target))
            )
    return engine


def by_hand(model: nn.Module, batches: Any) -> nn.Module:
    """A bare loop: the second forward with the first one's random numbers, and its running means put back."""
    optimizer = sam(model)
    torch.manual_seed(5)
    for x, y in batches:
        drawn = torch.get_rng_state()
        F.cross_entropy(model(x), y).backward()
        optimizer.first_step(zero_grad=True)
        buffers = [buffer.clone() for buffer in model.buffers()]
        torch.set_rng_state(drawn)
        F.cross_entropy(model(x), y).backward()
        optimizer.second_step(zero_grad=True)
        for buffer, value in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(value)
    return model


@FACES
def test_it_is_the_bare_loop_to_the_last_bit(face: str) -> None:
    """With dropout and batch norm."""
    assert tiny.same(
        run(face, tiny.model(), data(6, dtype=torch.float32), 1).model,
        by_hand(tiny.model(), data(6, dtype=torch.float32)),
    )


@FACES
@pytest.mark.parametrize("rows", [4, 2, 3])
def test_split_or_whole_the_window_is_the_same(face: str, rows: int) -> None:
    """One batch of eight, or as many micro-batches of four, two and three with one of two."""
    whole = smooth()
    run(face, whole, data(8), 1)
    parts = [piece for x, y in data(8) for piece in zip(x.split(rows), y.split(rows), strict=True)]
    got = smooth()
    run(face, got, parts, -(-8 // rows))
    for p, expected in zip(got.parameters(), whole.parameters(), strict=True):
        assert (p - expected).norm() <= 1e-10 * expected.norm()
    plain = smooth()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=LR)
    for x, y in data(8):
        optimizer.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        optimizer.step()
    assert (plain[0].weight - got[0].weight).norm() > 1e-4 * plain[0].weight.norm(), (
        "the base alone goes elsewhere"
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_out_of_memory_in_either_pass(accumulation: int) -> None:
    """Halved, the window is the same; the parameters are back where they were before it steps."""

    class Fits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = smooth(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if len(x) > 3 and self.calls > 2 * accumulation:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.inner(x)

    whole, model = smooth(), Fits()
    run("auto_update", whole, data(8), accumulation)
    run("auto_update", model, data(8), accumulation, split_on_oom=True)
    for p, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert (p - expected).norm() <= 1e-10 * expected.norm()


class Watch(Plugin):
    """The gradient that is stepped with, and whether the parameters are at w then."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.at_w: list[bool] = []
        self.dropped = 0

    def on_before_optimizer_step(self, trainer: Any) -> None:
        gradients = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())
        self.at_w.append(not trainer.optimizer.perturbed)

    def on_step_dropped(self, trainer: Any) -> None:
        self.dropped += 1


def test_the_second_gradient_is_clipped_and_reported() -> None:
    model, watch = smooth(), Watch()
    engine = Engine(
        model, sam(model), nn.CrossEntropyLoss(), plugins=[watch], device="cpu", grad_clip_norm=0.01,
        gradient_accumulation_steps=2,
    )  # fmt: skip
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batches = data(8)[:2]
    for _ in engine.train(batches):
        engine.auto_update()
        output, loss = engine.output, engine.loss
    assert watch.norms == pytest.approx([0.01], rel=1e-5)
    assert watch.at_w == [True]
    at_w = torch.func.functional_call(model, before, batches[-1][0])
    assert torch.equal(output, at_w), "what the user sees is the first pass's"
    assert loss == F.cross_entropy(at_w, batches[-1][1])
    both = F.cross_entropy(torch.func.functional_call(model, before, torch.cat([x for x, _ in batches])),
                           torch.cat([y for _, y in batches]))  # fmt: skip
    assert engine.step_info["loss"].item() == pytest.approx(both.item(), rel=1e-12)
    norm = engine.step_info["grad_norm"].item()
    engine.optimizer.zero_grad()
    model.load_state_dict(before)
    both = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    F.cross_entropy(model(both[0]), both[1]).backward()
    engine.optimizer.first_step(zero_grad=True)
    F.cross_entropy(model(both[0]), both[1]).backward()
    assert norm == pytest.approx(
        torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item(), rel=1e-10
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_sees_the_perturbed_weights(precision: str) -> None:
    """Autocast keeps casts of the weights; fp16's scale stays out of e."""
    model, exact = smooth(torch.float32), smooth(torch.float32)
    engine = run("auto_update", model, data(4, dtype=torch.float32), 2, mixed_precision=precision)
    run("auto_update", exact, data(4, dtype=torch.float32), 2)
    if precision == "fp16":
        assert engine.grad_scaler.get_scale() > 1.0
    start = smooth(torch.float32)
    for p, expected, first in zip(model.parameters(), exact.parameters(), start.parameters(), strict=True):
        assert (p - expected).norm() <= 0.1 * (expected - first).norm()
    torch.manual_seed(0)
    seen: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    for _ in engine.train(data(8, samples=8, dtype=torch.float32)):
        engine.auto_update()
    handle.remove()
    assert len(seen) == 2
    assert not torch.equal(*seen)


@pytest.mark.parametrize("where", ["first", "second"])
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_a_dropped_window_leaves_no_perturbation(where: str, precision: str | None) -> None:
    model, watch = tiny.model(), Watch()
    optimizer = sam(model)
    engine = Engine(
        model,
        optimizer,
        plugins=[watch],
        device="cpu",
        max_non_finite_grad_retries=3,
        mixed_precision=precision,
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def compute() -> Tensor:
        bad = engine.batch_idx == 0 and optimizer.perturbed == (where == "second")
        return F.cross_entropy(model(engine.data), engine.target) * (math.inf if bad else 1.0)

    for _ in engine.train(data(8, samples=16, dtype=torch.float32)):
        engine.update(compute)
        if engine.batch_idx == 0:
            assert watch.dropped == 1
            assert engine.step == 0
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            assert not optimizer.perturbed
            assert not optimizer.state
    assert (engine.step, watch.dropped) == (1, 1)
    if precision == "fp16":
        assert engine.grad_scaler.get_scale() == 2.0**15


def test_a_forward_that_raises_leaves_w() -> None:
    model = smooth()
    optimizer = sam(model)
    engine = Engine(model, optimizer, plugins=[], device="cpu")
    before = [p.detach().clone() for p in model.parameters()]

    def compute() -> Tensor:
        if optimizer.perturbed:
            raise KeyError("data")
        return F.cross_entropy(model(engine.data), engine.target)

    with pytest.raises(KeyError), engine:
        for _ in engine.train(data(8)):
            engine.update(compute)
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_the_generators_go_on_from_the_first_pass() -> None:
    """What the body draws after the window's last forward is not drawn again."""
    model = tiny.model()
    engine = Engine(
        model, sam(model), nn.CrossEntropyLoss(), plugins=[], device="cpu", gradient_accumulation_steps=2
    )
    for _ in engine.train(data(8, samples=16, dtype=torch.float32)):
        if engine.batch_idx == 0:
            engine.auto_update()
        torch.rand(3)
        state = torch.get_rng_state()
    assert engine.step == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_a_window_whose_last_batch_is_left_out() -> None:
    got, expected = smooth(), smooth()
    for model, batches in ((got, data(8, samples=24)), (expected, data(8, samples=16))):
        engine = Engine(
            model, sam(model), nn.CrossEntropyLoss(), plugins=[], device="cpu", gradient_accumulation_steps=3
        )
        for _ in engine.train(batches):
            if engine.batch_idx < 2:
                engine.auto_update()
        assert engine.step == 1
    assert tiny.same(got, expected)


# ── what cannot be computed again ─────────────────────────────────────────────────────────────────────────────


def test_a_loss_that_is_a_tensor_is_refused() -> None:
    model = smooth()
    engine = Engine(model, sam(model), nn.CrossEntropyLoss(), plugins=[], device="cpu")
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(SecondPassError, match=r"SAM takes the gradient twice.*update\(lambda: .*auto_update"):
        for _ in engine.train(data(8)):
            engine.update(F.cross_entropy(model(engine.data), engine.target))
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))
    for _ in engine.train(data(8)):
        engine.update(None)
    for _ in engine.eval(data(8)):
        engine.update(F.cross_entropy(model(engine.data), engine.target))
    assert engine.metrics["val_loss"] > 0


@pytest.mark.parametrize("way", ["closure", "function", "comprehension"])
def test_a_variable_of_the_loop_is_an_error_in_a_window_of_several(way: str) -> None:
    """By the time the window is run again it is the last micro-batch's."""
    model = smooth()
    engine = Engine(model, sam(model), plugins=[], device="cpu", gradient_accumulation_steps=2)
    with pytest.raises(SecondPassError, match="the variable 'x' .*is the last micro-batch's.*lambda x=x"):
        for x in (at.data for at in engine.train(data(8))):

            def helper() -> Tensor:
                return model(x)  # noqa: B023

            losses = {
                "closure": lambda: F.cross_entropy(model(x), engine.target),  # noqa: B023
                "function": lambda: F.cross_entropy(helper(), engine.target),
                "comprehension": lambda: sum(model(part).square().mean() for part in [x]),  # noqa: B023
            }
            engine.update(losses[way])
    assert not engine.optimizer.perturbed


def test_values_that_are_kept_are_the_micro_batchs() -> None:
    got, expected = smooth(), smooth()
    engine = Engine(got, sam(got), plugins=[], device="cpu", gradient_accumulation_steps=2)
    for _ in engine.train(data(8)):
        x, y = engine.batch
        engine.update(lambda x=x, y=y: F.cross_entropy(got(x), y))
    run("update", expected, data(8), 2)
    for p, other in zip(got.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", ["number", "attribute"])
def test_what_chooses_the_batch_is_one_too(way: str) -> None:
    """A number that indexes the batches, and a tensor that lies in an object of the user's."""
    model, batches = smooth(), data(8)[:1] * 4
    engine = Engine(model, sam(model), plugins=[], device="cpu", gradient_accumulation_steps=2)

    class Mine:
        def __init__(self) -> None:
            self.calls, self.last = 0, torch.zeros(())

        def loss(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = model(x).square().mean()
            return self.last

    mine, calls = Mine(), 0
    name = {"number": "number", "attribute": "mine.x"}[way]
    with pytest.raises(
        SecondPassError, match=f"the variable '{name}' .*update.lambda {name.split('.')[-1]}={name}"
    ):
        for number, _ in enumerate(engine.train(batches)):

            def compute(way: str = way) -> Tensor:
                nonlocal calls
                calls += 1  # what the function writes itself is no reason
                return mine.loss(batches[number][0] if way == "number" else mine.x)  # noqa: B023

            if way == "attribute":
                mine.x = engine.data.clone()
            engine.update(compute)
    assert not engine.optimizer.perturbed
    for number, _ in enumerate(engine.train(batches)):
        engine.update(lambda number=number: mine.loss(batches[number][0]))
    assert engine.step == 2
