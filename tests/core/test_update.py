"""Accumulation is exact, bad gradients are dropped whole, and fp16 leaves the decision to the scaler."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.core import NonFiniteGradientError, Outcome, Plugin, Updater
from orbit.engine import Engine
from tests import tiny

VOCABULARY, WIDTH, SAMPLES, LENGTH = 11, 6, 16, 9


def token_data(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(16, 9) inputs and labels with ragged lengths; rows 4-7, a whole micro-batch of four, are masked."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, dtype=dtype, generator=generator)
    labels = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (SAMPLES,), generator=generator)
    labels[torch.arange(LENGTH) >= lengths[:, None]] = -100
    labels[4:8] = -100
    return x, labels


def token_model(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, VOCABULARY)).to(dtype)


def mean_loss(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), labels.flatten(), ignore_index=-100)


def gradients(
    dtype: torch.dtype, rows: int, *, tensors: bool = False, samples: int = SAMPLES
) -> list[Tensor]:
    """The gradient that one window of micro-batches of `rows` rows steps with."""
    model = token_model(dtype)
    x, labels = (part[:samples] for part in token_data(dtype))
    caught: list[Tensor] = []
    updater = Updater(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        accumulation=SAMPLES,
        before_step=lambda: caught.extend(p.grad.clone() for p in model.parameters()),
    )
    for start in range(0, samples, rows):
        part = slice(start, start + rows)
        count: Any = (labels[part] != -100).sum()
        updater.add(
            Outcome(mean_loss(model, x[part], labels[part]), count if tensors else count.item()),
            last=start + rows >= samples,
        )
    return caught


@pytest.mark.parametrize("rows", [16, 4, 1, 3, 5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_split_or_whole_the_gradient_is_the_same(dtype: torch.dtype, tolerance: float, rows: int) -> None:
    """1×16, 4×4, 16×1 and uneven windows; ragged token counts, an all-masked micro-batch, a partial last window."""
    model = token_model(dtype)
    mean_loss(model, *token_data(dtype)).backward()
    for p, split in zip(model.parameters(), gradients(dtype, rows), strict=True):
        assert p.grad is not None
        assert (split - p.grad).norm() <= tolerance * p.grad.norm()


def test_weights_on_a_device_give_the_same_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU a tensor weight is read as a number; force the path that accelerators take."""
    expected = gradients(torch.float64, 4)
    monkeypatch.setattr("orbit.core.update._on_host", lambda weight: False)
    for split, whole in zip(gradients(torch.float64, 4, tensors=True), expected, strict=True):
        torch.testing.assert_close(split, whole, rtol=1e-10, atol=0)


