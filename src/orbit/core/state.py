"""Where the run stands. Everything here is a plain number or string, so that it can be printed and saved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orbit.core.nested import as_number


@dataclass
class TrainState:
    """Counters and flags of one run.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data begun before this one (0 in the first).
        call: number of the current `train()` call of the run, from 1; 0 before the first.
        first_epoch: `epoch` when the current `train()` call began; it counts its own epochs from there.
        epoch_done: the current epoch is complete and its `after_epoch` has begun.
        micro_step: micro-batches handed out.
        samples: rows handed out to this rank (first dimension of the batch's first tensor).
        phase: "idle", "train" or "eval".
        metrics: floats of the current epoch: train_loss, val_loss, val_acc and what the user adds.
        stop: (source, reason) once somebody asked to stop.
        rows_that_fit: the most rows that were found to fit into memory at a time; None as long as all did.
    """

    step: int = 0
    epoch: int = 0
    call: int = 0
    first_epoch: int = 0
    epoch_done: bool = False
    micro_step: int = 0
    samples: int = 0
    phase: str = "idle"
    metrics: dict[str, float] = field(default_factory=dict)
    stop: tuple[str, str] | None = None
    rows_that_fit: int | None = None

    _SAVED = (
        "step",
        "epoch",
        "call",
        "first_epoch",
        "epoch_done",
        "micro_step",
        "samples",
        "rows_that_fit",
    )

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._SAVED} | {
            "metrics": {name: as_number(value, name) for name, value in self.metrics.items()}
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self._SAVED:
            setattr(self, name, state[name])
        self.metrics = dict(state["metrics"])
