"""Stop a run when what it is judged by has stopped improving."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from orbit.core.events import Plugin
from orbit.plugin import monitor as metric

if TYPE_CHECKING:
    from orbit.core.loop import Core


class EarlyStopping(Plugin):
    """Ask the trainer to stop after `patience` epochs in a row without improvement of `metrics[monitor]`.

    Epochs in which the metric was not measured do not count. A NaN never improves.

    Args:
        monitor: a key of `trainer.metrics`, e.g. "val_loss", "val_acc", "train_loss".
        mode: "min" or "max"; None or "auto" infers "max" for accuracy-like names (acc, f1, auc, ...), else "min".
        patience: epochs (or evaluations) without improvement after which to stop, >= 1.
        min_delta: an improvement must be larger than this, >= 0.
        evaluations: judge after every evaluation inside the loop, and count these instead of epochs, which may be long
            or without end.

    Attributes:
        best: the best value so far, or None.
        bad_epochs: epochs in a row since then.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: str | None = None,
        patience: int = 5,
        min_delta: float = 0.0,
        verbose: bool = True,
        evaluations: bool = False,
    ) -> None:
        if patience < 1 or min_delta < 0:
            raise ValueError(
                f"EarlyStopping(patience={patience}, min_delta={min_delta}): patience must be >= 1 and min_delta >= 0"
            )
        self.monitor = monitor
        self.mode = metric.direction("EarlyStopping", monitor, mode)
        self.patience, self.min_delta, self.verbose = patience, min_delta, verbose
        self.best: float | None = None
        self.bad_epochs = 0
        self.evaluations = evaluations
        self._resumed = self._evaluated = False

    def on_before_train(self, trainer: Core) -> None:
        if self._resumed and self.bad_epochs >= self.patience:
            trainer.stop("EarlyStopping", "the run that this one resumes had stopped")
        self._resumed = self._evaluated = False

    def on_after_eval(self, trainer: Core) -> None:
        self._evaluated = True

    def on_after_step(self, trainer: Core) -> None:
        if self.evaluations and self._evaluated:
            self._evaluated = False
            self._judge(trainer)

    def on_after_epoch(self, trainer: Core) -> None:
        if not self.evaluations:
            self._judge(trainer)

    def _judge(self, trainer: Core) -> None:
        value = trainer.metrics.get(self.monitor)
        if value is None:
            return
        if metric.better(value, self.best, self.mode, by=self.min_delta):
            self.best, self.bad_epochs = value, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs >= self.patience:
            counted = "evaluations" if self.evaluations else "epochs"
            best = "none" if self.best is None else f"{self.best:.4f}"
            reason = f"{self.monitor} has not improved for {self.bad_epochs} {counted} (best {best})"
            if self.verbose:
                trainer.logger.info("EarlyStopping: %s", reason)
            trainer.stop("EarlyStopping", reason)

    def on_after_train(self, trainer: Core) -> None:
        if self.best is not None or self.bad_epochs:
            return
        if self.monitor in trainer.metrics and not trainer.state.epoch_done:
            trainer.logger.warning(
                "EarlyStopping never looked at %s: this run had no epoch's end; EarlyStopping(evaluations=True) looks "
                "after every evaluation",
                self.monitor,
            )
        elif trainer.state.epoch_done:
            warnings.warn(
                f"EarlyStopping never saw {self.monitor!r}: metrics are "
                f"{sorted(trainer.metrics) or 'empty'}; evaluate in the loop, or "
                "monitor one of these",
                stacklevel=2,
            )

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state_dict[self._key] = {"best": self.best, "bad_epochs": self.bad_epochs}

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        if self._key in state_dict:
            self.best, self.bad_epochs = state_dict[self._key]["best"], state_dict[self._key]["bad_epochs"]
            self._resumed = True

    @property
    def _key(self) -> str:
        return f"EarlyStopping({self.monitor})"
