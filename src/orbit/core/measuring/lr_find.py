"""The learning-rate range test: train a little while the rate grows, and see where the loss falls fastest.

    lrₖ = min_lr·(max_lr/min_lr)^(k/(n−1))        k = 0 … n−1

The suggestion is the rate of the steepest fall of the smoothed loss over log lr, before its minimum and away from the
ends. Afterwards everything is bit for bit as it was: weights, buffers, optimizer, scheduler, scaler, random generators,
the place in the data, plugins (which see none of it), whatever happened in between. Source: Smith 2017 (arXiv
1506.01186); the suggestion as in fastai.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from orbit.core import rng
from orbit.core.events import Dispatcher, Plugin
from orbit.core.extras import need
from orbit.core.feeding.feed import Feed, FeedError
from orbit.core.meters import Averages
from orbit.core.modes import modes_kept
from orbit.core.ranks import shards
from orbit.core.update import NonFiniteGradientError

if TYPE_CHECKING:
    from orbit.core.loop import Core

_SMOOTHING = 0.85  # weight of the past in the smoothed loss
_ENDS = 10  # the suggestion leaves one in so many points out, at either end


@dataclass(frozen=True)
class LRFind:
    """What a range test came to.

    Attributes:
        lrs: the rates tried (of the first parameter group, where groups differ).
        losses: the training loss at each, before its step.
        diverged: the test ended early, since the loss had grown past `stop_at` times its best or was not finite.
    """

    lrs: list[float]
    losses: list[float]
    diverged: bool

    @property
    def smoothed(self) -> list[float]:
        """The losses as an average that looks both ways, so that it lags neither."""
        forward = _average(self.losses)
        return _average(forward[::-1])[::-1]

    @property
    def suggestion(self) -> float | None:
        """The rate at which the smoothed loss falls fastest; None if it does not fall."""
        losses, end = self.smoothed, len(self.losses) // _ENDS
        if len(losses) - 2 * end < 3:
            return None
        lowest = min(range(end, len(losses) - end), key=losses.__getitem__)
        slopes = {k: losses[k + 1] - losses[k - 1] for k in range(max(end, 1), lowest)}
        if not slopes or min(slopes.values()) >= 0:
            return None
        return self.lrs[min(slopes, key=slopes.__getitem__)]

    def __str__(self) -> str:
        found = "the loss does not fall" if self.suggestion is None else f"suggested lr {self.suggestion:.2e}"
        ended = " (diverged)" if self.diverged else ""
        tried = (
            f"{len(self.lrs)} steps from {self.lrs[0]:.1e} to {self.lrs[-1]:.1e}" if self.lrs else "no step"
        )
        return f"{found}; {tried}{ended}"

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The curve as a matplotlib Figure, saved to `path` if there is one. MissingExtraError without matplotlib."""
        need("plot", "matplotlib")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.lrs, self.losses, alpha=0.4, label="loss")
        axes.plot(self.lrs, self.smoothed, label="smoothed")
        axes.set(xscale="log", xlabel="learning rate", ylabel="training loss")
        if self.suggestion is not None:
            axes.axvline(self.suggestion, linestyle="--", color="tab:red", label=f"{self.suggestion:.2e}")
        axes.legend()
        if path is not None:
            figure.savefig(path)
        return figure


def lr_find(
    trainer: Core,
    loader: Iterable[Any],
    body: Callable[[], Any],
    *,
    min_lr: float = 1e-7,
    max_lr: float = 1.0,
    steps: int = 100,
    stop_at: float = 4.0,
) -> LRFind:
    """See `Core.lr_find`."""
    if not 0 < min_lr < max_lr < math.inf:
        raise ValueError(f"lr_find(min_lr={min_lr!r}, max_lr={max_lr!r}): they must be 0 < min_lr < max_lr")
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"lr_find(steps={steps!r}): it must be a whole number >= 2")
    if not stop_at > 1:
        raise ValueError(f"lr_find(stop_at={stop_at!r}): it must be > 1")
    if trainer.phase != "idle":
        raise RuntimeError("lr_find() inside a running loop: call it before training")
    if isinstance(loader, Iterator):
        raise FeedError(
            f"lr_find would use up the loader, a one-shot {type(loader).__name__}: pass a DataLoader or a list"
        )
    trainer.build()
    optimizer = trainer.updater.optimizer  # RuntimeError without one
    ramp = _Ramp(min_lr, max_lr, steps, stop_at)
    with _as_before(trainer, optimizer, loader):
        trainer._dispatcher = Dispatcher([ramp])
        trainer.lr_scheduler, trainer.max_non_finite_grad_retries = None, None
        trainer._make_updater()
        try:
            with closing(trainer.microbatches(loader, steps=trainer.step + steps)) as batches:  # type: ignore[type-var]
                for _ in batches:
                    body()
        except NonFiniteGradientError:
            ramp.diverged = True
    return LRFind(ramp.lrs, ramp.losses, ramp.diverged)


