"""Start with a small learning rate: the gradients of the first steps are large and Adam's moments are not yet known.

    lrₖ = min_lr + (lr − min_lr)·f(k)          k = 1, 2, … the optimizer step, w = the warm-up's length in steps

    linear     f = k/w                          cosine    f = (1 − cos(π·k/w))/2
    constant   f = 0                            noam      f = min(k/w, √(w/k)), also beyond the warm-up

and f = 1 from step w on (constant: after it). lr is what the optimizer, or its scheduler, has at step k: the factor
is applied for the length of `optimizer.step()` alone, so that schedulers that compute a rate from the last one go on
undisturbed. Noam's shape is that of Vaswani et al. 2017 (arXiv 1706.03762), scaled so that lr is its peak.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from orbit.core.events import Plugin

if TYPE_CHECKING:
    from orbit.core.loop import Core

MODES = ("linear", "constant", "cosine", "noam")


class Warmup(Plugin):
    """Warm the learning rate up over the first optimizer steps, whatever scheduler follows.

    `step_info["lr"]` and the logs have the rate that a step used.

    Args:
        warmup_steps: optimizer steps, >= 1.
        warmup_epochs: instead of steps, > 0; a part of an epoch is allowed. The loader must have a length.
        mode: "linear", "constant", "cosine" or "noam".
        min_lr: where the rate starts, >= 0.

    Raises:
        ValueError: both lengths or none, or a value outside its range; at the start of training, epochs of a loader
            without a length.
    """

    priority = Plugin.TRANSFORM

    def __init__(
        self,
        warmup_steps: int | None = None,
        warmup_epochs: float | None = None,
        mode: str = "linear",
        min_lr: float = 0.0,
    ) -> None:
        if (warmup_steps is None) == (warmup_epochs is None):
            raise ValueError(
                f"Warmup(warmup_steps={warmup_steps}, warmup_epochs={warmup_epochs}): give one of them"
            )
        if warmup_steps is not None and (not isinstance(warmup_steps, int) or warmup_steps < 1):
            raise ValueError(f"Warmup(warmup_steps={warmup_steps!r}): it must be a whole number >= 1")
        if warmup_epochs is not None and not 0 < warmup_epochs < math.inf:
            raise ValueError(f"Warmup(warmup_epochs={warmup_epochs!r}): it must be a finite number > 0")
        if mode not in MODES:
            raise ValueError(f"Warmup(mode={mode!r}): choose one of {', '.join(MODES)}")
        if not 0 <= min_lr < math.inf:
            raise ValueError(f"Warmup(min_lr={min_lr!r}): it must be a finite number >= 0")
        self.warmup_steps, self.warmup_epochs = warmup_steps, warmup_epochs
        self.mode, self.min_lr = mode, min_lr
        self._length: int | None = warmup_steps
        self._rates: list[Any] = []  # of the groups, as they are outside of a step
        self._used: list[Any] = []
        self._hooks: list[Any] = []
        self._inside = 0  # how many step() are running, one calling the other

    def factor(self, k: int) -> float:
        """f of step k, 1 for the first."""
        assert self._length is not None
        part = k / self._length
        if self.mode == "noam":
            return min(part, part**-0.5)
        if part >= 1 and (self.mode != "constant" or part > 1):
            return 1.0
        return {"linear": part, "cosine": (1 - math.cos(math.pi * part)) / 2, "constant": 0.0}[self.mode]

    def on_before_train(self, trainer: Core) -> None:
        if self.warmup_epochs is not None:
            windows = trainer.steps_per_epoch
            if windows is None:
                raise ValueError(
                    f"Warmup(warmup_epochs={self.warmup_epochs}): the loader has no length; give warmup_steps"
                )
            self._length = max(1, round(self.warmup_epochs * windows))
        optimizer = trainer.updater.optimizer

        def before(*_: Any) -> None:
            self._inside += 1
            if (
                self._inside > 1
            ):  # an optimizer whose step() calls its base class's, which runs the hooks again
                return
            f = self.factor(trainer.step + 1)
            self._rates = [group["lr"] for group in optimizer.param_groups]
            self._used = [self.min_lr + (lr - self.min_lr) * f if f != 1.0 else lr for lr in self._rates]
            self._set(optimizer, self._used)

        def after(*_: Any) -> None:
            self._inside -= 1
            if not self._inside:
                self._set(optimizer, self._rates)

        self._hooks = [
            optimizer.register_step_pre_hook(before),
            optimizer.register_step_post_hook(after),
        ]

    def on_after_optimizer_step(self, trainer: Core) -> None:
        trainer.step_info["lr"] = list(self._used)

    def on_close(self, trainer: Core) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._inside:  # a step raised
            self._inside = 0
            self._set(trainer.updater.optimizer, self._rates)

    @staticmethod
    def _set(optimizer: Any, rates: list[Any]) -> None:
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = lr
