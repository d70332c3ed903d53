"""What one micro-batch came to: a loss, how much it weighs, and what to log.

A window's gradient is Σ wᵢ·∇lossᵢ / Σ wᵢ over its micro-batches (`core/update.py`). For a mean over
supervised tokens the weight is their number, so that a split window equals the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Outcome:
    """The result of an objective on one micro-batch.

    Attributes:
        loss: scalar tensor, the mean over the micro-batch's units; None skips the backward.
        weight: number of units that `loss` averages over (samples, supervised tokens), a number or a 0-d
            tensor, >= 0. A weight of 0 contributes nothing, even if the loss is NaN; of a weight that lies on an
            accelerator this is only known there, so its backward runs and must itself be finite (no 0/0).
        records: nested dict of numbers or 0-d tensors to log.
    """

    loss: Tensor | None
    weight: float | Tensor = 1.0
    records: Mapping[str, Any] = field(default_factory=dict)
