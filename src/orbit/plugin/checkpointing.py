"""Save the run at intervals and on signals; resume from the newest checkpoint that is whole."""

from __future__ import annotations

import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.core import checkpoint, runtime
from orbit.core.checkpoint.background import Background, Staging
from orbit.core.checkpoint.lock import FolderLock, taken
from orbit.core.events import Plugin
from orbit.core.ranks import on_all, on_main
from orbit.core.signals import Listener
from orbit.plugin.logs import check_interval

if TYPE_CHECKING:
    from orbit.core.loop import Core


class CheckpointingHook(Plugin):
    """Write `checkpoint_step_{step}.pt` and the link `checkpoint_latest.pt` (see `core/checkpoint/`): at intervals,
    on signals, and at the end of the run.

    A signal only sets a flag; the state is saved at the next step boundary, and the process then leaves with
    `exit_code`. A second signal ends the process at once (`core/signals.py`).

    Args:
        interval: save every so many steps; None does not. The end of the run is saved in any case.
        keep_previous: checkpoints kept besides the newest; None keeps all.
        keep_interval: also keep every checkpoint whose step is a multiple of this.
        path: folder; a relative one lies in the trainer's workspace, if it has one.
        load: "latest" resumes from the newest valid checkpoint of `path`, if there is one: the script is run again, and
            train() calls that were over do nothing. A path loads that file, which must exist, and the first train()
            goes on from there. None starts anew.
        exit_signals: signals after which to save and leave.
        exit_code: process exit code, or "128+signal".
        exit_wait: seconds (or a timedelta) that a rank waits for the others before it leaves; a single process
            does not wait.
        every_epoch: also save at every epoch's end.
        sharded: write folders, to which every rank adds its pieces; None does so where the model is sharded.
        asynchronous: the loop waits only until the state is copied into CPU memory, which is kept for the next save; a
            thread writes it. At most one save is under way, and the end of the run, a signal's exit and `on_close` wait
            for it.

    One run at a time may write to a folder: while it trains it holds a lock there (`core/checkpoint/lock.py`).

    Attributes:
        acknowledged: the newest step whose checkpoint is on the disk, as far as this hook knows; None if there is none.

    Raises:
        ValueError: a number outside its range.
        CheckpointError: at start, if checkpoints exist and none is valid. At a save (of an asynchronous one, at the
            next step boundary), if it cannot be written.
        WorkspaceLockedError: at start, if another run writes to the folder.
    """

    priority = Plugin.CHECKPOINT
    writes = True

    def __init__(
        self,
        interval: int | None = 1000,
        keep_previous: int | None = 2,
        keep_interval: int | None = None,
        path: Path | str = "checkpoints",
        load: Path | str | None = "latest",
        exit_signals: Sequence[int] = (signal.SIGTERM, signal.SIGINT),
        exit_code: int | str = "128+signal",
        exit_wait: float | timedelta = 60.0,
        every_epoch: bool = False,
        sharded: bool | None = None,
        asynchronous: bool = False,
    ) -> None:
        self.interval = None if interval is None else check_interval("CheckpointingHook", interval)
        if keep_previous is not None and keep_previous < 0:
            raise ValueError(
                f"CheckpointingHook(keep_previous={keep_previous}): it must be >= 0, or None to keep all"
            )
        if keep_interval is not None and keep_interval < 1:
            raise ValueError(
                f"CheckpointingHook(keep_interval={keep_interval}): it must be >= 1 steps, or None"
            )
        if exit_code != "128+signal" and not isinstance(exit_code, int):
            raise ValueError(f'CheckpointingHook(exit_code={exit_code!r}): give a number, or "128+signal"')
        self.keep_previous, self.keep_interval = keep_previous, keep_interval
        self.path, self.load = Path(path), load
        self.exit_signals = [signal.Signals(number) for number in exit_signals]
        self.exit_code = exit_code
        self.exit_wait = exit_wait.total_seconds() if isinstance(exit_wait, timedelta) else float(exit_wait)
        self.every_epoch, self.sharded, self.asynchronous = every_epoch, sharded, asynchronous
        self.acknowledged: int | None = None
        self._lock: FolderLock | None = None
        self._staging, self._background = Staging(), Background()
        self._group: Any = None  # the ranks, for writing shards beside the training
        self._failing = False
        self._owed = False  # an epoch ended inside a window
        self._saved_step: int | None = None
        self._listener: Listener | None = None

    def folder(self, trainer: Core) -> Path:
        """Where this hook's checkpoints lie."""
        return trainer.in_workspace(self.path)

    def on_restore(self, trainer: Core) -> None:
        if trainer.is_training:  # else it is only looked at: reading needs no lock
            on_main(lambda: self._take(trainer))
        if self.load is None:
            return
        if self.load == "latest":
            found = on_main(lambda: checkpoint.latest_checkpoint(self.folder(trainer)))
            if found is None:
                return
        else:
            found = Path(self.load)
        trainer.load_state_dict(trainer.read_checkpoint(found))
        if self.load == "latest":
            trainer.repeat_calls()
        self._saved_step = self.acknowledged = trainer.step
        trainer.logger.info("resumed from %s at step %d", found, trainer.step)

    def on_before_train(self, trainer: Core) -> None:
        options = getattr(trainer, "state_dict_options", None)
        if self.sharded and options is not None and options.full_state_dict:
            raise ValueError(
                "CheckpointingHook(sharded=True) writes pieces, and state_dict_options asks for full_state_dict=True, "
                "whole tensors: leave one of them out"
            )
        on_main(lambda: self._take(trainer))
        on_main(lambda: self._warn_of_later(trainer))
        self._owed = self._failing = False
        if not self.exit_signals:
            return
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "CheckpointingHook cannot catch signals outside the main thread: pass exit_signals=[] there",
                stacklevel=2,
            )
            return
        self._listener = Listener(self.exit_signals, trainer.interrupt)
        self._listener.listen()

    def on_after_step(self, trainer: Core) -> None:
        self._boundary(trainer, self.interval is not None and trainer.step % self.interval == 0)

    def on_after_epoch(self, trainer: Core) -> None:
        if trainer.window_open:  # it runs across the epoch's end: its own step saves
            self._owed = self.every_epoch
        else:
            self._boundary(trainer, self.every_epoch)

    def on_after_train(self, trainer: Core) -> None:
        self._boundary(trainer, trainer.step != self._saved_step)  # the end of the run is always saved
        on_all(self._background.wait)

    def on_exception(self, trainer: Core, exception: BaseException) -> None:
        self._failing = True

    def on_close(self, trainer: Core) -> None:
        if self._listener is not None:
            self._listener.close()
        try:
            self._background.wait()
        except Exception:
            if not self._failing:
                raise
            trainer.logger.exception("while the run was ending with another error, a save failed")
        finally:
            self._staging = Staging()  # which may be as large as the model and its optimizer
            if self._lock is not None:
                self._lock.release()

    def save(self, trainer: Core) -> Path:
        """Save now; older checkpoints go only after the new one has been read back.

        An asynchronous save has then begun: see `acknowledged`.
        """
        sharded = trainer.saves_pieces if self.sharded is None else self.sharded
        state = trainer.state_to_write(sharded)
        self._saved_step = trainer.step
        path = checkpoint.checkpoint_path(self.folder(trainer), trainer.step, sharded)
        if not self.asynchronous:
            checkpoint.save_and_tidy(state, path, self._tidy)
        elif not sharded:
            on_main(
                lambda: self._begin(
                    state, lambda staged: self._tidy(checkpoint.save_checkpoint(staged, path))
                )
            )
        else:
            if self._group is None:
                self._group = checkpoint.new_group()
            on_all(
                lambda: self._begin(
                    state, lambda staged: checkpoint.save_and_tidy(staged, path, self._tidy, self._group)
                )
            )
        return path

    def _begin(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        self._background.wait()  # it reads the memory that the next line fills
        staged = self._staging.copy(state)
        self._background.submit(lambda: write(staged))

    def _tidy(self, path: Path) -> None:
        checkpoint.link_latest(path)
        self.acknowledged = checkpoint.step_of(path)
        if self.keep_previous is not None:
            checkpoint.prune(path.parent, self._kept(checkpoint.list_checkpoints(path.parent), path))

    def _kept(self, present: list[Path], newest: Path) -> set[Path]:
        assert self.keep_previous is not None
        step = checkpoint.step_of(newest)
        older = [path for path in present if checkpoint.step_of(path) < step]
        kept = {newest, *older[len(older) - self.keep_previous :]} if self.keep_previous else {newest}
        if self.keep_interval is not None:
            kept |= {path for path in present if checkpoint.step_of(path) % self.keep_interval == 0}
        return kept

    def _take(self, trainer: Core) -> None:
        self._lock = taken(self._lock, self.folder(trainer), trainer.logger)

    def _warn_of_later(self, trainer: Core) -> None:
        """Say so if a run begins before checkpoints that are there: anew, or from an older one of them."""
        present = checkpoint.list_checkpoints(self.folder(trainer))
        later = [path.name for path in present if checkpoint.step_of(path) > trainer.step]
        if later:
            stay = (
                "stay, and are taken for the latest" if self.keep_previous is None else "go at its first save"
            )
            trainer.logger.warning(
                "%s holds %s, of later steps than this run begins at (%d): they %s; move them away, or choose a path",
                self.folder(trainer),
                ", ".join(later),
                trainer.step,
                stay,
            )

    def _boundary(self, trainer: Core, due: bool) -> None:
        if runtime.world_size() == 1:  # several ranks hear of a failed save at the next one
            self._background.check()
        number = trainer.interrupted
        if due or self._owed or number is not None:
            self._owed = False
            self.save(trainer)
        if number is None:
            return
        on_all(self._background.wait)
        trainer.logger.info("%s: saved at step %d, leaving", signal.Signals(number).name, trainer.step)
        runtime.wait_for_ranks(self.exit_wait)
        raise SystemExit(128 + number if self.exit_code == "128+signal" else self.exit_code)
