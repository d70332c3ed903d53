"""fast_dev_run, sanity evaluation and BaseTrainer's evaluation: what runs, and what is left as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orbit.engine import Engine
from orbit.plugin import Checkpoint, CheckpointingHook, LoRA, MetricsFile, Plugin, Profiler
from tests import tiny


class Seen(Plugin):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.logged: list[bool] = []

    def on_before_eval(self, trainer: Any) -> None:
        self.events.append("before_eval")

    def on_after_eval_batch(self, trainer: Any) -> None:
        self.events.append("batch")

    def on_after_eval(self, trainer: Any) -> None:
        self.events.append(f"after_eval {trainer.step}")

    def on_leave_eval(self, trainer: Any) -> None:
        self.events.append("leave_eval")

    def on_after_step(self, trainer: Any) -> None:
        self.events.append("step")
        trainer.log({"x": 1.0})

    def on_after_epoch(self, trainer: Any) -> None:
        self.events.append("epoch")

    def on_log(self, trainer: Any, records: dict[str, Any], dry_run: bool) -> None:
        self.logged.append(dry_run)


def engine(plugins: list[Plugin], **options: Any) -> Engine:
    model = tiny.model()
    options = {"device": "cpu", "plugins": plugins} | options
    return Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), **options)


class Evaluating(tiny.Trainer):
    def build_val_loader(self) -> Any:
        return tiny.loader(20)


# ── fast_dev_run ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("given", "steps"), [(True, 1), (2, 2)])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_so_many_steps_and_as_many_batches_of_evaluation(given: Any, steps: int, accumulation: int) -> None:
    seen = Seen()
    trainer = engine([seen], fast_dev_run=given, gradient_accumulation_steps=accumulation)
    trainer.run(tiny.loader(), tiny.loader(20), num_epochs=5)
    evaluation = ["before_eval", *["batch"] * steps, f"after_eval {steps}", "leave_eval"]
    assert seen.events == [*["step"] * (steps - 1), *evaluation, "step", "epoch"]
    assert trainer.state.micro_step == steps * accumulation
    assert {"train_loss", "val_loss", "val_acc"} <= set(trainer.metrics)
    assert seen.logged == [True] * steps


def test_under_base_trainer(caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen()
    trainer = Evaluating(50, [seen], fast_dev_run=2, eval_interval=40, gradient_accumulation_steps=2)
    with caplog.at_level("INFO"):
        trainer.train()
    assert seen.events == [
        "step",
        "before_eval",
        "batch",
        "batch",
        "after_eval 2",
        "leave_eval",
        "step",
        "epoch",
    ]
    assert trainer.step == 2
    assert "fast_dev_run: 2 steps" in caplog.text
    short = tiny.Trainer(1, fast_dev_run=9)
    short.train()
    assert short.step == 1, "no more than the run itself would do"


@pytest.mark.parametrize("face", ["engine", "trainer"])
def test_nothing_is_written_and_nothing_resumed(face: str, tmp_path: Path) -> None:
    def plugins() -> list[Plugin]:
        return [
            MetricsFile(tmp_path / "metrics.jsonl", 1),
            Checkpoint("loss", path=tmp_path / "best"),
            Profiler(tmp_path / "profile", wait=0, warmup=1, active=1),
            LoRA(target_names=["4"], r=2, path=tmp_path / "adapter"),
            CheckpointingHook(1, path=tmp_path / "checkpoints", every_epoch=True),
        ]

    def train(**options: Any) -> Any:
        if face == "trainer":
            trainer: Any = tiny.Trainer(3, plugins(), **options)
            trainer.train()
        else:
            trainer = engine(plugins(), **options)
            trainer.run(tiny.loader())
        return trainer

    train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len(before) > 8
    trainer = train(fast_dev_run=2)
    assert trainer.step == 2, "begun anew"
    assert [type(hook).__name__ for hook in trainer.hooks] == ["LoRA"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    late = CheckpointingHook(1, path=tmp_path / "late")
    trainer.attach(late)
    assert late not in trainer.hooks


def test_the_short_for_a_checkpointing_hook(tmp_path: Path) -> None:
    engine([], fast_dev_run=True, checkpoint_dir=tmp_path / "run").run(tiny.loader())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [-1, 1.5, "yes"])
def test_a_number_outside_its_range(given: Any) -> None:
    with pytest.raises(ValueError, match="fast_dev_run="):
        engine([], fast_dev_run=given)


# ── sanity evaluation ─────────────────────────────────────────────────────────────────────────────────────────────


def test_sanity_evaluation_leaves_no_trace_but_its_errors() -> None:
    plain, seen = engine([]), Seen()
    checked = engine([seen])
    train = tiny.loader()
    for trainer, batches in ((plain, 0), (checked, 2)):
        torch.manual_seed(3)
        trainer.run(train, tiny.loader(20), num_epochs=2, sanity_eval=batches)
    assert tiny.same(plain.model, checked.model)
    assert plain.metrics == checked.metrics
    assert seen.events[:3] == ["before_eval", "batch", "leave_eval"]
    assert seen.events[3] == "step"

    class Broken(nn.Module):
        def forward(self, output: Any, target: Any) -> Any:
            if not torch.is_grad_enabled():
                raise ZeroDivisionError
            return nn.functional.cross_entropy(output, target)

    broken = engine([])
    broken.criterion = Broken()
    with pytest.raises(ZeroDivisionError):
        broken.run(train, tiny.loader(20), sanity_eval=1)
    assert broken.global_step == 0
    with pytest.raises(ValueError, match="sanity_eval=1 and no val"):
        broken.run(train, sanity_eval=1)


def test_more_sanity_than_data_reports_nothing_either() -> None:
    seen = Seen()
    engine([seen]).run(tiny.loader(8), tiny.loader(16), sanity_eval=100)
    assert seen.events[:4] == ["before_eval", "batch", "leave_eval", "before_eval"]
    assert seen.events.count("after_eval 1") == 1


def test_sanity_evaluation_of_base_trainer() -> None:
    plain, checked = Evaluating(5), Evaluating(5, sanity_eval=2)
    for trainer in (plain, checked):
        torch.manual_seed(3)
        trainer.train()
    assert tiny.same(plain.model, checked.model)
    assert "val_loss" not in checked.metrics


# ── BaseTrainer's evaluation ──────────────────────────────────────────────────────────────────────────────────────


def test_evaluate_every_so_many_steps_and_at_the_end() -> None:
    seen = Seen()
    plain, trainer = Evaluating(7), Evaluating(7, [seen], eval_interval=3)
    for run in (plain, trainer):
        torch.manual_seed(3)
        run.train()
    assert tiny.same(plain.model, trainer.model)
    assert [event for event in seen.events if event.startswith("after_eval")] == [
        "after_eval 3", "after_eval 6", "after_eval 7"
    ]  # fmt: skip
    measured = trainer.evaluate()
    x, y = (torch.stack(column) for column in zip(*tiny.dataset(20), strict=True))
    logits = trainer.model.eval()(x)
    expected = {
        "val_loss": nn.functional.cross_entropy(logits, y).item(),
        "val_accuracy": (logits.argmax(1) == y).float().mean().item(),
    }
    assert measured == pytest.approx(expected, rel=1e-6), "of all rows alike, also in the last, shorter batch"
    assert measured == {name: trainer.metrics[name] for name in measured}


def test_a_step_that_was_dropped_is_not_evaluated_twice() -> None:
    class Spiked(Evaluating):
        def forward(self, input: Any) -> Any:
            loss, records = super().forward(input)
            bad = self.phase == "train" and self.state.micro_step == 3
            return loss * (float("nan") if bad else 1.0), records

    seen = Seen()
    Spiked(4, [seen], eval_interval=2, max_non_finite_grad_retries=2).train()
    assert [event for event in seen.events if event.startswith("after_eval")] == [
        "after_eval 2",
        "after_eval 4",
    ]


def test_nested_records_and_resume(tmp_path: Path) -> None:
    class Nested(Evaluating):
        def forward(self, input: Any) -> Any:
            loss, records = super().forward(input)
            return loss, {"loss": 5.0, "more": records}

    trainer = Nested(2, eval_interval=1)
    trainer.train()
    assert set(trainer.metrics) >= {"val_loss", "val_more/accuracy"}
    assert trainer.metrics["val_loss"] != 5.0
    torch.save(trainer.state_dict(), tmp_path / "state.pt")
    again = Nested(2, eval_interval=1)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.train()
    assert again.metrics == trainer.metrics


@pytest.mark.parametrize("options", [{"eval_interval": 2}, {"sanity_eval": 2}])
def test_evaluation_without_data_is_an_error_before_training(options: dict[str, Any]) -> None:
    trainer = tiny.Trainer(2, **options)
    with pytest.raises(ValueError, match=r"Trainer\.build_val_loader\(\) gives no loader"):
        trainer.train()
    assert trainer.step == 0
    with pytest.raises(ValueError, match="nothing to evaluate"):
        tiny.Trainer(1).evaluate()
    with pytest.raises(ValueError, match="eval_interval=0"):
        tiny.Trainer(1, eval_interval=0)