class _Ramp(Plugin):
    """Sets each step's rate, and notes its loss."""

    def __init__(self, min_lr: float, max_lr: float, steps: int, stop_at: float) -> None:
        self.min_lr, self.max_lr, self.steps, self.stop_at = min_lr, max_lr, steps, stop_at
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.diverged = False
        self._factors: list[float] = []  # of each parameter group, against the first
        self._average, self._best = 0.0, math.inf

    def on_before_train(self, trainer: Core) -> None:
        rates = [float(g.get("initial_lr", g["lr"])) for g in trainer.updater.optimizer.param_groups]
        self._factors = [rate / rates[0] if rates[0] > 0 else 1.0 for rate in rates]

    def on_before_optimizer_step(self, trainer: Core) -> None:
        lr = self.min_lr * (self.max_lr / self.min_lr) ** (len(self.lrs) / (self.steps - 1))
        self.lrs.append(lr)
        for group, factor in zip(trainer.updater.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = lr * factor

    def on_after_optimizer_step(self, trainer: Core) -> None:
        means = Averages()
        if trainer.step_info["loss"] is not None:
            means.add({"loss": trainer.step_info["loss"]}, trainer.updater.share)
        loss = float(trainer._means(means).get("loss", math.nan))
        self.losses.append(loss)
        count = len(self.losses)
        self._average = _SMOOTHING * self._average + (1 - _SMOOTHING) * loss
        smoothed = self._average / (1 - _SMOOTHING**count)
        self.diverged = not math.isfinite(loss) or (count > 1 and smoothed > self.stop_at * self._best)
        self._best = min(self._best, smoothed)
        if self.diverged:
            trainer.stop("lr_find", "the loss diverged")


@contextmanager
def _as_before(trainer: Core, optimizer: torch.optim.Optimizer, loader: Iterable[Any]) -> Iterator[None]:
    """Whatever happens inside leaves the trainer, its parts and the generators bit for bit as they were."""
    shards.reshard(trainer.model)  # after an evaluation its parameters() are others
    attributes = dict(vars(trainer))
    criterion = getattr(trainer, "criterion", None)
    modules = [part for part in (trainer.model, criterion) if isinstance(part, nn.Module)]
    places = [place for part in modules for place in _places(part)]
    tensors = {id(t): (t, t.detach().clone()) for holder, name in places if (t := holder[name]) is not None}
    held = [(holder, name, holder[name]) for holder, name in places]
    extra = _extra_states(modules)
    moments = deepcopy(optimizer.state_dict())
    stateful: Any = loader if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict") else None
    at = None if stateful is None else deepcopy(stateful.state_dict())
    trainer.state, trainer._epoch_losses = deepcopy(trainer.state), Averages()
    trainer.grad_scaler = deepcopy(trainer.grad_scaler)
    trainer._position = trainer._rng = None  # of a resumed run, for its own next batch
    trainer._micro_records, trainer._micro_losses = [], []
    try:
        with rng.preserved(Feed(loader).generators), modes_kept(*modules):
            yield
    finally:
        vars(trainer).clear()
        vars(trainer).update(attributes)
        shards.reshard(trainer.model)
        for holder, name, tensor in held:
            holder[name] = tensor
        with torch.no_grad():
            for tensor, value in tensors.values():
                tensor.copy_(value)
                tensor.grad = None
        for module, state in extra:
            module.set_extra_state(state)
        optimizer.load_state_dict(moments)
        if stateful is not None:
            stateful.load_state_dict(at)


def _places(part: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module keeps its tensors: those outside of its state_dict too."""
    for module in part.modules():
        for holder in (module._parameters, module._buffers):
            for name in holder:
                yield holder, name


def _extra_states(modules: list[nn.Module]) -> list[tuple[nn.Module, Any]]:
    return [
        (module, deepcopy(module.get_extra_state()))
        for part in modules
        for module in part.modules()
        if type(module).get_extra_state is not nn.Module.get_extra_state
    ]


def _average(values: list[float]) -> list[float]:
    """Exponential averages, without the pull of the zero that they start from."""
    result, total = [], 0.0
    for count, value in enumerate(values, 1):
        total = _SMOOTHING * total + (1 - _SMOOTHING) * value
        result.append(total / (1 - _SMOOTHING**count))
    return result
