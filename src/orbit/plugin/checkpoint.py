"""Keep the best checkpoints of a run, by a metric, and the last one.

What is written are whole training states (`core/checkpoint`), so that any of them can be resumed from:

    checkpoints/best/checkpoint_step_{step}.pt     the `save_top_k` best, and the last with `save_last`
    checkpoints/best/checkpoint_latest.pt          a link to the last, with `save_last`

(folders without `.pt` where the model is sharded over ranks, unless `state_dict_options` asks for whole tensors).

A metric is judged where it is measured: after an evaluation inside the loop, and at the epoch's end. A state lies on a
step boundary, so it is saved at the first one behind the measurement: the same weights, unless an accumulation window
was open. `CheckpointingHook` is for going on after a crash, this one for choosing a model; they need two folders.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orbit.core import checkpoint, runtime
from orbit.core.checkpoint.lock import FolderLock, taken
from orbit.core.events import Plugin
from orbit.core.meters import Averages
from orbit.core.nested import as_number
from orbit.core.ranks import everyones, on_main
from orbit.plugin import monitor as metric
from orbit.plugin.checkpointing import CheckpointingHook
from orbit.plugin.logs import check_interval
from orbit.plugin.trackers.tracker import flat

if TYPE_CHECKING:
    from orbit.core.loop import Core


class Checkpoint(Plugin):
    """Save the training state whenever `monitor` is among its best values so far.

    Args:
        monitor: a key of `trainer.metrics` ("val_loss", "train_loss", ...), or a name that every step reports ("loss",
            "grad_norm", a record of `forward`), whose mean since the last look counts. None: the newest are the best.
        mode: "min" or "max"; None or "auto" infers "max" for accuracy-like names (acc, f1, auc, ...), else "min".
        save_top_k: how many of the best are kept; -1 all, 0 none. A value that is not finite is never among the best.
        save_last: also keep the newest, whatever its value, and let `checkpoint_latest.pt` point to it.
        every_n_train_steps: look at these steps only. Otherwise after every evaluation inside the loop and at every
            epoch's end. The end of the run is looked at in any case.
        path: folder; a relative one lies in the trainer's workspace, if it has one.
        verbose: log a line for every file that is saved.

    Attributes:
        best_path, best_score: of the best state kept, or None. They survive a resume.
        kept: scores by file name, of the best states that are kept.
        last_path: the newest, or None.

    Raises:
        ValueError: an argument outside its range; at the start of training, another plugin that writes this folder.
        WorkspaceLockedError: at the start of training, another process that does.
        MetricError (a ValueError): nobody measures `monitor`; the message has the nearest name.
        CheckpointError: the state could not be written.
    """

    writes = True
    priority = (
        Plugin.CHECKPOINT - 1
    )  # what CheckpointingHook saves knows of the files that this one has written

    def __init__(
        self,
        monitor: str | None = None,
        mode: str | None = None,
        save_top_k: int = 1,
        save_last: bool = False,
        every_n_train_steps: int | None = None,
        path: Path | str = "checkpoints/best",
        verbose: bool = False,
    ) -> None:
        if not isinstance(save_top_k, int) or isinstance(save_top_k, bool) or save_top_k < -1:
            raise ValueError(
                f"Checkpoint(save_top_k={save_top_k!r}): a whole number: -1 for all, 0 for none, or more"
            )
        if save_top_k == 0 and not save_last:
            raise ValueError(
                "Checkpoint(save_top_k=0, save_last=False) would save nothing: choose one of them"
            )
        if every_n_train_steps is not None:
            check_interval("Checkpoint", every_n_train_steps, "every_n_train_steps")
        self.mode = metric.direction("Checkpoint", monitor or "", mode) if monitor is not None else "max"
        self.monitor, self.save_top_k, self.save_last = monitor, save_top_k, save_last
        self.every_n_train_steps, self.path, self.verbose = every_n_train_steps, Path(path), verbose
        self.kept: dict[str, float] = {}
        self.last_path: Path | None = None
        self._folder: Path | None = None
        self._lock: FolderLock | None = None
        self._means = Averages()  # of what the steps reported under this name, since the last look
        self._measured: tuple[int, float] | None = None  # (epoch, value) of the last look: each counts once
        self._seen = False
        self._looked = -1  # step of the last look
        self._evaluated = self._ever_evaluated = False
        self._owed: list[float | None] = []  # measured while a window was open

    # ── what one can read ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def best_path(self) -> Path | None:
        """The file of the best state."""
        best = self._best()
        return None if best is None or self._folder is None else self._folder / best

    @property
    def best_score(self) -> float | None:
        """The monitored value of the best state; None without a monitor."""
        best = self._best()
        return None if best is None or self.monitor is None else self.kept[best]

    def folder(self, trainer: Core) -> Path:
        """Where the files lie."""
        return trainer.in_workspace(self.path)

    # ── events ────────────────────────────────────────────────────────────────────────────────────────────────

    def on_restore(self, trainer: Core) -> None:
        self._folder = folder = self.folder(trainer)
        for other in trainer.hooks:
            if (
                isinstance(other, Checkpoint | CheckpointingHook)
                and other is not self
                and other.folder(trainer).resolve() == folder.resolve()
            ):
                raise ValueError(
                    f"Checkpoint(path={str(self.path)!r}): {type(other).__name__} writes into {folder} too, and each "
                    "would remove the other's files; give one of them another path="
                )

    def on_before_train(self, trainer: Core) -> None:
        on_main(lambda: self._take(trainer))
        self._evaluated, self._owed = False, []

    def on_after_eval(self, trainer: Core) -> None:
        self._evaluated = self._ever_evaluated = True

    def on_after_step(self, trainer: Core) -> None:
        if self.monitor is not None:
            self._collect(trainer, self.monitor)
        while self._owed:
            self._offer(trainer, self._owed.pop())
        if trainer.is_epoch_end:
            return  # more is known in a moment
        every = self.every_n_train_steps
        if self._evaluated if every is None else trainer.step % every == 0:
            self._look(trainer)

    def on_after_epoch(self, trainer: Core) -> None:
        every = self.every_n_train_steps
        if every is not None and (trainer.window_open or trainer.step % every):
            return
        if trainer.window_open:
            self._owed = [self._value(trainer)]
        else:
            self._look(trainer)

    def on_after_train(self, trainer: Core) -> None:
        if self._looked != trainer.step:
            self._look(trainer)
        if self.monitor is not None and not self._seen and trainer.step_info:
            raise metric.unknown("Checkpoint", self.monitor, self._names(trainer))

    def on_close(self, trainer: Core) -> None:
        if self._lock is not None:
            self._lock.release()

    def on_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state_dict[self._key] = {
            "kept": dict(self.kept),
            "last": None if self.last_path is None else self.last_path.name,
            "means": everyones(self._means.state_dict()),
            "measured": None if self._measured is None else list(self._measured),
            "seen": self._seen,
            "looked": self._looked,
        }

    def on_load_state_dict(self, trainer: Core, state_dict: dict[str, Any]) -> None:
        state = state_dict.get(self._key)
        if state is None:
            return
        folder = self._folder = self.folder(trainer)
        self.kept = {name: score for name, score in state["kept"].items() if (folder / name).exists()}
        gone = [name for name in state["kept"] if name not in self.kept]
        if gone:
            trainer.logger.warning(
                "Checkpoint: %s held %s when this was saved; gone", folder, ", ".join(gone)
            )
        self.last_path = None if state["last"] is None else folder / state["last"]
        self._means.load_state_dict(state["means"][runtime.rank() % len(state["means"])])
        self._measured = None if state["measured"] is None else (state["measured"][0], state["measured"][1])
        self._seen, self._looked = state["seen"], state["looked"]

    # ── judging ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def _key(self) -> str:
        return f"Checkpoint({self.monitor}, {self.path})"

    def _best(self) -> str | None:
        finite = [name for name, score in self.kept.items() if math.isfinite(score)]
        choose = min if self.mode == "min" else max
        return choose(finite, key=lambda name: self.kept[name]) if finite else None

    def _worst(self) -> str:
        choose = max if self.mode == "min" else min
        return choose(self.kept, key=lambda name: self.kept[name])

    def _collect(self, trainer: Core, name: str) -> None:
        info = trainer.step_info
        if name in info and name not in ("records", "lr"):
            self._means.add({name: info[name]})
        for records in info["records"]:
            self._means.add({key: value for key, value in flat(records) if key == name})

    def _value(self, trainer: Core) -> float | None:
        """The monitored value, the same on every rank; None if nothing was measured since the last look."""
        self._evaluated = False
        if self.monitor is None:
            return float(trainer.step)
        measured = trainer.metrics.get(self.monitor)
        if measured is not None:
            self._means = Averages()
            self._means.add({self.monitor: as_number(measured, self.monitor)})
        self._means.over_ranks()
        value = self._means.flush().get(self.monitor)
        if value is None:
            self._require(trainer)
            return None
        self._seen = True
        if measured is not None and self._measured == (trainer.epoch, value):
            return None
        self._measured = (trainer.epoch, value)
        return float(value)

    def _require(self, trainer: Core) -> None:
        """MetricError once it is clear that the monitored name will not come."""
        assert self.monitor is not None
        waits = (
            self.monitor.startswith("val") and not self._ever_evaluated
        )  # there may be evaluations later on
        ended = self._ever_evaluated or trainer.state.epoch_done
        stepped = bool(trainer.step_info)  # a run that was resumed may end its epoch before its first step
        if not self._seen and ended and stepped and not waits:
            raise metric.unknown("Checkpoint", self.monitor, self._names(trainer))

    def _names(self, trainer: Core) -> list[str]:
        info = trainer.step_info
        reported = [name for name in info if name not in ("records", "lr")]
        return [
            *trainer.metrics,
            *reported,
            *(name for records in info.get("records", []) for name, _ in flat(records)),
        ]

    def _look(self, trainer: Core) -> None:
        self._offer(trainer, self._value(trainer))

    def _offer(self, trainer: Core, value: float | None) -> None:
        """Save the state at hand if it is among the best, or to be the last."""
        self._looked = trainer.step
        sharded = trainer.saves_pieces
        path = checkpoint.checkpoint_path(self.folder(trainer), trainer.step, sharded)
        name = path.name
        kept = dict(self.kept)
        if value is not None and self._belongs(value):
            kept[name] = value
        elif not self.save_last:
            return
        before = (self.kept, self.last_path)
        dropped = set()
        self.kept = kept
        if 0 <= self.save_top_k < len(kept):
            dropped.add(worst := self._worst())
            del kept[worst]
        if self.save_last:
            dropped |= {self.last_path.name} - kept.keys() if self.last_path is not None else set()
            self.last_path = path
        try:
            state = trainer.state_to_write(sharded)
            checkpoint.save_and_tidy(state, path, lambda path: self._tidy(trainer, path, dropped - {name}))
        except BaseException:
            self.kept, self.last_path = before
            raise

    def _belongs(self, value: float) -> bool:
        if self.save_top_k <= 0:
            return self.save_top_k < 0
        if not math.isfinite(value):
            return False
        return len(self.kept) < self.save_top_k or metric.better(value, self.kept[self._worst()], self.mode)

    def _take(self, trainer: Core) -> None:
        self._lock = taken(self._lock, self.folder(trainer), trainer.logger)

    def _tidy(self, trainer: Core, path: Path, dropped: set[str]) -> None:
        if self.save_last:
            checkpoint.link_latest(path)
        present = checkpoint.list_checkpoints(path.parent)
        checkpoint.prune(path.parent, {item for item in present if item.name not in dropped})
        if self.verbose:
            score = self.kept.get(path.name, "not among the best")
            trainer.logger.info("Checkpoint: saved %s (%s %s)", path, self.monitor or "step", score)
