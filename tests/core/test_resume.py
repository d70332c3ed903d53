"""Kill the run, and it goes on to the very same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orbit.core import CheckpointError
from orbit.engine import Engine
from orbit.plugin import CheckpointingHook, EarlyStopping, Mentor, Plugin
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    """Imports PyTorch once and forks a process a run (`tests/core/resume_worker.py`)."""
    command = [sys.executable, "-W", "error", "-m", "tests.core.resume_worker"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.communicate()


def start(
    worker: subprocess.Popen[str], face: str, workers: int, folder: Path, at: int = 0, number: int = 0
) -> int:
    """One run to its end in a new process; its exit code, negative for the signal that ended it."""
    folder.mkdir(exist_ok=True)
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(face, workers, folder, at, int(number), file=worker.stdin, flush=True)
    return int(worker.stdout.readline().removeprefix("exit code "))


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "final.pt", weights_only=True)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("face", ["engine", "trainer"])
def test_killed_and_resumed_is_uninterrupted(worker: Any, face: str, workers: int, tmp_path: Path) -> None:
    """SIGTERM leaves with 143 at a random micro-batch, kill -9 at another; both end where the whole run ends."""
    assert start(worker, face, workers, tmp_path / "whole") == 0
    whole = final(tmp_path / "whole")
    chance = random.Random(f"{face}{workers}")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        folder = tmp_path / number.name
        at = chance.randint(8, 45)
        assert start(worker, face, workers, folder, at, number) == code, f"killed at {at}"
        assert not (folder / "final.pt").exists()
        assert start(worker, face, workers, folder) == 0
        resumed = final(folder)
        assert all(torch.equal(resumed[key], whole[key]) for key in whole), f"killed at micro-batch {at}"


def run(
    epochs: int, *, stop_after: int | None = None, state: dict[str, Any] | None = None
) -> tuple[Engine, dict[str, Any] | None]:
    torch.manual_seed(42 if state is None else 123)
    model = tiny.model()
    optimizer = tiny.optimizer(model)
    plugins = [EarlyStopping("val_loss", patience=50), Mentor(verbose=False)]
    engine = Engine(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        tiny.scheduler(optimizer),
        plugins,
        device="cpu",
        gradient_accumulation_steps=2,
    )
    if state is not None:
        engine.load_state_dict(state)
    for _ in engine.train(tiny.loader(), num_epochs=epochs):
        engine.auto_update()
        if engine.is_epoch_end:
            for _ in engine.eval(tiny.loader(20)):
                engine.auto_update()
        if engine.global_step == stop_after and not engine.window_open:
            return engine, engine.state_dict()
    return engine, None


@pytest.mark.parametrize("step", [1, 2, 4, 5, 8, 11])
def test_state_dict_at_any_step_goes_on_to_the_same_bits(step: int) -> None:
    """Saved inside the body: at 4, 8 and 12 that is the epoch's last batch."""
    whole, _ = run(3)
    _, state = run(3, stop_after=step)
    resumed, _ = run(3, state=state)
    assert tiny.same(resumed.model, whole.model)
    assert resumed.metrics == whole.metrics
    assert resumed.global_step == whole.global_step
    assert [p._train for p in resumed.plugins if isinstance(p, Mentor)] == [
        p._train for p in whole.plugins if isinstance(p, Mentor)
    ]


def test_a_state_dict_is_plain_and_shares_nothing_with_the_run_that_loads_it(tmp_path: Path) -> None:
    _, state = run(3, stop_after=5)
    assert state is not None
    torch.save(state, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")  # weights_only=True by default
    before = loaded["optimizer"]["state"][0]["exp_avg"].clone()
    run(3, state=loaded)
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], before)


def test_base_trainer_takes_a_state_before_and_after_the_build() -> None:
    whole = tiny.Trainer(max_steps=12)
    whole.train()
    torch.manual_seed(42)
    first = tiny.Trainer(max_steps=6)
    torch.manual_seed(42)
    first.train()
    state = first.state_dict()
    torch.manual_seed(42)
    for build_first in (False, True):
        trainer = tiny.Trainer(max_steps=12)
        if build_first:
            trainer._build()
        trainer.load_state_dict(state)
        trainer.train()
        assert trainer.step == 12
        assert not tiny.same(trainer.model, first.model)
    again = tiny.Trainer(max_steps=12)
    again.load_state_dict(state)
    again.train()
    assert tiny.same(again.model, trainer.model)


def test_a_state_taken_before_an_epoch_goes_on_with_the_whole_epoch() -> None:
    class SaveBefore(Plugin):
        state: dict[str, Any] | None = None

        def on_before_epoch(self, trainer: Any) -> None:
            if trainer.epoch == 1:
                self.state = deepcopy(trainer.state_dict())

    def go(state: dict[str, Any] | None = None) -> tuple[Engine, SaveBefore]:
        model, save = tiny.model(), SaveBefore()
        engine = Engine(model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[save], device="cpu")
        if state is not None:
            engine.load_state_dict(state)
        for _ in engine.train(tiny.loader(), num_epochs=2):
            engine.auto_update()
        return engine, save

    whole, save = go()
    resumed, _ = go(save.state)
    assert resumed.global_step == whole.global_step == 14
    assert tiny.same(resumed.model, whole.model)


