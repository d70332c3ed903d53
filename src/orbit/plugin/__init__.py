"""Plugins, one a file. `Plugin` is the base class; `BaseHook` is its other documented name."""

from orbit.core.events import BaseHook, Plugin
from orbit.plugin.board import Board
from orbit.plugin.checkpointing import CheckpointingHook
from orbit.plugin.cuda_max_memory import CudaMaxMemoryHook
from orbit.plugin.early_stopping import EarlyStopping
from orbit.plugin.ema import EMA, EmaHook
from orbit.plugin.gradient_accumulation import GradientAccumulation
from orbit.plugin.image_files import ImageFileLoggerHook
from orbit.plugin.logs import LoggingHook
from orbit.plugin.lora import LoRA
from orbit.plugin.mentor import Mentor
from orbit.plugin.metrics_file import MetricsFile
from orbit.plugin.mlflow import MLflowHook
from orbit.plugin.progress import ProgressHook
from orbit.plugin.tracker import Tracker
from orbit.plugin.trackio import TrackioHook
from orbit.plugin.wandb import WandbHook
from orbit.plugin.warmup import Warmup

__all__ = [
    "EMA",
    "BaseHook",
    "Board",
    "CheckpointingHook",
    "CudaMaxMemoryHook",
    "EarlyStopping",
    "EmaHook",
    "GradientAccumulation",
    "ImageFileLoggerHook",
    "LoRA",
    "LoggingHook",
    "MLflowHook",
    "Mentor",
    "MetricsFile",
    "Plugin",
    "ProgressHook",
    "Tracker",
    "TrackioHook",
    "WandbHook",
    "Warmup",
]
