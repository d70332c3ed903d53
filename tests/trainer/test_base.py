"""BaseTrainer's surface (document 003)."""

from __future__ import annotations

import logging
import re
from collections import defaultdict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orbit.core import Outcome
from orbit.trainer import BaseHook, BaseTrainer, LoggingHook, ProgressHook, key_average, map_nested_tensor
from tests import tiny


def test_parts_are_built_in_order_once() -> None:
    order: list[str] = []

    class Ordered(tiny.Trainer):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("build_"):
                order.append(name)
            return super().__getattribute__(name)

    trainer = Ordered(max_steps=2)
    assert order == []
    trainer.train()
    trainer._build()
    assert order == [
        "build_data_loader",
        "build_val_loader",
        "build_model",
        "build_optimizer",
        "build_lr_scheduler",
        "build_grad_scaler",
        "build_hooks",
    ]
    assert not trainer.grad_scaler.is_enabled()


def test_run_step_can_be_overridden_and_sees_the_steps_figures() -> None:
    seen: list[Any] = []

    class Hook(BaseHook):
        def on_after_step(self, trainer: Any) -> None:
            seen.append(trainer.step_info["extra"])

    class Overridden(tiny.Trainer):
        def _run_step(self) -> None:
            super()._run_step()
            self.step_info["extra"] = (
                self.step,
                len(self.step_info["records"]),
                self.step_info["loss"].item() > 0,
            )

    Overridden(max_steps=3, plugins=[Hook()], gradient_accumulation_steps=2).train()
    assert seen == [(1, 2, True), (2, 2, True), (3, 2, True)]


@pytest.mark.parametrize("calls_super", [True, False])
def test_an_overridden_log_still_reaches_every_hook_once(calls_super: bool) -> None:
    heard: list[Any] = []
    logged: list[Any] = []

    class Listener(BaseHook):
        def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
            heard.append((trainer.step, sorted(records), dry_run))

        def on_log_images(self, trainer: Any, records: Any, dry_run: bool) -> None:
            heard.append(records)

    class Logs(tiny.Trainer):
        def log(self, records: dict[str, Any], dry_run: bool = False) -> None:
            logged.append(records)
            if calls_super:
                super().log(records, dry_run)

    class LogsTwice(Logs):
        def log(self, records: dict[str, Any], dry_run: bool = False) -> None:
            super().log(records, dry_run)

    trainer = LogsTwice(max_steps=4, plugins=[Listener(), LoggingHook(2)])
    trainer.train()
    keys = ["accuracy", "data_time", "grad_norm", "loss", "lr_0", "step_time"]
    assert heard == [(2, keys, False), (4, keys, False)]
    assert len(logged) == 2
    trainer.log_images({"a": 1})
    assert heard[-1] == {"a": 1}


