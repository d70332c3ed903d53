"""Plugins, one a file. `Plugin` is the base class; `BaseHook` is its other documented name."""

from orbit.core.events import BaseHook, Plugin
from orbit.plugin.checkpoint import Checkpoint
from orbit.plugin.checkpointing import CheckpointingHook
from orbit.plugin.classification_report import ClassificationReport
from orbit.plugin.cuda_max_memory import CudaMaxMemoryHook
from orbit.plugin.early_stopping import EarlyStopping
from orbit.plugin.ema import EMA, EmaHook
from orbit.plugin.gradient_accumulation import GradientAccumulation
from orbit.plugin.image_files import ImageFileLoggerHook
from orbit.plugin.logs import LoggingHook
from orbit.plugin.lora import LoRA
from orbit.plugin.memory_estimator import MemoryEstimator
from orbit.plugin.mentor import Mentor
from orbit.plugin.model_summary import ModelSummary
from orbit.plugin.monitor import MetricError
from orbit.plugin.overfit import Overfit
from orbit.plugin.progress import ProgressHook
from orbit.plugin.tracker import MetricsFile, Tracker
from orbit.plugin.warmup import Warmup

__all__ = [
    "EMA",
    "BaseHook",
    "Checkpoint",
    "CheckpointingHook",
    "ClassificationReport",
    "CudaMaxMemoryHook",
    "EarlyStopping",
    "EmaHook",
    "GradientAccumulation",
    "ImageFileLoggerHook",
    "LoRA",
    "LoggingHook",
    "MemoryEstimator",
    "Mentor",
    "MetricError",
    "MetricsFile",
    "ModelSummary",
    "Overfit",
    "Plugin",
    "ProgressHook",
    "Tracker",
    "Warmup",
]
