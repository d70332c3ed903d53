"""Aggregate metrics over an interval and hand them to `trainer.log`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from orbit.core import runtime
from orbit.core.events import Plugin
from orbit.core.meters import Averages
from orbit.core.ranks import everyones

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Interval:
    """Means of what the steps of an interval came to: loss, gradient norm, learning rates, times and the records.

    Every step counts alike, and so does every micro-batch's record. With `sync` they are means over the ranks that
    train one model, all of which must call `flush`: a step's loss is then Σ wᵢ·lossᵢ / Σ wᵢ over the micro-batches of
    all ranks, as its gradient is, and a record is averaged over those that have it.

    Values stay on their device until `flush`, which costs one host sync.
    """

    def __init__(self, with_records: bool = True, sync: bool = False) -> None:
        self.with_records, self.sync = with_records, sync
        self._averages = Averages()

    def add(self, trainer: Core) -> None:
        """Take in the step that has just been done."""
        info = trainer.step_info
        if info["loss"] is not None:
            share = trainer.updater.share
            self._averages.add({"loss": info["loss"]}, share if self.sync else share > 0)
        self._averages.add(
            {k: v for k, v in info.items() if k not in ("loss", "records", "lr") and v is not None}
        )
        if self.with_records:
            for records in info["records"]:
                self._averages.add(records)

    def flush(self, trainer: Core) -> dict[str, Any]:
        """Nested floats; learning rates are the last step's, as `lr_0`, `lr_1`, ..."""
        if self.sync and trainer.team is not None:
            self._averages.over_ranks()
        records = self._averages.flush()
        return records | {f"lr_{index}": lr for index, lr in enumerate(trainer.step_info["lr"])}

    def state_dict(self, trainer: Core) -> list[Any]:
        """The open interval of every rank, plain. All ranks that train one model must call it."""
        own = self._averages.state_dict()
        return [own] if trainer.team is None else everyones(own)

    def load_state_dict(self, ranks: list[Any]) -> None:
        """Go on from a `state_dict()`; on another number of ranks, rank 0 has what all had. `[]` means from nothing."""
        self._averages = Averages()
        if len(ranks) == runtime.world_size():
            self._averages.load_state_dict(ranks[runtime.rank()])
        elif runtime.is_main_process():
            self._averages.take(ranks)


class LoggingHook(Plugin):
    """Call `trainer.log(records)` every `interval` steps with the means since the last call.

    Records are `loss`, `grad_norm`, `lr_0` ..., `step_time`, `data_time` (seconds) and what `forward` returned.

    Args:
        interval: steps, >= 1.
        sync: average over the ranks that train one model, all of which need the hook. Every rank calls `log`; `dry_run`
            is True on all but rank 0.
    """

    priority = Plugin.MONITOR

    def __init__(self, interval: int = 10, sync: bool = True) -> None:
        self.interval = check_interval("LoggingHook", interval)
        self._window = Interval(sync=sync)

    def on_after_step(self, trainer: Core) -> None:
        self._window.add(trainer)
        if trainer.step % self.interval == 0:
            trainer.log(self._window.flush(trainer), dry_run=not runtime.is_main_process())

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state_dict[self._key] = self._window.state_dict(trainer)

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        self._window.load_state_dict(state_dict.get(self._key, []))

    @property
    def _key(self) -> str:
        return f"LoggingHook({self.interval})"


def check_interval(name: str, interval: int, argument: str = "interval") -> int:
    if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
        raise ValueError(f"{name}({argument}={interval!r}): it must be a whole number of steps >= 1")
    return interval