def test_unit_weights_are_the_plain_mean() -> None:
    model = token_model(torch.float64)
    x, labels = token_data(torch.float64)
    parts = [(x[i : i + 4], labels[i : i + 4]) for i in (0, 8, 12)]
    (sum(mean_loss(model, *part) for part in parts) / 3).backward()
    expected = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    model.zero_grad()
    caught: list[Tensor] = []
    updater = Updater(
        torch.optim.SGD(model.parameters(), lr=0.0), model, accumulation=3,
        before_step=lambda: caught.extend(p.grad.clone() for p in model.parameters()),
    )  # fmt: skip
    for part in parts:
        updater.add(Outcome(mean_loss(model, *part)), last=False)
    for ours, theirs in zip(caught, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_a_last_partial_window_is_divided_by_its_own_size() -> None:
    """Five micro-batches in windows of two: the fifth steps alone, with the whole of its gradient."""
    norms: list[float] = []

    class Norms(Plugin):
        def on_after_step(self, trainer: Any) -> None:
            norms.append(trainer.step_info["grad_norm"].item())

    model = nn.Linear(2, 1, bias=False)
    batches = [(torch.ones(4, 2), torch.zeros(4, 1))] * 5
    engine = Engine(model, torch.optim.SGD(model.parameters(), lr=0.0), nn.MSELoss(), plugins=[Norms()], device="cpu",
                    gradient_accumulation_steps=2)  # fmt: skip
    for _ in engine.train(batches):
        engine.auto_update()
    assert len(norms) == 3
    assert norms[2] == pytest.approx(norms[0])


def test_weight_zero_contributes_nothing_even_with_a_nan_loss() -> None:
    model = nn.Linear(2, 1)
    updater = Updater(torch.optim.SGD(model.parameters(), lr=0.1), model, accumulation=2)
    before = model.weight.detach().clone()
    updater.add(Outcome(model(torch.full((1, 2), math.nan)).sum(), 0), last=False)
    assert updater.add(Outcome(model(torch.ones(1, 2)).sum(), 3), last=False)
    torch.testing.assert_close(model.weight.detach(), before - 0.1)
    assert updater.loss is not None
    assert updater.loss.isfinite()


def poisoned(at: set[int]) -> list[Any]:
    """Batches for the tiny model; those in `at` are NaN."""
    batches = [(x.clone(), y) for x, y in torch.utils.data.DataLoader(tiny.dataset(80), batch_size=8)]
    for index in at:
        batches[index][0].fill_(math.nan)
    return batches


def plain_engine(**options: Any) -> Engine:
    model = nn.Linear(8, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        torch.optim.lr_scheduler.StepLR(optimizer, 1),
        plugins=[],
        device="cpu",
        **options,
    )


def test_a_bad_window_is_dropped_without_a_trace() -> None:
    engine = plain_engine(max_non_finite_grad_retries=2)
    clean = plain_engine()
    clean.model.load_state_dict(engine.model.state_dict())
    batches = poisoned({2, 3, 6})
    for _ in engine.train(batches):
        engine.auto_update()
    good = [batch for index, batch in enumerate(batches) if index not in {2, 3, 6}]
    for _ in clean.train(good):
        clean.auto_update()
    assert engine.global_step == clean.global_step == 7
    assert tiny.same(engine.model, clean.model)
    assert engine.scheduler.last_epoch == 7


def test_a_dropped_window_is_not_part_of_the_epochs_loss() -> None:
    engine = plain_engine(max_non_finite_grad_retries=1)
    for _ in engine.train(poisoned({2})):
        engine.auto_update()
    assert math.isfinite(engine.metrics["train_loss"])


@pytest.mark.parametrize(("retries", "raised_at"), [(None, 3), (0, 3), (1, 4), (2, 5)])
def test_retries_are_counted_in_a_row(retries: int | None, raised_at: int) -> None:
    engine = plain_engine(max_non_finite_grad_retries=retries)
    before = None
    with pytest.raises(NonFiniteGradientError, match=r"not finite first in: weight, bias"):
        for _ in engine.train(poisoned({1, 3, 4, 5} if retries else {3})):
            before = {key: value.clone() for key, value in engine.model.state_dict().items()}
            engine.auto_update()
    assert engine.batch_idx == raised_at
    assert before is not None
    assert all(torch.equal(value, before[key]) for key, value in engine.model.state_dict().items())


def test_fp16_overflow_lowers_the_scale_and_repeats_the_step() -> None:
    model = nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine = Engine(model, optimizer, nn.CrossEntropyLoss(), plugins=[], device="cpu", mixed_precision="fp16")
    engine.build()
    assert engine.grad_scaler is not None
    engine.grad_scaler.load_state_dict(
        engine.grad_scaler.state_dict() | {"scale": 2.0**24, "growth_tracker": 0, "_growth_tracker": 0}
    )
    dtypes = set()
    for _ in engine.train(poisoned(set()), num_epochs=2):
        engine.auto_update()
        dtypes.add(engine.output.dtype)
    assert dtypes == {torch.float16}
    assert engine.grad_scaler.get_scale() < 2.0**24
    assert 0 < engine.global_step < 20


def test_bf16_runs_the_body_under_autocast_and_the_parameters_stay_fp32() -> None:
    engine = plain_engine(mixed_precision="bf16")
    for _ in engine.train(poisoned(set())):
        loss = F.cross_entropy(engine.model(engine.data), engine.target)
        assert engine.model(engine.data).dtype is torch.bfloat16
        engine.update(loss)
    assert engine.model.weight.dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m: m(torch.ones(2, 8)), r"shape \(2, 3\): reduce it"),
        (lambda m: m(torch.ones(2, 8)).sum().detach(), "has no gradient"),
        (lambda m: 1.0, "the loss is a float"),
    ],
)
def test_useless_losses_are_typed_errors(loss: Any, message: str) -> None:
    model = nn.Linear(8, 3)
    updater = Updater(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match=message):
        updater.add(Outcome(loss(model)), last=False)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_useless_weights_are_typed_errors(weight: float) -> None:
    model = nn.Linear(8, 3)
    updater = Updater(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(ValueError, match="finite number >= 0"):
        updater.add(Outcome(model(torch.ones(1, 8)).sum(), weight), last=False)


def test_no_loss_skips_the_backward_and_the_step_counts() -> None:
    class Sometimes(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            loss, records = super().forward(input)
            return (None if self.step % 2 else loss), records

    trainer = Sometimes(max_steps=4)
    trainer.train()
    assert trainer.step == 4
    assert trainer.step_info["loss"] is None


def test_parameters_that_join_the_optimizer_in_mid_run_are_stepped_cleared_and_clipped() -> None:
    """Gradual unfreezing by add_param_group, against a bare loop."""

    def parts() -> tuple[nn.Module, torch.optim.Optimizer, list[tuple[Tensor, Tensor]]]:
        model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 3))
        model.load_state_dict({key: value.sin() for key, value in model.state_dict().items()})
        return model, torch.optim.SGD(model[1].parameters(), lr=0.5), list(tiny.loader(24))

    class Unfreeze(Plugin):
        def on_before_epoch(self, trainer: Any) -> None:
            if trainer.epoch == 1:
                trainer.optimizer.add_param_group({"params": list(trainer.model[0].parameters())})

    torch.manual_seed(1)
    bare, optimizer, batches = parts()
    for epoch in range(2):
        if epoch == 1:
            optimizer.add_param_group({"params": list(bare[0].parameters())})
        for x, y in batches:
            bare.zero_grad()
            F.cross_entropy(bare(x), y).backward()
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.1)
            optimizer.step()
    torch.manual_seed(1)
    model, optimizer, batches = parts()
    engine = Engine(
        model, optimizer, nn.CrossEntropyLoss(), plugins=[Unfreeze()], device="cpu", grad_clip_norm=0.1
    )
    for _ in engine.train(batches, num_epochs=2):
        engine.auto_update()
    assert all(
        torch.allclose(a, b, atol=1e-7) for a, b in zip(model.parameters(), bare.parameters(), strict=True)
    )


