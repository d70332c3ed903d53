"""Python's garbage collector, at steps of our choosing.

Left alone, the collector runs when enough objects have been made: on every rank at another moment, and each time all
other ranks wait for that one in the next exchange of gradients. Here it is off between steps, and runs on all ranks
after the same ones. Source: torchtitan's `GarbageCollection`.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from orbit.core.events import Plugin
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class GarbageCollection(Plugin):
    """Collect garbage after every `interval` optimizer steps and at no other time; when the run is left, as before.

    The regular collections leave the oldest generation out, since walking over everything that a run has loaded
    takes long; it has its turn when training begins and at every epoch's end.

    Args:
        interval: steps, >= 1.
    """

    priority = Plugin.METER

    def __init__(self, interval: int = 50) -> None:
        self.interval = check_interval("GarbageCollection", interval)
        self._was_enabled: bool | None = None  # None outside of a run

    def on_before_train(self, trainer: Core) -> None:
        self._was_enabled = gc.isenabled()
        gc.disable()
        gc.collect()

    def on_after_step(self, trainer: Core) -> None:
        if trainer.step % self.interval == 0:
            gc.collect(1)

    def on_after_epoch(self, trainer: Core) -> None:
        gc.collect()

    def on_close(self, trainer: Core) -> None:
        if self._was_enabled:
            gc.enable()
        self._was_enabled = None
