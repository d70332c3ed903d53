"""The most GPU memory that a step had allocated."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from orbit.core.events import Plugin

if TYPE_CHECKING:
    from orbit.core.loop import Core


class CudaMaxMemoryHook(Plugin):
    """Put `max_memory` (GiB, by torch's allocator on the trainer's device) into `trainer.step_info`, for the hooks that
    log. Elsewhere than on a CUDA device there is no such figure, and nothing is put there.
    """

    priority = Plugin.METER

    def on_before_step(self, trainer: Core) -> None:
        if trainer.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.device)

    def on_after_optimizer_step(self, trainer: Core) -> None:
        if trainer.device.type == "cuda":
            trainer.step_info["max_memory"] = torch.cuda.max_memory_allocated(trainer.device) / 2**30
