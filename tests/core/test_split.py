"""Out of memory: micro-batches are halved, and the window's gradient stays what it was."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.core import Outcome, Plugin
from orbit.core.split import cut
from orbit.engine import Engine
from orbit.trainer import BaseTrainer
from tests import tiny

ROWS, LENGTH = 8, 5


class FailsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, most: int) -> Tensor:
        ctx.fails = x.shape[0] > most
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        if ctx.fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return gradient, None


class Limited(nn.Module):
    """Fits `most` rows. In a backward that fails, the last layer has its gradient already."""

    def __init__(self, most: int, where: str, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last = nn.Linear(6, 12).to(dtype), nn.Linear(12, 4).to(dtype)
        self.most, self.where = most, where
        self.tried: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.tried.append(len(x))
        if self.where == "forward" and len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        hidden = torch.tanh(self.first(x))
        if self.where == "backward":
            hidden = FailsInBackward.apply(hidden, self.most)
        return self.last(hidden)


def batches(count: int = 6, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Ragged token labels: the rows of a batch have other weights."""
    generator = torch.Generator().manual_seed(5)
    result = []
    for _ in range(count):
        x = torch.randn(ROWS, LENGTH, 6, dtype=dtype, generator=generator)
        y = torch.randint(0, 4, (ROWS, LENGTH), generator=generator)
        lengths = torch.randint(0, LENGTH + 1, (ROWS,), generator=generator)
        y[torch.arange(LENGTH) >= lengths[:, None]] = -100
        result.append((x, y))
    return result


class Gradients(Plugin):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in trainer.model.parameters()]))


class ByRow(nn.Module):
    """Mean over supervised tokens."""

    ignore_index = -100

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), target.flatten())


class Trainer(BaseTrainer):
    def __init__(
        self, model: nn.Module, hooks: list[Plugin], units: bool = True, data: Any = None, **options: Any
    ) -> None:
        super().__init__(2, device="cpu", gradient_accumulation_steps=3, **options)
        self.built, self.given, self.units, self.data = model, hooks, units, data

    def build_data_loader(self) -> Any:
        return batches() if self.data is None else self.data

    def build_model(self) -> nn.Module:
        return self.built

    def build_optimizer(self) -> Any:
        return torch.optim.SGD(self.model.parameters(), lr=0.1)

    def build_hooks(self) -> list[Plugin]:
        return self.given

    def forward(self, input: Any) -> Any:
        x, y = input
        output = self.model(x)
        if self.units:
            loss, count = ByRow()(output, y), int((y != -100).sum())
            return Outcome(loss, count, {"loss": {"copy": loss.detach()}})
        losses = output.square().mean((1, 2))
        return losses.mean(), {"largest": losses.detach().mean()}


def run(face: str, model: nn.Module, data: Any = None, **options: Any) -> tuple[list[Tensor], Any]:
    gradients = Gradients()
    if face.startswith("trainer"):
        trainer: Any = Trainer(model, [gradients], units=face == "trainer", data=data, **options)
        trainer.train()
        return gradients.seen, trainer
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Engine(
        model, optimizer, ByRow(), plugins=[gradients], device="cpu", gradient_accumulation_steps=3, **options
    )
    for _ in trainer.train(batches() if data is None else data):
        if face == "auto_update":
            trainer.auto_update()
        elif face == "update":
            trainer.update(lambda: trainer.model(trainer.data).square().mean(), weight=2.0)
        else:
            trainer.update(
                lambda: Outcome(
                    ByRow()(trainer.model(trainer.data), trainer.target),
                    (trainer.target != -100).sum().item(),
                )
            )
    return gradients.seen, trainer


FACES = ["auto_update", "update", "update_outcome", "trainer", "trainer_mean"]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("face", FACES)
def test_the_gradient_of_the_window_is_unchanged(face: str, where: str) -> None:
    whole, one = run(face, Limited(ROWS, where))
    model = Limited(3, where)
    split, other = run(face, model, split_on_oom=True)
    for got, expected in zip(split, whole, strict=True):
        assert (got - expected).norm() <= 1e-10 * expected.norm()
    assert model.tried == [8, 4, 2, 2, 2, 2, *[2] * 4 * 5], (
        "halved until it fits, and cut like that from then on"
    )
    assert len(other.step_info["records"]) == 3, "one a micro-batch"
    assert other.step_info["loss"].item() == pytest.approx(one.step_info["loss"].item(), rel=1e-10)
    assert other._epoch_losses.peek() == pytest.approx(one._epoch_losses.peek(), rel=1e-10)
    for got, expected in zip(other.step_info["records"], one.step_info["records"], strict=True):
        assert flat(got) == pytest.approx(flat(expected), rel=1e-10)