@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_batch_in_hand_that_was_not_used_is_not_lost(accumulation: int, at: int) -> None:
    """Saved at the top of the body; and after leaving the loop there."""

    def go(state: dict[str, Any] | None = None, leave: bool = False) -> tuple[Engine, Any]:
        model, saved = tiny.model(), None
        torch.manual_seed(42)
        engine = Engine(
            model, tiny.optimizer(model), nn.CrossEntropyLoss(), plugins=[], device="cpu",
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        if state is not None:
            engine.load_state_dict(state)
        for _ in engine.train(tiny.loader()):
            if engine.global_step == at and saved is None:
                saved = deepcopy(engine.state_dict())
                if leave:
                    break
            engine.auto_update()
        return engine, deepcopy(engine.state_dict()) if leave else saved

    whole, saved = go()
    for state in (saved, go(leave=True)[1]):
        resumed, _ = go(state)
        assert resumed.global_step == whole.global_step
        assert tiny.same(resumed.model, whole.model)


def test_parameters_that_only_the_optimizer_knows_are_saved_too() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, output: Any, target: Any) -> Any:
            return nn.functional.cross_entropy(output * self.scale, target)

    def go(state: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
        both, saved = nn.ModuleList([tiny.model(), Scaled()]), {}
        torch.manual_seed(42)
        engine = Engine(both[0], tiny.optimizer(both), both[1], plugins=[], device="cpu")
        if state is not None:
            engine.load_state_dict(state)
        for _ in engine.train(tiny.loader(), num_epochs=2):
            engine.auto_update()
            if engine.global_step == 5:
                saved = deepcopy(engine.state_dict())
        return both, saved

    whole, saved = go()
    assert tiny.same(go(saved)[0], whole)


def test_saving_inside_a_window_is_refused() -> None:
    engine = Engine(
        tiny.model(), None, nn.CrossEntropyLoss(), plugins=[], device="cpu", gradient_accumulation_steps=3
    )
    engine.optimizer = tiny.optimizer(engine.model)
    for _ in engine.train(tiny.loader()):
        engine.auto_update()
        with pytest.raises(RuntimeError, match="1 of 3 micro-batches"):
            engine.state_dict()
        break


def test_checkpoint_dir_resumes_by_itself_and_finished_runs_stay_finished(tmp_path: Path) -> None:
    def go(epochs: int) -> tuple[Engine, int]:
        model = tiny.model()
        engine = Engine(
            model,
            tiny.optimizer(model),
            nn.CrossEntropyLoss(),
            plugins=[],
            device="cpu",
            checkpoint_dir=tmp_path,
        )
        bodies = 0
        for _ in engine.train(tiny.loader(), num_epochs=epochs):
            engine.auto_update()
            bodies += 1
        return engine, bodies

    first, bodies = go(2)
    assert bodies == 14
    again, bodies = go(2)
    assert bodies == 0
    assert tiny.same(first.model, again.model)
    assert go(3)[1] == 7


def test_checkpoints_of_another_model_change_nothing(tmp_path: Path) -> None:
    engine = Engine(tiny.model(), plugins=[], device="cpu")
    engine.save(tmp_path / "a.pt")
    other = Engine(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 3)), plugins=[], device="cpu")
    before = {key: value.clone() for key, value in other.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"of another model: unexpected 1.running_mean; .* and 2 more"):
        other.load(tmp_path / "a.pt")
    assert all(torch.equal(value, before[key]) for key, value in other.model.state_dict().items())
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        other.load(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="no training state of orbit: it lacks format"):
        other.load_state_dict({"model": {}})


def test_hooks_keep_their_own_files(tmp_path: Path) -> None:
    """keep_previous, keep_interval, latest, and a path relative to the workspace."""
    hook = CheckpointingHook(interval=2, keep_previous=1, keep_interval=6, path="saved")
    tiny.Trainer(max_steps=13, plugins=[hook], workspace=tmp_path).train()
    folder = tmp_path / "saved"
    assert sorted(path.name for path in folder.glob("*.pt")) == [
        "checkpoint_latest.pt", "checkpoint_step_12.pt", "checkpoint_step_13.pt", "checkpoint_step_6.pt",
    ]  # fmt: skip
    assert (folder / "checkpoint_latest.pt").resolve().name == "checkpoint_step_13.pt"


def test_a_resume_that_failed_does_not_begin_anew_at_the_next_call(tmp_path: Path) -> None:
    hook = CheckpointingHook(interval=2, path=tmp_path)
    tiny.Trainer(max_steps=2, plugins=[hook]).train()
    (tmp_path / "checkpoint_step_2.pt").write_bytes(b"broken")
    trainer = tiny.Trainer(max_steps=4, plugins=[CheckpointingHook(interval=2, path=tmp_path)])
    for _ in range(2):
        with pytest.raises(CheckpointError, match="none is valid"):
            trainer.train()
    other = Engine(tiny.model(), plugins=[], device="cpu").state_dict()
    trainer = tiny.Trainer(max_steps=4)
    trainer.load_state_dict(other)
    for _ in range(2):
        with pytest.raises(ValueError, match="has no optimizer"):
            trainer.train()


def test_metrics_of_any_number_type_are_saved(tmp_path: Path) -> None:
    engine = Engine(tiny.model(), plugins=[], device="cpu")
    engine.metrics["f1"] = np.float64(0.5)
    other = Engine(tiny.model(), plugins=[], device="cpu").load(engine.save(tmp_path / "a.pt"))
    assert other.metrics == {"f1": 0.5}
