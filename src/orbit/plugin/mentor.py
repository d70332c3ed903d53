"""A line an epoch, and advice when the numbers ask for it."""

from __future__ import annotations

import math
from time import perf_counter
from typing import TYPE_CHECKING, Any

from rich.console import Console

from orbit.core import runtime
from orbit.core.events import Plugin

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Mentor(Plugin):
    """Print each epoch's metrics and duration, and what a colleague would say about them:

    - divergence: the training loss is NaN, or `divergence_threshold` times the best so far;
    - stagnation: it has not fallen by more than `threshold` for `patience` epochs;
    - overfitting: for two epochs the validation loss rose while the training loss fell.

    Args:
        patience: epochs, >= 1.
        threshold: smallest fall of the loss that counts.
        divergence_threshold: > 1.
        verbose: False keeps the line and leaves the advice out.
        console: where to print.

    Attributes:
        advice: all advice given so far, as strings.
    """

    def __init__(
        self,
        patience: int = 3,
        threshold: float = 1e-4,
        divergence_threshold: float = 2.0,
        verbose: bool = True,
        console: Console | None = None,
    ) -> None:
        if patience < 1 or divergence_threshold <= 1:
            raise ValueError(
                f"Mentor(patience={patience}, divergence_threshold={divergence_threshold}): "
                "patience must be >= 1, the threshold > 1"
            )
        self.patience, self.threshold, self.divergence_threshold = patience, threshold, divergence_threshold
        self.verbose = verbose
        self.console = console
        self.advice: list[str] = []
        self._train: list[float] = []
        self._val: list[float] = []
        self._began = 0.0

    def on_before_train(self, trainer: Core) -> None:
        self._began = perf_counter()
        if self.console is None:
            self.console = getattr(trainer, "console", None) or Console()

    def on_after_epoch(self, trainer: Core) -> None:
        seconds, self._began = perf_counter() - self._began, perf_counter()
        metrics = trainer.metrics
        numbers = "  ".join(
            f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)
        )
        self._say(f"epoch {trainer.epoch + 1}  step {trainer.step}  {numbers}  ({seconds:.1f} s)")
        if "train_loss" not in metrics:
            return
        advice = self._judge(metrics["train_loss"])
        self._train.append(metrics["train_loss"])
        if "val_loss" in metrics:
            self._val.append(metrics["val_loss"])
            advice += self._overfitting()
        for line in advice:
            self.advice.append(line)
            if self.verbose:
                self._say(f"  {line}")

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state_dict["Mentor"] = {
            "train": list(self._train),
            "val": list(self._val),
            "advice": list(self.advice),
        }

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        if "Mentor" in state_dict:
            kept = state_dict["Mentor"]
            self._train, self._val, self.advice = list(kept["train"]), list(kept["val"]), list(kept["advice"])

    def _say(self, line: str) -> None:
        if self.console is not None and runtime.is_main_process():
            self.console.print(line, highlight=False, markup=False)

    def _judge(self, loss: float) -> list[str]:
        past = [value for value in self._train if math.isfinite(value)]
        if not math.isfinite(loss):
            return [
                f"The training loss is {loss}: lower the learning rate, clip gradients, look for broken samples."
            ]
        if past and min(past) > 0 and loss > self.divergence_threshold * min(past):
            return [
                f"The training loss ({loss:.4f}) is {loss / min(past):.1f} times its best: lower "
                "the learning rate or warm it up."
            ]
        recent, earlier = [*past, loss][-self.patience :], [*past, loss][: -self.patience]
        if earlier and min(recent) > min(earlier) - self.threshold:
            return [
                f"The training loss has not fallen for {self.patience} epochs: change the learning rate, or stop here."
            ]
        return []

    def _overfitting(self) -> list[str]:
        if len(self._val) < 3 or len(self._train) < 3:
            return []
        val, train = self._val[-3:], self._train[-3:]
        if val[0] < val[1] < val[2] and train[0] > train[1] > train[2]:
            return [
                "The validation loss rises while the training loss falls: stop earlier, regularise, or find more data."
            ]
        return []
