"""Several micro-batches in one optimizer step, for batches that do not fit into memory at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orbit.core.events import Plugin

if TYPE_CHECKING:
    from orbit.core.loop import Core


class GradientAccumulation(Plugin):
    """Step once every `steps` micro-batches. The gradient is that of the whole window (`core/update.py`), also in a
    last, shorter one.

    Args:
        steps: micro-batches in a window, >= 1.

    Raises:
        ValueError: `steps` is less than 1, or the trainer was given another number.
    """

    priority = Plugin.TRANSFORM

    def __init__(self, steps: int = 1) -> None:
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"GradientAccumulation(steps={steps!r}): it must be a whole number >= 1")
        self.steps = steps

    def on_build_model(self, trainer: Core) -> None:
        if trainer.gradient_accumulation_steps not in (1, self.steps):
            raise ValueError(
                f"GradientAccumulation(steps={self.steps}) and "
                f"gradient_accumulation_steps={trainer.gradient_accumulation_steps} "
                "contradict each other: give one of them"
            )
        trainer.gradient_accumulation_steps = self.steps
