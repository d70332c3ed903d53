"""What it means for a metric to improve, and what to say of one that is not there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from orbit.core.names import did_you_mean

_HIGHER_IS_BETTER = {
    "acc",
    "accuracy",
    "auc",
    "auroc",
    "f1",
    "precision",
    "recall",
    "bleu",
    "rouge",
    "iou",
    "map",
    "dice",
    "r2",
    "em",
}


class MetricError(ValueError):
    """A metric that something is judged by and that nobody measures."""


def direction(owner: str, monitor: str, mode: str | None) -> str:
    """ "min" or "max": as `mode` says, or for None and "auto" by the metric's name.

    >>> direction("EarlyStopping", "val_f1_macro", "auto"), direction("EarlyStopping", "val_loss", None)
    ('max', 'min')
    """
    if mode not in (None, "auto", "min", "max"):
        raise ValueError(
            f'{owner}(mode={mode!r}): use "min", "max", or None or "auto" to infer it from the name'
        )
    if mode in ("min", "max"):
        return mode
    return "max" if _HIGHER_IS_BETTER & set(re.split(r"[^a-z0-9]+", monitor.lower())) else "min"


def better(value: float, than: float | None, mode: str, by: float = 0.0) -> bool:
    """`value` is better than another one (None: the first) by more than `by`. NaN never is."""
    if math.isnan(value):
        return False
    if than is None or math.isnan(than):
        return True
    return value < than - by if mode == "min" else value > than + by


def unknown(owner: str, monitor: str, names: Iterable[str]) -> MetricError:
    """The error for a metric that was never measured, with what was."""
    known = sorted(set(names))
    return MetricError(
        f"{owner} never saw {monitor!r}: there are {', '.join(known) or 'no metrics'}"
        f"{did_you_mean(monitor, known)} Measure it in the loop (eval() fills val_loss), or monitor one of these"
    )