def flat(records: dict[str, Any]) -> dict[str, float]:
    return {k: v["copy"].item() if isinstance(v, dict) else v.item() for k, v in records.items()}


@pytest.mark.parametrize("face", FACES)
def test_without_a_failure_not_a_bit_changes(face: str) -> None:
    plain, guarded = Limited(ROWS, "none", torch.float64), Limited(ROWS, "none", torch.float64)
    run(face, plain)
    run(face, guarded, split_on_oom=True)
    assert tiny.same(plain, guarded)


@pytest.mark.parametrize("face", FACES)
def test_uneven_parts(face: str) -> None:
    """Batches of seven rows, cut into four and three, between batches that fit."""
    data = [(x[:rows], y[:rows]) for (x, y), rows in zip(batches(), [4, 7, 2, 7, 7, 3], strict=True)]
    expected, _ = run(face, Limited(ROWS, "forward"), data)
    got, _ = run(face, model := Limited(4, "forward"), data, split_on_oom=True)
    assert model.tried == [4, 7, 4, 3, 2, 4, 3, 4, 3, 3]
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()


def test_weights_that_stay_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator. The batch is back in hand afterwards."""
    expected, _ = run("auto_update", Limited(ROWS, "forward"))
    monkeypatch.setattr("orbit.core.update._on_host", lambda weight: False)
    model = Limited(4, "forward")
    got, _ = run("auto_update", model, split_on_oom=True)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 1e-10 * other.norm()
    data = [(x[:7], y[:7]) for x, y in batches(1)]
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), 0.1), ByRow(), plugins=[], device="cpu", split_on_oom=True
    )
    model.tried.clear()
    for _ in engine.train(data):
        engine.auto_update()
        assert engine.batch[0].shape[0] == 7
        assert engine.output is None
    assert model.tried == [7, 4, 3]


def test_a_row_that_does_not_fit_is_the_original_error_and_leaves_everything() -> None:
    model = Limited(0, "backward")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(
        torch.OutOfMemoryError, match=r"one row does not fit .*activation_checkpointing.*2\.00 GiB"
    ):
        run("auto_update", model, split_on_oom=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_a_batch_without_tensors_says_so() -> None:
    class Texts(Trainer):
        def build_data_loader(self) -> Any:
            return [["a", "b"]]

        def forward(self, input: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match="a list, has no rows of tensors and cannot be split"):
        Texts(Limited(1, "none"), [], split_on_oom=True).train()


def test_other_errors_and_runs_without_the_option_pass() -> None:
    class Broken(Limited):
        def forward(self, x: Tensor) -> Tensor:
            self.tried.append(len(x))
            raise RuntimeError("shapes differ")

    model = Broken(1, "none")
    with pytest.raises(RuntimeError, match="shapes differ"):
        run("auto_update", model, split_on_oom=True)
    assert model.tried == [8]
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory"):
        run("auto_update", Limited(3, "forward"))


def test_what_fits_is_part_of_the_state() -> None:
    model = Limited(3, "forward")
    _, trainer = run("auto_update", model, split_on_oom=True)
    state = trainer.state_dict()
    again = Limited(3, "forward")
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    resumed = Engine(again, optimizer, ByRow(), plugins=[], device="cpu", split_on_oom=True)
    resumed.load_state_dict(state)
    for _ in resumed.train(batches(), num_epochs=1):
        resumed.auto_update()
    assert set(again.tried) <= {2}


def test_evaluation_is_left_alone() -> None:
    model = Limited(3, "forward")
    engine = Engine(model, None, ByRow(), plugins=[], device="cpu", split_on_oom=True)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in engine.eval(batches(1)):
            engine.auto_update()


def test_cut() -> None:
    pair = namedtuple("pair", "x y")
    x = torch.arange(12).reshape(4, 3)
    got = cut(pair(x, [x, "whole"]), 4, 1, 3)
    assert isinstance(got, pair)
    assert torch.equal(got.x, x[1:3])
    assert torch.equal(got.y[0], x[1:3])
    assert got.y[1] == "whole"
    assert torch.equal(cut(x.T, 4, 0, 1), x.T), "another first dimension"
    for kind in (OrderedDict, lambda items: defaultdict(list, items)):
        given = kind({"x": x, "names": ["a", "b", "c", "d"], "n": 4})
        part = cut(given, 4, 3, 4)
        assert type(part) is type(given)
        assert (part["x"].tolist(), part["names"], part["n"]) == ([[9, 10, 11]], ["d"], 4)
        assert given["names"] == ["a", "b", "c", "d"]
