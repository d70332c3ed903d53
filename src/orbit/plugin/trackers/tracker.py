"""Where numbers and images go: the one interface behind a file of JSON lines, TensorBoard, W&B, MLflow and trackio.

A tracker writes four things, all under the number of the optimizer step:

    trainer.log(records)            whatever it is given, nested names joined by "/"
    trainer.log_images(records)     pictures, named likewise
    the means of `interval` steps   unless a LoggingHook is there, which gives them to trainer.log
    trainer.metrics                 at an epoch's end, as epoch/train_loss, epoch/val_loss, ...
                                    and val_loss, ... after an evaluation within an epoch

Only the main process writes. A new tracker says how to `begin`, `write`, `write_images` and `end`; one whose run lives
on elsewhere also says what a checkpoint must `remember` of it, so that a resumed run goes on in the same place.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.nested import as_number, flat
from orbit.plugin.logs import Interval, LoggingHook, check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


@dataclass
class Written:
    """What the newest step has been given: its rows of numbers, and how many images."""

    step: int = 0
    rows: list[dict[str, float]] = field(default_factory=list)
    images: int = 0


class Tracker(Plugin):
    """Base class of what keeps the numbers of a run.

    Attributes:
        written: what the newest step has been given. In a resumed run, what had been when its checkpoint was saved:
            whatever else is there of that step and of later ones will be written again.
        status: what has become of the run when `end` is called: "finished", "stopped" (left early, or by a signal) or
            "failed" (an exception).

    Args:
        interval: average over so many optimizer steps, >= 1; over ranks too, where several train one model.
    """

    priority = Plugin.MONITOR
    writes = True

    def __init__(self, interval: int = 10) -> None:
        self.interval = check_interval(type(self).__name__, interval)
        self.written = Written()
        self.status = "stopped"
        self._window = Interval(sync=True)
        self._averages = True
        self._open = self._evaluated = False

    # -- to implement ----------------------------------------------------------------------------------------

    def begin(self, trainer: Core) -> None:
        """Open whatever is written to, at step `trainer.step`: not 0 if the run was resumed."""
        raise NotImplementedError

    def write(self, records: dict[str, float], step: int) -> None:
        """Numbers by name."""
        raise NotImplementedError

    def write_images(self, images: dict[str, Any], step: int) -> None:
        """Images by name, as `trainer.log_images` was given them. Left out where a tracker has no place for them."""

    def end(self) -> None:
        """Close it; runs on every way out, of which `status` tells."""
        raise NotImplementedError

    def remember(self) -> dict[str, Any]:
        """Plain values for the checkpoint, by which a resumed run finds its place again. What was written until now
        should outlive this process from here on."""
        return {}

    def recall(self, kept: dict[str, Any]) -> None:
        """Take back what `remember` gave; before `begin`."""

    # -- events ----------------------------------------------------------------------------------------------

    def on_before_train(self, trainer: Core) -> None:
        self._averages = not any(isinstance(hook, LoggingHook) for hook in trainer.hooks)
        self._evaluated = False
        self.status = "stopped"
        if runtime.is_main_process() and not self._open:
            self.begin(trainer)
            self._open = True

    def on_after_eval(self, trainer: Core) -> None:
        self._evaluated = True

    def on_after_step(self, trainer: Core) -> None:
        if self._evaluated and not trainer.is_epoch_end:
            self._evaluated = False
            self._log(_floats(trainer.metrics, only="val_"), trainer.step)
        if not self._averages:
            return
        self._window.add(trainer)
        if trainer.step % self.interval == 0:
            self._log(self._window.flush(trainer), trainer.step)

    def on_after_epoch(self, trainer: Core) -> None:
        self._evaluated = False
        metrics = _floats(trainer.metrics)
        self._log({f"epoch/{name}": value for name, value in metrics.items()}, trainer.step)

    def on_log(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None:
        if not dry_run:
            self._log(records, trainer.step)

    def on_log_images(self, trainer: Core, records: dict[str, Any], dry_run: bool) -> None:
        images = dict(flat(records))
        if self._open and images and not dry_run:
            self.write_images(images, trainer.step)
            self._newest(trainer.step).images += len(images)

    def on_after_train(self, trainer: Core) -> None:
        self.status = "finished"

    def on_exception(self, trainer: Core, exception: BaseException) -> None:
        self.status = "failed"

    def on_close(self, trainer: Core) -> None:
        if self._open:
            self._open = False
            self.end()

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        kept = {"window": self._window.state_dict(trainer), "written": asdict(self.written)}
        state_dict[self._key(trainer)] = kept | self.remember()

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        kept = state_dict.get(self._key(trainer))
        self._window.load_state_dict([] if kept is None else kept["window"])
        if kept is not None:
            self.written = Written(**deepcopy(kept["written"]))
            self.recall(kept)

    def _key(self, trainer: Core) -> str:
        """Where a checkpoint holds what is this tracker's: by its place among those of its class."""
        alike = [hook for hook in trainer.hooks if type(hook) is type(self)]
        return f"{type(self).__name__}[{next(i for i, hook in enumerate(alike) if hook is self)}]"

    def _log(self, records: Mapping[str, Any], step: int) -> None:
        if self._open and records:
            row = {name: as_number(value, name) for name, value in flat(records)}
            self.write(row, step)
            self._newest(step).rows.append(row)

    def _newest(self, step: int) -> Written:
        if self.written.step != step:
            self.written = Written(step)
        return self.written


def _floats(metrics: Mapping[str, Any], only: str = "") -> dict[str, float]:
    return {k: v for k, v in metrics.items() if isinstance(v, float) and k.startswith(only)}
