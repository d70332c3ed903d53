"""What the tests of Checkpoint, Overfit, MemoryEstimator, ModelSummary and ClassificationReport run on every rank."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from orbit.core import runtime
from orbit.plugin import Checkpoint, ClassificationReport, MemoryEstimator, Mentor, ModelSummary, Overfit
from tests.core import parallel_cases
from tests.plugin.test_classification_report import Echo, batches


def best(folder: str, parallel: str) -> tuple[Any, ...]:
    """Ranks measure other values: rank 1 disagrees with rank 0 in the second epoch."""
    kept = Checkpoint("score", "min", save_top_k=2, save_last=True, path=folder)
    norms = Checkpoint("grad_norm", every_n_train_steps=2, path=Path(folder) / "norms")
    engine = parallel_cases.engine(parallel, [kept, norms])
    for _ in engine.train(torch.utils.data.DataLoader(parallel_cases.data(), 12, shuffle=True), num_epochs=4):
        engine.auto_update()
        if engine.is_epoch_end:
            engine.metrics["score"] = float(
                (engine.epoch - 1) ** 2 + 10 * runtime.rank() * (engine.epoch == 1)
            )
    assert kept.best_path is not None
    assert kept.last_path is not None
    return kept.kept, kept.best_path.name, kept.last_path.name, list(norms.kept)


def confusion() -> Any:
    out = io.StringIO()
    report = ClassificationReport(4, image=False, console=Console(file=out))
    engine = parallel_cases.engine("ddp", [report], model=Echo())
    for _ in engine.eval(batches(size=5)[runtime.rank() :: runtime.world_size()]):
        engine.auto_update()
    assert report.confusion is not None
    return report.confusion.tolist(), engine.metrics["val_f1_macro"], len(out.getvalue()) > 0


def advised(parallel: str) -> Any:
    """Which batches each rank trained on, what was printed, and this rank's memory."""
    out = io.StringIO()
    console = Console(file=out, width=200)
    memory, summary = MemoryEstimator(console=console), ModelSummary(console=console)
    overfit = Overfit(until=0.02, console=console)
    engine = parallel_cases.engine(parallel, [memory, summary, overfit, Mentor(console=console)])
    seen = []
    loader = torch.utils.data.DataLoader(parallel_cases.data(), 12, shuffle=True)
    for _ in engine.train(loader, num_epochs=100):
        seen.append(engine.data.clone())
        engine.auto_update()
    assert memory.memory is not None
    assert summary.summary is not None
    same = all(torch.equal(x, seen[0]) for x in seen)
    return {
        "same": same,
        "step": engine.step,
        "loss": overfit.loss,
        "succeeded": overfit.succeeded,
        "printed": out.getvalue(),
        "parameters": memory.memory.parameters,
        "optimizer": memory.memory.optimizer,
        "suggested": memory.suggest_batch(10**6),
        "total": summary.summary.total.parameters,
    }
