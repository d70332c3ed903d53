"""A line an epoch, and what a colleague who looks at the curves would say, with the numbers that it rests on.

Two curves are judged (`curves.py` has the rules): the epochs' training and validation losses, and inside epochs the
mean loss of every `interval` steps, so that a run of one long epoch is advised too. Step losses stay on their device
until an interval is full, which costs one copy.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.update import NonFiniteGradientError
from orbit.plugin import curves
from orbit.plugin.curves import Evidence, Point
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core

_WINDOWS = 10  # intervals that a plateau lasts, where epochs are not judged yet
_STEP = 0.03  # of the loss, down to another plateau
_CALM = 8  # points in a row that a finding must be untrue before it is news again

SUGGESTIONS = {
    "nan": "lower the learning rate, clip gradients, look for broken samples",
    "divergence": "lower the learning rate, warm it up, or clip gradients",
    "plateau": "change the learning rate (is what should train trainable, do the labels fit?), or stop here",
    "overfitting": "stop earlier, regularise, or find more data",
    "oscillation": "lower the learning rate or the momentum, or use larger batches",
}


@dataclass(frozen=True)
class Verdict:
    """What was found, when, and on which numbers.

    Attributes:
        kind: "nan", "divergence", "plateau", "overfitting" or "oscillation".
        epoch: as `trainer.epoch`, from 0.
        step: optimizer steps done.
        finding: a sentence with the evidence in it.
        evidence: the numbers it rests on, by name.
        suggestion: what to do.
    """

    kind: str
    epoch: int
    step: int
    finding: str
    evidence: Evidence
    suggestion: str

    def __str__(self) -> str:
        return f"{self.finding}: {self.suggestion}."


class Mentor(Plugin):
    """Print each epoch's metrics and duration, and say

    - nan: a loss or a gradient is not finite (steps dropped, or the run ends on it);
    - divergence: the training loss is `divergence_threshold` times the best so far, beyond its noise;
    - plateau: it falls by less than `threshold`, or by nothing that differs from 0, in `patience` epochs (or 10
      intervals of an epoch);
    - overfitting: the validation loss rises beyond its noise while the training loss falls;
    - oscillation: the training loss rises and falls by turns, by a fifth and more.

    A verdict is given once, and again only after it was not true for 8 points in a row (a plateau: at a lower loss).

    Args:
        patience: epochs, >= 1.
        threshold: smallest fall of the loss that counts.
        divergence_threshold: > 1.
        interval: optimizer steps of a point inside an epoch, >= 1.
        verbose: False keeps the line and leaves the advice out.
        console: where to print; only rank 0 does.

    Attributes:
        verdicts: all verdicts so far.
    """

    def __init__(
        self,
        patience: int = 3,
        threshold: float = 1e-4,
        divergence_threshold: float = 2.0,
        verbose: bool = True,
        console: Console | None = None,
        interval: int = 50,
    ) -> None:
        if patience < 1 or divergence_threshold <= 1:
            raise ValueError(
                f"Mentor(patience={patience}, divergence_threshold={divergence_threshold}): "
                "patience must be >= 1, the threshold > 1"
            )
        self.patience, self.threshold, self.divergence_threshold = patience, threshold, divergence_threshold
        self.interval = check_interval("Mentor", interval)
        self.verbose = verbose
        self.console = console
        self.verdicts: list[Verdict] = []
        self._train: list[float] = []  # an epoch each
        self._val: list[tuple[float, float]] = []  # with the training loss of its epoch
        self._windows: list[Point] = []
        self._losses: list[Any] = []  # of the steps of the open interval
        self._standing: dict[str, int] = {}  # what is known already, and for how many points more
        self._began = 0.0

    @property
    def advice(self) -> list[str]:
        """All verdicts as strings."""
        return [str(verdict) for verdict in self.verdicts]

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────

    def on_before_train(self, trainer: Core) -> None:
        self._began = perf_counter()
        if self.console is None:
            self.console = getattr(trainer, "console", None) or Console()

    def on_after_step(self, trainer: Core) -> None:
        loss = trainer.step_info["loss"]
        if loss is not None:
            self._losses.append(loss)
        if trainer.step % self.interval == 0:
            self._judge_window(trainer)

    def on_step_dropped(self, trainer: Core) -> None:
        failures = trainer.updater.failures  # an overflow of fp16's scale is none
        if failures:
            self._judge(trainer, "", nan=_not_finite("the gradient", {"dropped": failures}))

    def on_after_epoch(self, trainer: Core) -> None:
        seconds, self._began = perf_counter() - self._began, perf_counter()
        metrics = trainer.metrics
        numbers = "  ".join(
            f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float)
        )
        self._say(f"epoch {trainer.epoch + 1}  step {trainer.step}  {numbers}  ({seconds:.1f} s)")
        if "train_loss" in metrics:
            self._judge_epoch(trainer, metrics["train_loss"], metrics.get("val_loss"))

    def on_exception(self, trainer: Core, exception: BaseException) -> None:
        if isinstance(exception, NonFiniteGradientError):
            norm = trainer.updater.grad_norm
            evidence = {"grad_norm": math.nan if norm is None else float(norm)}
            recent = [loss for loss in _on_host(self._losses) if math.isfinite(loss)]
            if recent:
                evidence |= {"last_loss": recent[-1], "best_loss": min(recent)}
            self._judge(trainer, "end", nan=_not_finite("the gradient", evidence))

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        self._losses = _on_host(self._losses)
        state_dict["Mentor"] = {
            "train": list(self._train),
            "val": [list(pair) for pair in self._val],
            "windows": [list(point) for point in self._windows],
            "losses": list(self._losses),
            "standing": dict(self._standing),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        if "Mentor" in state_dict:
            kept = state_dict["Mentor"]
            self._train, self._val = list(kept["train"]), [(a, b) for a, b in kept["val"]]
            self._windows, self._losses = [Point(*point) for point in kept["windows"]], list(kept["losses"])
            self._standing = dict(kept["standing"])
            self.verdicts = [Verdict(**verdict) for verdict in kept["verdicts"]]

    # ── judging ───────────────────────────────────────────────────────────────────────────────────────────────

    def _judge_epoch(self, trainer: Core, loss: float, val: float | None) -> None:
        if not math.isfinite(loss):
            self._judge(trainer, "epoch", nan=_not_finite("the training loss of the epoch", {"loss": loss}))
            return
        self._train.append(loss)
        curve = [Point(value) for value in self._train]
        found = {
            "divergence": self._divergence(curve),
            "plateau": self._plateau(curve, self.patience, "epochs"),
            "oscillation": _oscillation(curve, "epochs"),
            "nan": None,
        }
        if val is not None:
            if math.isfinite(val):
                self._val.append((val, loss))
                found["overfitting"] = self._overfitting()
            else:
                found["nan"] = _not_finite("the validation loss", {"val_loss": val})
        self._judge(trainer, "epoch", **found)

    def _judge_window(self, trainer: Core) -> None:
        losses, self._losses = _on_host(self._losses), []
        broken = [loss for loss in losses if not math.isfinite(loss)]
        if broken:
            evidence = {"loss": broken[0], "steps": float(len(broken))}
            self._judge(trainer, "steps", nan=_not_finite("the loss of a step", evidence))
            return
        if not losses:
            return
        if not self._windows:
            self._windows = curves.beginning(losses, self.divergence_threshold)
        self._windows.append(curves.summary(losses))
        unit = f"intervals of {self.interval} steps"
        self._judge(
            trainer,
            "steps",
            nan=None,
            divergence=self._divergence(self._windows),
            plateau=self._plateau(self._windows, _WINDOWS, unit),
            oscillation=_oscillation(self._windows, unit),
        )

    def _judge(self, trainer: Core, scope: str, **found: tuple[str, Evidence] | None) -> None:
        """Give what is new among the findings of one curve; None is a finding that is not true now."""
        for kind, finding in found.items():
            known = finding is not None and self._known(kind, finding[1])
            name = f"{scope}:{kind}"
            self._standing[name] = max(0, self._standing.get(name, 0) - 1) if finding is None else _CALM
            if finding is not None and not known:
                sentence, evidence = finding
                verdict = Verdict(kind, trainer.epoch, trainer.step, sentence, evidence, SUGGESTIONS[kind])
                self.verdicts.append(verdict)
                if self.verbose:
                    self._say(f"  step {trainer.step}  {kind}: {verdict}")

    def _known(self, kind: str, evidence: Evidence) -> bool:
        """It was said before and has stayed true. A plateau that noise hid for a while is the same at the same loss."""
        levels = [verdict.evidence["loss"] for verdict in self.verdicts if verdict.kind == kind == "plateau"]
        if levels and evidence["loss"] > min(levels) - _STEP * abs(min(levels)):
            return True
        return any(name.endswith(f":{kind}") and left for name, left in self._standing.items())

    def _divergence(self, curve: list[Point]) -> tuple[str, Evidence] | None:
        evidence = curves.diverged(curve, self.divergence_threshold)
        if evidence is None:
            return None
        loss, best = evidence["loss"], evidence["best"]
        ratio = f"{loss / best:.1f} times its best" if best > 0 else f"far above its best, {best:.4g}"
        return f"The training loss ({loss:.4g}) is {ratio}", evidence

    def _plateau(self, curve: list[Point], patience: int, unit: str) -> tuple[str, Evidence] | None:
        evidence = curves.flat(curve, patience, self.threshold)
        if evidence is None:
            return None
        points = int(evidence["points"])
        return (
            f"The training loss has not fallen for {points - 1} {unit} (it is {evidence['loss']:.4g})",
            evidence,
        )

    def _overfitting(self) -> tuple[str, Evidence] | None:
        evidence = curves.overfits([train for _, train in self._val], [val for val, _ in self._val])
        if evidence is None:
            return None
        return (
            f"The validation loss rises while the training loss falls: {evidence['val_loss']:.4g} after "
            f"{evidence['best']:.4g} {evidence['epochs_since']:.0f} epochs ago, while training fell by "
            f"{evidence['train_fell']:.4g}",
            evidence,
        )

    def _say(self, line: str) -> None:
        if self.console is not None and runtime.is_main_process():
            self.console.print(line, highlight=False, markup=False)


def _oscillation(curve: list[Point], unit: str) -> tuple[str, Evidence] | None:
    evidence = curves.swings(curve)
    if evidence is None:
        return None
    swing, level = evidence["median_swing"], evidence["level"]
    return (
        f"The training loss swings up and down by {swing:.3g} around {level:.3g}, {evidence['swings']:.0f} times in "
        f"the last {unit}",
        evidence,
    )


def _not_finite(what: str, evidence: Evidence) -> tuple[str, Evidence]:
    numbers = ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in evidence.items())
    return f"{what[0].upper()}{what[1:]} is not finite ({numbers})", evidence


def _on_host(losses: list[Any]) -> list[float]:
    """In one copy."""
    if not any(isinstance(loss, Tensor) for loss in losses):
        return [float(loss) for loss in losses]
    device = next(loss.device for loss in losses if isinstance(loss, Tensor))
    return torch.stack(
        [torch.as_tensor(loss, device=device).double().reshape(()) for loss in losses]
    ).tolist()
