"""deterministic=True: inside of the loops, and as before outside of them, on every way out."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

from orbit.core import deterministic
from orbit.engine import Engine
from tests import tiny


def settings() -> tuple[bool, bool, bool]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process with CUDA in which nothing has started it."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr("torch.backends.cuda.is_built", lambda: True)
    return monkeypatch


def engine(model: nn.Module, mode: Any) -> Engine:
    return Engine(
        model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[], device="cpu", deterministic=mode
    )


@pytest.mark.parametrize(("mode", "inside"), [(True, (True, False, False)), ("warn", (True, True, False))])
def test_the_switch_is_on_inside_of_the_loops_alone(
    mode: Any, inside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = settings()
    trainer = engine(tiny.model(), mode)
    assert settings() == before
    for _ in trainer.eval(tiny.loader()):
        assert settings() == inside
    for _ in trainer.train(tiny.loader()):
        for _ in trainer.eval(tiny.loader()):
            break
        assert settings() == inside
        trainer.auto_update()
    assert settings() == before
    for _ in trainer.train(tiny.loader()):
        break
    assert settings() == before
    with pytest.raises(KeyError), trainer:
        for _ in trainer.train(tiny.loader()):
            raise KeyError
    assert settings() == before


def test_an_operation_without_a_deterministic_form_is_named() -> None:
    class Puts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x.clone().put_(torch.tensor([0]), torch.tensor([1.0]))
            return self.layer(x)

    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        engine(Puts(), True).run(tiny.loader())
    with pytest.warns(UserWarning, match="put_ does not have a deterministic implementation"):
        engine(Puts(), "warn").run(tiny.loader(8))
    engine(Puts(), False).run(tiny.loader(8))


def test_under_base_trainer_too() -> None:
    trainer = tiny.Trainer(2, deterministic=True)
    seen = []
    trainer.forward = lambda batch: (seen.append(settings()), tiny.Trainer.forward(trainer, batch))[1]
    trainer.train()
    assert seen == [(True, False, False)] * 2


def test_cublas_is_told_before_cuda_starts(cublas: pytest.MonkeyPatch) -> None:
    engine(tiny.model(), False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    engine(tiny.model(), True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    cublas.setattr("torch.cuda.is_initialized", lambda: True)
    engine(tiny.model(), True)  # it was set in time


def test_too_late_or_to_the_contrary_is_an_error(cublas: pytest.MonkeyPatch) -> None:
    cublas.setattr("torch.cuda.is_initialized", lambda: True)
    with pytest.raises(RuntimeError, match="it is not set, and CUDA has started: start the program with"):
        deterministic.prepare()
    cublas.setattr("torch.cuda.is_initialized", lambda: False)
    cublas.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(RuntimeError, match="it is :0:0: start"):
        deterministic.prepare()


def test_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="deterministic='yes'"):
        engine(tiny.model(), "yes")