def test_logged_means_are_those_of_the_interval() -> None:
    logged: list[dict[str, Any]] = []

    class Constant(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            loss, _ = super().forward(input)
            return loss, {"step": float(self.step), "nested": {"twice": 2.0 * self.step}}

        def log(self, records: dict[str, Any], dry_run: bool = False) -> None:
            logged.append(records)

    Constant(max_steps=6, plugins=[LoggingHook(3)]).train()
    assert [(r["step"], r["nested"]["twice"]) for r in logged] == [(1.0, 2.0), (4.0, 8.0)]


def test_forward_may_return_an_outcome_with_a_weight() -> None:
    class Weighted(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            loss, records = super().forward(input)
            return Outcome(loss, len(input[0]), records)

    trainer = Weighted(max_steps=2, gradient_accumulation_steps=3)
    trainer.train()
    assert trainer.step == 2


def test_what_forward_must_return_is_said() -> None:
    class Bare(tiny.Trainer):
        def forward(self, input: Any) -> Any:
            return super().forward(input)[0]

    with pytest.raises(TypeError, match=r"Bare.forward returned Tensor: return \(loss, records\)"):
        Bare().train()


def test_missing_methods_are_named() -> None:
    with pytest.raises(NotImplementedError, match=r"BaseTrainer must implement build_data_loader\(\)"):
        BaseTrainer(max_steps=1, device="cpu").train()

    class NoModel(tiny.Trainer):
        def build_model(self) -> Any:
            return None

    with pytest.raises(TypeError, match=r"build_model\(\) returned NoneType"):
        NoModel().train()


@pytest.mark.parametrize("max_steps", [-1, 1.5, None])
def test_max_steps_is_checked(max_steps: Any) -> None:
    with pytest.raises(ValueError, match="max_steps="):
        tiny.Trainer(max_steps=max_steps)


def test_workspace_logger_and_state_dict_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger("mine")
    trainer = tiny.Trainer(
        max_steps=3, workspace="runs/a", logger=logger, state_dict_options=StateDictOptions()
    )
    assert trainer.workspace == tmp_path / "runs/a"
    assert trainer.logger is logger
    trainer.train()
    state = trainer.state_dict()
    assert "0.weight" in state["optimizer"]["state"], "torch.distributed's format names parameters"
    again = tiny.Trainer(max_steps=5, state_dict_options=StateDictOptions())
    again.load_state_dict(state)
    again.build()
    assert tiny.same(again.model, trainer.model)
    again.train()
    assert again.step == 5


def test_unwrap_sees_through_compile_and_averaging() -> None:
    trainer = tiny.Trainer()
    model = tiny.model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert trainer.unwrap(averaged) is averaged.module
    assert trainer.unwrap(torch.compile(model, backend="eager")) is model
    trainer.build()
    assert trainer.unwrapped_model is trainer.model


def test_no_sync_accumulate_enters_no_sync_in_all_but_the_closing_micro_batch() -> None:
    entered: list[int] = []

    class Synced(nn.Sequential):
        def no_sync(self) -> Any:
            from contextlib import nullcontext

            entered.append(1)
            return nullcontext()

    class WithNoSync(tiny.Trainer):
        def build_model(self) -> nn.Module:
            return Synced(*tiny.model())

    WithNoSync(max_steps=4, gradient_accumulation_steps=3).train()
    assert len(entered) == 8
    WithNoSync(max_steps=4, gradient_accumulation_steps=3, no_sync_accumulate=False).train()
    assert len(entered) == 8


def test_every_step_of_an_uneven_epoch_is_a_full_window() -> None:
    """Seven micro-batches an epoch, windows of three: they run across the epoch's end."""
    trainer = tiny.Trainer(max_steps=7, gradient_accumulation_steps=3)
    trainer.train()
    assert trainer.state.micro_step == 21
    assert trainer.epoch == 2


Point = namedtuple("Point", "x y")


def test_map_nested_tensor_keeps_containers() -> None:
    value = defaultdict(list, a=[torch.ones(1)], b=Point(torch.ones(2), "text"))
    result = map_nested_tensor(lambda t: t + 1, value)
    assert type(result) is defaultdict
    assert result["new"] == []
    assert type(result["b"]) is Point
    assert result["b"].x.tolist() == [2.0, 2.0]
    assert result["b"].y == "text"
    assert value["a"][0].item() == 1.0


def test_key_average_of_the_document() -> None:
    records = [{"loss": 0.5, "metrics": {"acc": 0.9}}, {"loss": 0.6, "metrics": {"acc": 0.85}}]
    average = key_average(records)
    assert average == {"loss": pytest.approx(0.55), "metrics": {"acc": pytest.approx(0.875)}}
    with pytest.raises(TypeError, match="record 'metrics.acc' is no number: 'high'"):
        key_average([{"metrics": {"acc": "high"}}])
    with pytest.raises(ValueError, match="record 'a' is a number in one place and a dict in another"):
        key_average([{"a": 1}, {"a": {"b": 1}}])


def test_progress_prints_the_documents_line(capsys: pytest.CaptureFixture[str]) -> None:
    tiny.Trainer(max_steps=100, plugins=[ProgressHook(interval=50, with_records=True, eta_warmup=10)]).train()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    pattern = (
        r"Step  50/100: step \d+\.\d{4}s data \d+\.\d{4}s eta 0:00:0\d loss \d\.\d{4} "
        r"grad_norm \d+\.\d{4} accuracy 0\.\d{4} lr_0 \d\.\d\de-\d\d"
    )
    assert re.fullmatch(pattern, lines[0]), lines[0]


def test_a_log_from_a_mixin_and_one_that_logs_images_reach_every_hook() -> None:
    heard: list[str] = []

    class Listener(BaseHook):
        def on_log(self, trainer: Any, records: Any, dry_run: bool) -> None:
            heard.append("log")

        def on_log_images(self, trainer: Any, records: Any, dry_run: bool) -> None:
            heard.append("images")

    class Prints:
        def log(self, records: dict[str, Any], *, dry_run: bool = False) -> None:
            self.log_images({})  # type: ignore[attr-defined]

    class Logs(Prints, tiny.Trainer):  # type: ignore[misc]
        pass

    Logs(max_steps=2, plugins=[Listener(), LoggingHook(2)]).train()
    assert heard == ["images", "log"]


def test_a_build_that_failed_can_be_tried_again() -> None:
    class FailsOnce(BaseHook):
        failed = False

        def on_build_model(self, trainer: Any) -> None:
            if not self.failed:
                self.failed = True
                raise OSError("not yet")

    hook, given = FailsOnce(), BaseHook()
    trainer = tiny.Trainer(max_steps=1, plugins=[hook])
    trainer.attach(given)
    with pytest.raises(OSError, match="not yet"):
        trainer.train()
    trainer.train()
    assert trainer.step == 1
    assert trainer.hooks == [hook, given]
