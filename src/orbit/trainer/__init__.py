"""Front door 2: subclass `BaseTrainer`; hooks under their documented names."""

from orbit.core.events import BaseHook
from orbit.core.nested import key_average, map_nested_tensor
from orbit.plugin.checkpointing import CheckpointingHook
from orbit.plugin.cuda_max_memory import CudaMaxMemoryHook
from orbit.plugin.ema import EmaHook
from orbit.plugin.image_files import ImageFileLoggerHook
from orbit.plugin.logs import LoggingHook
from orbit.plugin.progress import ProgressHook
from orbit.plugin.trackers.wandb import WandbHook
from orbit.trainer.base import BaseTrainer

__all__ = [
    "BaseHook",
    "BaseTrainer",
    "CheckpointingHook",
    "CudaMaxMemoryHook",
    "EmaHook",
    "ImageFileLoggerHook",
    "LoggingHook",
    "ProgressHook",
    "WandbHook",
    "key_average",
    "map_nested_tensor",
]
