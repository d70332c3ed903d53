"""The first sanity check of a training program: can the model memorise a batch or two?

A model of some size brings the loss of a handful of samples near 0 within some hundred steps. If it does not, more data
will not help: labels, loss mask, learning rate or a frozen part are wrong, and it is cheap to look now.

The loader's first batches are kept and handed out in turn, in place of what the loader gives after them, so that an
epoch has as many steps as always and nothing else in the program changes. Evaluation is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from torch import Tensor, nn

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.meters import Averages
from orbit.core.ranks import everyones
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Overfit(Plugin):
    """Train on the first `batches` micro-batches only; stop, and say so, once their mean loss is under `until`.

    Give the run enough steps: it ends by itself on success. A run that ends without gets a list of what to look at.

    Args:
        batches: micro-batches that are kept, >= 1. They are part of the checkpoints.
        until: the loss that counts as memorised. Losses that do not end at 0 (a soft target, a likelihood with a
            constant) need another value.
        interval: look every so many optimizer steps; the mean is over these.
        console: where to print; only rank 0 does.

    Attributes:
        succeeded: None until the run ends, then whether `until` was reached.
        loss: the last mean.
        suspects: after a run without success: what to look at, as sentences with their evidence.

    Raises:
        ValueError: a number outside its range.
    """

    priority = Plugin.TRANSFORM

    def __init__(
        self, batches: int = 1, until: float = 0.05, interval: int = 10, console: Console | None = None
    ) -> None:
        if not isinstance(batches, int) or isinstance(batches, bool) or batches < 1:
            raise ValueError(f"Overfit(batches={batches!r}): it must be a whole number >= 1")
        if not isinstance(until, int | float) or not math.isfinite(until):
            raise ValueError(f"Overfit(until={until!r}): it must be a finite loss")
        self.batches, self.until, self.console = batches, float(until), console
        self.interval = check_interval("Overfit", interval)
        self.succeeded: bool | None = None
        self.loss = math.nan
        self.suspects: list[str] = []
        self._first = math.nan  # the first mean
        self._held: list[Any] = []
        self._turn = 0
        self._losses = Averages()

    def on_before_train(self, trainer: Core) -> None:
        if self.succeeded:
            trainer.stop("Overfit", "the run that this one resumes had succeeded")

    def on_before_batch(self, trainer: Core) -> None:
        if len(self._held) < self.batches:
            self._held.append(trainer.batch)
        else:
            trainer.use_batch(self._held[self._turn])
        self._turn = (self._turn + 1) % self.batches

    def on_after_step(self, trainer: Core) -> None:
        loss = trainer.step_info["loss"]
        if loss is not None:
            self._losses.add({"loss": loss})
        if trainer.step % self.interval == 0:
            self._look()
            if self.succeeded:
                trainer.stop("Overfit", f"the loss is {self.loss:.4g}, under {self.until:g}")

    def on_after_train(self, trainer: Core) -> None:
        if not self.succeeded:
            self._look()
        if self.succeeded:
            self._say(
                trainer,
                f"Overfit: memorised {self._what()} by step {trainer.step}: the loss is {self.loss:.4g}, under "
                f"{self.until:g}. Forward, loss, backward and optimizer work together",
            )
            return
        self.succeeded = False
        self.suspects = list(_suspects(trainer, self._first, self.loss))
        self._say(
            trainer,
            f"Overfit: {self._what()} not memorised in {trainer.step} steps: the loss went from {self._first:.4g} to "
            f"{self.loss:.4g}, not under {self.until:g}. Look at:",
            *(f"  - {line}" for line in self.suspects),
        )

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state_dict["Overfit"] = {
            "ranks": everyones(
                {"held": [_plain(batch) for batch in self._held], "losses": self._losses.state_dict()}
            ),
            "turn": self._turn,
            "first": self._first,
            "loss": self.loss,
            "succeeded": self.succeeded,
        }

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state = state_dict.get("Overfit")
        if state is None:
            return
        mine = state["ranks"][runtime.rank() % len(state["ranks"])]
        self._held, self._turn = mine["held"][: self.batches], state["turn"] % self.batches
        self._losses.load_state_dict(mine["losses"])
        self._first, self.loss, self.succeeded = state["first"], state["loss"], state["succeeded"]

    def _look(self) -> None:
        """Read the mean since the last look, the same on every rank."""
        self._losses.over_ranks()
        mean = self._losses.flush().get("loss")
        if mean is not None:
            self._first = mean if math.isnan(self._first) else self._first
            self.loss, self.succeeded = mean, mean < self.until or None

    def _what(self) -> str:
        return "the batch" if self.batches == 1 else f"the {self.batches} batches"

    def _say(self, trainer: Core, *lines: str) -> None:
        if runtime.is_main_process():
            console = self.console or getattr(trainer, "console", None) or Console()
            console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def _suspects(trainer: Core, first: float, last: float) -> list[str]:
    """What keeps a model from memorising, with the evidence at hand, the likeliest first."""
    found = []
    model, rates = trainer.unwrapped_model, ", ".join(f"{lr:.3g}" for lr in trainer.step_info.get("lr", []))
    if not math.isfinite(last):
        found.append(f"the loss is {last}: lower the learning rate ({rates}), look for broken samples")
    elif last > 1.1 * first:
        found.append(f"the loss rose from {first:.4g} to {last:.4g}: lower the learning rate ({rates})")
    elif last > 0.95 * first:
        found.append(
            f"the loss hardly moved: is the learning rate ({rates}) too low, do the labels or their mask reach the "
            "loss, does the target depend on the input?"
        )
    else:
        found.append(f"the loss was still falling: give more steps, or raise the learning rate ({rates})")
    own = list(model.parameters())
    held = {id(p) for group in trainer.updater.optimizer.param_groups for p in group["params"]}
    frozen = sum(p.numel() for p in own if not p.requires_grad)
    left_out = sum(p.numel() for p in own if p.requires_grad and id(p) not in held)
    total = sum(p.numel() for p in own)
    if frozen:
        found.append(
            f"{frozen:,} of {total:,} parameters are frozen: what trains may be too small to memorise with"
        )
    if left_out:
        found.append(f"{left_out:,} of {total:,} parameters are not in the optimizer")
    drops = [name for name, module in model.named_modules() if _drops(module)]
    if drops:
        more = f" and {len(drops) - 3} more" if len(drops) > 3 else ""
        found.append(
            f"dropout changes the model in every step ({', '.join(drops[:3])}{more}): set it to 0 here"
        )
    decay = max(
        (group.get("weight_decay", 0.0) for group in trainer.updater.optimizer.param_groups), default=0.0
    )
    if decay:
        found.append(f"weight decay ({decay:g}) pulls against memorising: set it to 0 here")
    return found


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


def _plain(value: Any) -> Any:
    """A batch as checkpoints can hold it: mappings of any class as dicts, tensors on the host."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_plain(item) for item in value)
    return [_plain(item) for item in value] if isinstance(value, list) else value
