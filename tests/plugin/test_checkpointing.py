"""The hook's own part; that resumed runs are bitwise the same stands in tests/core/test_resume.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orbit.core import CheckpointError, load_checkpoint
from orbit.core.checkpoint import is_valid, list_checkpoints, step_of
from orbit.core.checkpoint.lock import WorkspaceLockedError
from orbit.plugin import CheckpointingHook, Plugin
from tests import tiny


class SendSignal(Plugin):
    def __init__(self, step: int, number: int, in_window: bool = False) -> None:
        self.step, self.number, self.in_window = step, number, in_window

    def on_before_batch(self, trainer: Any) -> None:
        if trainer.step == self.step and trainer.window_open == self.in_window:
            os.kill(os.getpid(), self.number)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint_step_*.pt"))


@pytest.mark.parametrize(
    ("number", "exit_code", "expected"),
    [
        (signal.SIGTERM, "128+signal", 143),
        (signal.SIGINT, "128+signal", 130),
        (signal.SIGTERM, 7, 7),
        (signal.SIGUSR1, 0, 0),
    ],
)
@pytest.mark.parametrize("in_window", [False, True])
def test_a_signal_saves_at_the_step_boundary_and_leaves(
    tmp_path: Path, number: int, exit_code: Any, expected: int, in_window: bool
) -> None:
    hook = CheckpointingHook(interval=1000, path=tmp_path, exit_code=exit_code, exit_signals=[number])
    trainer = tiny.Trainer(
        max_steps=9, plugins=[hook, SendSignal(4, number, in_window)], gradient_accumulation_steps=2
    )
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as leaving:
        trainer.train()
    assert leaving.value.code == expected
    assert names(tmp_path) == ["checkpoint_step_5.pt"], "the window that was open is finished first"
    assert signal.getsignal(number) == before


def test_a_second_signal_is_not_held_back(tmp_path: Path) -> None:
    """It goes where it would have gone without the hook."""

    class Impatient(SendSignal):
        def on_before_batch(self, trainer: Any) -> None:
            super().on_before_batch(trainer)
            time.sleep(0.15)
            super().on_before_batch(trainer)

    def leave_now(*_: Any) -> None:
        raise TimeoutError("at once")

    before = signal.signal(signal.SIGUSR1, leave_now)
    try:
        hook = CheckpointingHook(interval=1000, path=tmp_path, exit_signals=[signal.SIGUSR1])
        with pytest.raises(TimeoutError, match="at once"):
            tiny.Trainer(max_steps=9, plugins=[hook, Impatient(4, signal.SIGUSR1)]).train()
    finally:
        assert signal.signal(signal.SIGUSR1, before) is leave_now
    assert names(tmp_path) == []


def test_load_takes_latest_a_path_or_nothing(tmp_path: Path) -> None:
    tiny.Trainer(
        max_steps=6, plugins=[CheckpointingHook(interval=2, path=tmp_path, keep_previous=None)]
    ).train()
    assert names(tmp_path) == [f"checkpoint_step_{step}.pt" for step in (2, 4, 6)]

    def resumed_at(load: Any) -> int:
        trainer = tiny.Trainer(
            max_steps=8, plugins=[CheckpointingHook(interval=100, path=tmp_path, load=load)]
        )
        trainer.build()
        return trainer.step

    assert resumed_at("latest") == 6
    assert resumed_at(tmp_path / "checkpoint_step_4.pt") == 4
    assert resumed_at(None) == 0
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        resumed_at(tmp_path / "checkpoint_step_5.pt")
    for path in tmp_path.glob("checkpoint_step_*.pt"):
        path.write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="none is valid"):
        resumed_at("latest")


def test_outside_the_main_thread_signals_are_said_to_be_left_alone(tmp_path: Path) -> None:
    trainer = tiny.Trainer(max_steps=2, plugins=[CheckpointingHook(interval=1, path=tmp_path)])
    caught: list[Any] = []

    def work() -> None:
        with pytest.warns(UserWarning, match="outside the main thread") as warned:
            trainer.train()
        caught.extend(warned)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert trainer.step == 2


@pytest.mark.parametrize(
    "options", [{"interval": 0}, {"keep_previous": -1}, {"keep_interval": 0}, {"exit_code": "signal"}]
)
def test_bad_arguments(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="CheckpointingHook"):
        CheckpointingHook(**options)


def test_an_epoch_that_ends_inside_a_window_is_saved_with_the_windows_step(tmp_path: Path) -> None:
    """7 batches an epoch and windows of 3: the first epoch ends inside the third window."""
    hook = CheckpointingHook(interval=None, every_epoch=True, path=tmp_path)
    tiny.Trainer(max_steps=4, plugins=[hook], gradient_accumulation_steps=3).train()
    assert names(tmp_path) == ["checkpoint_step_3.pt", "checkpoint_step_4.pt"], "and the end of the run"


def test_the_end_of_a_run_is_saved_once(tmp_path: Path) -> None:
    def finish() -> list[str]:
        trainer = tiny.Trainer(max_steps=5, plugins=[CheckpointingHook(interval=2, path=tmp_path)])
        trainer.train()
        return names(tmp_path)

    assert finish() == ["checkpoint_step_2.pt", "checkpoint_step_4.pt", "checkpoint_step_5.pt"]
    written = (tmp_path / "checkpoint_step_5.pt").stat().st_mtime_ns
    finish()
    assert (tmp_path / "checkpoint_step_5.pt").stat().st_mtime_ns == written, (
        "a finished run is left as it is"
    )


def test_a_signal_in_a_window_across_the_epochs_end_waits_for_its_step(tmp_path: Path) -> None:
    class SignalLast(Plugin):
        def on_before_batch(self, trainer: Any) -> None:
            if trainer.is_last_batch:
                os.kill(os.getpid(), signal.SIGTERM)

    hook = CheckpointingHook(interval=1000, path=tmp_path)
    trainer = tiny.Trainer(max_steps=9, plugins=[hook, SignalLast()], gradient_accumulation_steps=3)
    with pytest.raises(SystemExit, match="143"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint_step_3.pt"]


def test_a_signal_after_the_last_step_still_saves(tmp_path: Path) -> None:
    class SignalLate(Plugin):
        def on_after_train(self, trainer: Any) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = CheckpointingHook(interval=1000, path=tmp_path)
    with pytest.raises(SystemExit, match="143"):
        tiny.Trainer(max_steps=5, plugins=[SignalLate(), hook]).train()
    assert names(tmp_path) == ["checkpoint_step_5.pt"]


# -- beside the loop, and one writer a folder ----------------------------------------------------------------------


class Slow(CheckpointingHook):
    """Its files take a moment."""

    def __init__(self, folder: Path, seconds: float, **options: Any) -> None:
        super().__init__(2, path=folder, asynchronous=True, **options)
        self.seconds, self.threads = seconds, set[str]()

    def _tidy(self, path: Path) -> None:
        time.sleep(self.seconds)
        self.threads.add(threading.current_thread().name)
        super()._tidy(path)


def test_an_asynchronous_run_saves_the_same_and_waits_at_its_end(tmp_path: Path) -> None:
    def train(hook: CheckpointingHook) -> dict[str, Any]:
        torch.manual_seed(3)
        tiny.Trainer(max_steps=7, plugins=[hook]).train()
        return {name: load_checkpoint(hook.path / name)["model"] for name in names(hook.path)}

    plain = train(CheckpointingHook(2, path=tmp_path / "a"))
    slow = Slow(tmp_path / "b", 0.02)
    beside = train(slow)
    assert plain.keys() == beside.keys()
    assert all(torch.equal(plain[n][key], beside[n][key]) for n in plain for key in plain[n])
    assert slow.acknowledged == 7
    assert slow.threads == {"orbit-checkpoint"}
    assert (tmp_path / "b" / "checkpoint_latest.pt").resolve().name == "checkpoint_step_7.pt"


def test_acknowledged_is_what_lies_on_the_disk(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []

    class Look(Plugin):
        priority = 1000

        def on_after_step(self, trainer: Any) -> None:
            seen.append((trainer.step, hook.acknowledged))
            if hook.acknowledged is not None:
                assert is_valid(tmp_path / f"checkpoint_step_{hook.acknowledged}.pt")

    hook = Slow(tmp_path, 0.1)
    tiny.Trainer(max_steps=5, plugins=[hook, Look()]).train()
    assert seen[1] == (2, None), "the save of step 2 has only begun"
    assert seen[3] == (4, 2), "that of step 4 has waited for it"


def test_a_failed_asynchronous_save_ends_the_run_at_the_next_boundary(tmp_path: Path) -> None:
    class Full(CheckpointingHook):
        def _tidy(self, path: Path) -> None:
            raise CheckpointError(f"{path} cannot be written: 0 bytes are free")

    class Wait(Plugin):
        priority = 1000

        def on_after_step(self, trainer: Any) -> None:
            if hook._background._thread is not None:
                hook._background._thread.join()

    hook = Full(2, path=tmp_path, asynchronous=True)
    trainer = tiny.Trainer(max_steps=9, plugins=[hook, Wait()])
    with pytest.raises(CheckpointError, match="0 bytes are free"):
        trainer.train()
    assert trainer.step == 3

    last = Full(None, path=tmp_path / "last", asynchronous=True)
    with pytest.raises(CheckpointError, match="0 bytes are free"):
        tiny.Trainer(max_steps=2, plugins=[last]).train()


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(CheckpointingHook):
        def _tidy(self, path: Path) -> None:
            raise CheckpointError("0 bytes are free")

    class Break(Plugin):
        priority = 1000

        def on_after_step(self, trainer: Any) -> None:
            if trainer.step == 2:
                raise KeyError("the user's own")

    with pytest.raises(KeyError, match="the user's own"):
        tiny.Trainer(max_steps=4, plugins=[Full(2, path=tmp_path, asynchronous=True), Break()]).train()
    assert "0 bytes are free" in caplog.text


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_waits_for_its_save(tmp_path: Path, asynchronous: bool) -> None:
    hook = Slow(tmp_path, 0.05) if asynchronous else CheckpointingHook(2, path=tmp_path)
    with pytest.raises(SystemExit, match="143"):
        tiny.Trainer(max_steps=9, plugins=[hook, SendSignal(4, signal.SIGTERM)]).train()
    assert names(tmp_path) == ["checkpoint_step_2.pt", "checkpoint_step_4.pt", "checkpoint_step_5.pt"]
    assert hook.acknowledged == 5


def test_the_lock_is_held_while_training_and_no_longer(tmp_path: Path) -> None:
    class Second(Plugin):
        refused = 0

        def on_after_step(self, trainer: Any) -> None:
            with pytest.raises(WorkspaceLockedError, match=f"process {os.getpid()}"):
                tiny.Trainer(max_steps=9, plugins=[CheckpointingHook(2, path=tmp_path)]).train()
            reader = tiny.Trainer(max_steps=9, plugins=[CheckpointingHook(2, path=tmp_path)])
            reader.build()  # reading needs no lock
            assert reader.step == max([0, *map(step_of, list_checkpoints(tmp_path))])
            self.refused += 1

    second = Second()
    trainer = tiny.Trainer(max_steps=3, plugins=[CheckpointingHook(2, path=tmp_path), second])
    trainer.train()
    assert second.refused == 3
    trainer.max_steps = 5
    trainer.train()
    assert second.refused == 5, "a second train() takes it again"
    tiny.Trainer(max_steps=6, plugins=[CheckpointingHook(2, path=tmp_path)]).train()


def test_what_a_killed_run_left_is_swept_when_the_next_one_starts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stray = tmp_path / f"checkpoint_step_3.pt.{os.getpid()}-99999.tmp"
    stray.write_bytes(b"half")
    with caplog.at_level("INFO"):
        tiny.Trainer(max_steps=2, plugins=[CheckpointingHook(2, path=tmp_path)]).train()
    assert not stray.exists()
    assert f"removed what a killed run left: {stray.name}" in caplog.text


def test_pieces_of_whole_tensors_are_refused(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    hook = CheckpointingHook(1, path=tmp_path, sharded=True)
    trainer = tiny.Trainer(2, [hook], state_dict_options=StateDictOptions(full_state_dict=True))
    with pytest.raises(ValueError, match="sharded=True.*full_state_dict=True.*leave one of them out"):
        trainer.train()


@pytest.mark.parametrize(
    ("keep", "fate"), [(2, "they go at its first save"), (None, "they stay, and are taken")]
)
def test_a_new_run_before_old_checkpoints_says_what_becomes_of_them(
    keep: int | None, fate: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny.Trainer(6, [CheckpointingHook(3, path=tmp_path)]).train()
    assert "later steps" not in caplog.text
    tiny.Trainer(2, [CheckpointingHook(2, path=tmp_path, load=None, keep_previous=keep)]).train()
    assert (
        f"checkpoint_step_3.pt, checkpoint_step_6.pt, of later steps than this run begins at (0): {fate}"
        in caplog.text
    )
    assert (tmp_path / "checkpoint_step_6.pt").exists() == (keep is None)