@pytest.mark.parametrize("clip", [None, 0.01])
def test_sparse_gradients_step_as_dense_ones_do(clip: float | None) -> None:
    weights = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Flatten(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        engine = Engine(
            model, optimizer, nn.CrossEntropyLoss(), plugins=[], device="cpu", grad_clip_norm=clip,
            gradient_accumulation_steps=2,
        )  # fmt: skip
        batches = [(torch.randint(0, 10, (5, 3)), torch.randint(0, 3, (5,))) for _ in range(4)]
        for _ in engine.train(batches):
            engine.auto_update()
        weights.append(model[0].weight.detach())
    assert torch.allclose(*weights, atol=1e-6)


def test_what_cannot_be_stepped_without_arguments_is_refused_before_training() -> None:
    model = tiny.model()
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(tiny.optimizer(model))
    with pytest.raises(ValueError, match="ReduceLROnPlateau.step.. cannot do without metrics="):
        Engine(model, tiny.optimizer(model), scheduler=plateau, plugins=[], device="cpu").build()
    with pytest.raises(ValueError, match="LBFGS.step.. cannot do without closure="):
        Engine(model, torch.optim.LBFGS(model.parameters()), plugins=[], device="cpu").build()


def test_a_device_weight_loses_no_bits_of_a_wide_gradient_beside_a_narrow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("orbit.core.update._on_host", lambda weight: False)
    model = nn.ParameterList([torch.ones(3, dtype=torch.bfloat16), torch.ones(3)])
    caught: list[Tensor] = []
    updater = Updater(
        torch.optim.SGD(model.parameters(), lr=0.0),
        model,
        accumulation=2,
        before_step=lambda: caught.append(model[1].grad.clone()),
    )
    for weight in (3.0, 4.0):
        updater.add(Outcome((model[0].float() * model[1]).sum() / 3, torch.tensor(weight)), last=False)
    assert torch.allclose(caught[0], torch.full((3,), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("on_host", [True, False])
def test_a_window_that_reaches_no_parameter_of_the_optimizer_steps_with_nothing(
    monkeypatch: pytest.MonkeyPatch, on_host: bool
) -> None:
    monkeypatch.setattr("orbit.core.update._on_host", lambda weight: on_host)
    model, other = nn.Linear(2, 1), torch.ones(1, requires_grad=True)
    before = model.weight.clone()
    updater = Updater(torch.optim.SGD(model.parameters(), lr=1.0), model, accumulation=2)
    for weight in (3.0, 4.0):
        updater.add(Outcome((other * 2).sum(), torch.tensor(weight)), last=False)
    assert torch.equal(model.weight, before)
    assert updater.grad_norm == 0
