"""The table of plugins. A new plugin adds one row and inherits every law of test_plugin_laws.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from orbit.plugin import (
    EMA,
    Checkpoint,
    CheckpointingHook,
    ClassificationReport,
    CudaMaxMemoryHook,
    EarlyStopping,
    GradientAccumulation,
    ImageFileLoggerHook,
    LoggingHook,
    LoRA,
    MemoryEstimator,
    Mentor,
    MetricsFile,
    ModelSummary,
    Overfit,
    Plugin,
    ProgressHook,
    Warmup,
)

PLUGINS: dict[str, Callable[[Path], Plugin]] = {
    "Checkpoint": lambda folder: Checkpoint("loss", save_top_k=2, save_last=True, path=folder / "best"),
    "CheckpointingHook": lambda folder: CheckpointingHook(interval=2, path=folder / "own", load=None),
    "ClassificationReport": lambda folder: ClassificationReport(3),
    "CudaMaxMemoryHook": lambda folder: CudaMaxMemoryHook(),
    "EMA": lambda folder: EMA(0.9),
    "EarlyStopping": lambda folder: EarlyStopping("train_loss", patience=50),
    "GradientAccumulation": lambda folder: GradientAccumulation(2),
    "LoggingHook": lambda folder: LoggingHook(3),
    "ImageFileLoggerHook": lambda folder: ImageFileLoggerHook(path=folder / "images"),
    "LoRA": lambda folder: LoRA(target_names=["4"], r=2, alpha=4),
    "MemoryEstimator": lambda folder: MemoryEstimator(3),
    "Mentor": lambda folder: Mentor(),
    "MetricsFile": lambda folder: MetricsFile(folder / "metrics.jsonl", 3),
    "ModelSummary": lambda folder: ModelSummary(),
    "Overfit": lambda folder: Overfit(batches=2, until=1e-6),
    "ProgressHook": lambda folder: ProgressHook(3, with_records=True),
    "Warmup": lambda folder: Warmup(4, mode="cosine"),
}
