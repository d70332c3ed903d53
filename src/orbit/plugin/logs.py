"""Aggregate metrics over an interval and hand them to `trainer.log`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.meters import Averages

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Interval:
    """Means of what the steps of an interval came to: loss, gradient norm, learning rates, times and the records.

    Values stay on their device until `flush`, which costs one host sync.
    """

    def __init__(self, with_records: bool = True, sync: bool = False) -> None:
        self.with_records, self.sync = with_records, sync
        self._averages = Averages()

    def add(self, trainer: Core) -> None:
        info = trainer.step_info
        scalars = {
            key: value for key, value in info.items() if key not in ("records", "lr") and value is not None
        }
        self._averages.add(scalars)
        if self.with_records:
            for records in info["records"]:
                self._averages.add(records)

    def flush(self, trainer: Core) -> dict[str, Any]:
        """Nested floats; learning rates are the last step's, as `lr_0`, `lr_1`, ..."""
        records = self._averages.flush()
        if self.sync:
            records = runtime.mean_over_ranks(records)
        return records | {f"lr_{index}": lr for index, lr in enumerate(trainer.step_info["lr"])}


class LoggingHook(Plugin):
    """Call `trainer.log(records)` every `interval` steps with the means since the last call.

    Records are `loss`, `grad_norm`, `lr_0` ..., `step_time`, `data_time` (seconds) and what `forward` returned.

    Args:
        interval: steps, >= 1.
        sync: average over ranks. Every rank calls `log`; `dry_run` is True on all but rank 0.
    """

    priority = Plugin.MONITOR

    def __init__(self, interval: int = 10, sync: bool = True) -> None:
        self.interval = check_interval("LoggingHook", interval)
        self._window = Interval(sync=sync)

    def on_after_step(self, trainer: Core) -> None:
        self._window.add(trainer)
        if trainer.step % self.interval == 0:
            trainer.log(self._window.flush(trainer), dry_run=not runtime.is_main_process())


def check_interval(name: str, interval: int) -> int:
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"{name}(interval={interval!r}): it must be a whole number of steps >= 1")
    return interval
