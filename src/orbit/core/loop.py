"""`Core`: the one training loop, and everything that both front doors share.

`Engine` (you own the loop) and `BaseTrainer` (you subclass) differ in who computes the loss. Both walk through

    for batch in self.microbatches(feed, ...):      # the only training loop in the library
        self.step_on(outcome)                       # backward, and a step when the window is full

and `microbatches` calls the events of `core/events.py`, keeps the place in the data, and decides when to end.
Constructors only store; `build()` runs once, before the first batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from copy import deepcopy
from functools import wraps
from time import perf_counter
from typing import Any

import torch
from torch import nn

from orbit.core import param_groups, rng, runtime
from orbit.core.events import Dispatcher, Plugin
from orbit.core.feed import Feed
from orbit.core.meters import Averages
from orbit.core.nested import count_samples
from orbit.core.outcome import Outcome
from orbit.core.state import TrainState
from orbit.core.update import Updater

_FORMAT = 1  # of state_dict(); raised when an older checkpoint could be misread


def _announced(event: str, method: Callable[..., None]) -> Callable[..., None]:
    """Let `trainer.log(...)` tell every plugin once, however often subclasses override it and call super()."""

    @wraps(method)
    def log(self: Core, records: dict[str, Any], dry_run: bool = False) -> None:
        if self._announcing:  # a super().log(...) inside an override
            method(self, records, dry_run)
            return
        self._announcing = True
        try:
            method(self, records, dry_run)
        finally:
            self._announcing = False
        self.emit(event, records, dry_run)

    log._announced = True  # type: ignore[attr-defined]
    return log


class Core:
    """What Engine and BaseTrainer have in common. Not for direct use: it does not know where a loss comes from.

    Attributes:
        model, optimizer, lr_scheduler, grad_scaler: the parts being trained; None until built.
        hooks: the plugins in the order they run.
        state: counters (`step`, `epoch`, ...) and flags.
        step_info: what the last step came to: `loss` and `grad_norm` (0-d tensors on their device), `records` (one dict a
            micro-batch), `lr` (list), `step_time` and `data_time` (seconds).
        metrics: floats of the current epoch.
        batch: the current micro-batch, as the loader gave it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    closes_windows_at_epoch_end: bool

    def __init__(
        self,
        *,
        device: torch.device | str | int | None,
        mixed_precision: str | None,
        grad_clip: float | None,
        accumulation: int,
        max_non_finite_grad_retries: int | None,
        no_sync_accumulate: bool,
        plugins: Iterable[Plugin] = (),
    ) -> None:
        _at_least("gradient_accumulation_steps", accumulation, 1)
        if grad_clip is not None and not grad_clip > 0:
            raise ValueError(f"grad_clip={grad_clip!r}: the largest gradient norm must be > 0; pass None for no clipping")
        if max_non_finite_grad_retries is not None:
            _at_least("max_non_finite_grad_retries", max_non_finite_grad_retries, 0)
        self.autocast_dtype = runtime.resolve_precision(mixed_precision)
        self.device = runtime.resolve_device(device)
        self.grad_clip = grad_clip
        self.gradient_accumulation_steps = accumulation
        self.max_non_finite_grad_retries = max_non_finite_grad_retries
        self.no_sync_accumulate = no_sync_accumulate
        self.lr_scheduler: Any = None
        self.grad_scaler: torch.amp.GradScaler | None = None
        self.state = TrainState()
        self.step_info: dict[str, Any] = {}
        self.batch: Any = None
        self.batch_idx = 0
        self.is_last_batch = False
        self.epoch_length: int | None = None
        self.total_steps: int | None = None
        self.logger = logging.getLogger(f"orbit.{type(self).__name__}")
        self._dispatcher = Dispatcher(plugins)
        self._built = False
        self._updater: Updater | None = None
        self._feed: Feed | None = None
        self._position: dict[str, Any] | None = None  # a restored place in the data, until it is used
        self._rng: dict[str, Any] | None = None  # restored generators, put back just before the next batch
        self._pending: dict[str, Any] | None = None  # a state loaded before the build
        self._epoch_losses = Averages()
        self._micro_records: list[dict[str, Any]] = []
        self._eval_losses: Averages | None = None
        self._running = False
        self._announcing = False
        self._entered = 0  # depth of `with trainer:`
        self._reported: int | None = None  # id of the exception that plugins were told of
        self._unclosed = False  # the loop was left inside `with trainer:`, whose end calls on_close

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for event in ("log", "log_images"):
            method = cls.__dict__.get(event)
            if callable(method) and not hasattr(method, "_announced"):
                setattr(cls, event, _announced(event, method))

    # ── what one can read ─────────────────────────────────────────────────────────────────────────────────────

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.step

    @property
    def epoch(self) -> int:
        """The current epoch, from 0."""
        return self.state.epoch

    @property
    def phase(self) -> str:
        """"idle", "train" or "eval"."""
        return self.state.phase

    @property
    def metrics(self) -> dict[str, float]:
        return self.state.metrics

    @property
    def hooks(self) -> list[Plugin]:
        return self._dispatcher.plugins

    @property
    def is_epoch_end(self) -> bool:
        """The epoch's last batch is in your hands."""
        return self.is_last_batch and self.state.phase == "train"

    @property
    def unwrapped_model(self) -> nn.Module:
        return runtime.unwrap(self.model)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module inside compiled, distributed and averaged (EMA) models."""
        return runtime.unwrap(model)

    @property
    def updater(self) -> Updater:
        if self._updater is None:
            raise RuntimeError(f"{type(self).__name__} has no optimizer: give it one to train, or step yourself without update()")
        return self._updater

    @property
    def window_open(self) -> bool:
        """Micro-batches have been accumulated that no step has used yet."""
        return self._updater is not None and self._updater.open

    # ── talking ───────────────────────────────────────────────────────────────────────────────────────────────

    def emit(self, event: str, *args: Any) -> None:
        """Call `on_<event>(self, *args)` of every plugin that overrides it."""
        for handler in self._dispatcher.handlers[event]:
            handler(self, *args)

    def log(self, records: dict[str, Any], dry_run: bool = False) -> None:
        """Log nested `records` of numbers; override to send them somewhere. Every plugin's `on_log` is called once.

        `dry_run` is True where nothing must be written (ranks other than 0).
        """

    def log_images(self, records: dict[str, Any], dry_run: bool = False) -> None:
        """Log named images; override to send them somewhere. Every plugin's `on_log_images` is called once."""

    log = _announced("log", log)  # type: ignore[assignment]
    log_images = _announced("log_images", log_images)  # type: ignore[assignment]

    def stop(self, source: str = "user", reason: str = "") -> None:
        """End the run as soon as no accumulation window is open. Does not raise; the run ends as if complete."""
        self.state.stop = (source, reason)

    def autocast(self) -> Any:
        """The run's autocast context. The loop's body already runs inside it."""
        return runtime.autocast(self.device, self.autocast_dtype)

    # ── building ──────────────────────────────────────────────────────────────────────────────────────────────

    def build(self) -> None:
        """Build everything once; `train()` calls it. Subclasses say how in `_build_parts`."""
        if self._built:
            return
        self._build_parts()
        self._transform(self.hooks)
        self._built = True
        self._make_updater()
        self.emit("restore")
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self.load_state_dict(pending)

    def _build_parts(self) -> None:
        raise NotImplementedError

    def _transform(self, plugins: Iterable[Plugin]) -> None:
        """Let plugins change the model, then make the optimizer hold what trains now."""
        before = param_groups.snapshot(self.model)
        for plugin in plugins:
            plugin.on_build_model(self)
        if param_groups.changed(before, param_groups.snapshot(self.model)):
            self.model.to(self.device)
            if self.optimizer is not None:
                param_groups.reconcile(self.optimizer, self.model, before)

    def _make_updater(self) -> None:
        if self.optimizer is None:
            return
        self._updater = Updater(
            self.optimizer,
            self.model,
            scheduler=self.lr_scheduler,
            scaler=self.grad_scaler,
            accumulation=self.gradient_accumulation_steps,
            grad_clip=self.grad_clip,
            retries=self.max_non_finite_grad_retries,
            before_step=lambda: self.emit("before_optimizer_step"),
            after_step=self._after_optimizer_step,
            dropped=lambda: self.emit("step_dropped"),
        )

    def attach(self, plugin: Plugin | Iterable[Plugin]) -> None:
        """Add plugins; after the build their model changes are made at once."""
        for item in [plugin] if isinstance(plugin, Plugin) else list(plugin):
            self._dispatcher.add(item)
            if self._built:
                self._transform([item])
                if self._updater is not None:
                    self._updater.accumulation = self.gradient_accumulation_steps
                    self._updater.collect_parameters()
                item.on_restore(self)

    # ── the loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def microbatches(self, loader: Iterable[Any] | None, *, epochs: int | None = None, steps: int | None = None) -> Iterator[Any]:
        """Yield this trainer once a micro-batch, until `epochs` of this call or `steps` of the whole run are done.

        The batch is in `self.batch`; the body between two batches calls `step_on`. With `loader` None,
        `build_data_loader` is asked after the build.
        """
        if self._running:
            raise RuntimeError("train() is already running: finish or leave the outer loop before starting another")
        self._running = True
        left = False
        try:
            self.build()
            self._feed = feed = Feed(self._loader() if loader is None else loader)
            self._begin(feed, epochs, steps)
            self.emit("before_train")
            while not self._finished(epochs, steps):
                yield from self._epoch(feed, steps)
            self.emit("after_train")
        except GeneratorExit:
            left = True
            self.emit("stop")
            raise
        except SystemExit:
            self.emit("stop")
            raise
        except BaseException as error:
            self.emit("exception", error)
            self._reported = id(error)
            raise
        finally:
            self._running = False
            self.state.phase = "idle"
            self._rng = self._position = None
            if self._updater is not None:
                self._updater.reset()
            if left and self._entered:
                self._unclosed = True
            else:
                self._close()

    def _epoch(self, feed: Feed, steps: int | None) -> Generator[Any, None, None]:
        """One epoch, or the rest of one that was interrupted."""
        state, emit = self.state, self.emit
        batches = self._open_epoch(feed)
        self.model.train()
        while (item := self._next(batches)) is not None:
            batch, self.is_last_batch = item
            self.batch_idx += 1
            state.micro_step += 1
            state.samples += count_samples(batch)
            if not self.window_open:
                self._micro_records = []
                emit("before_step")
            self._receive(batch)
            emit("before_batch")
            step = state.step
            with self._synchronisation(), self.autocast():
                yield self
            if self._closes_here and self.window_open:
                self.updater.close()  # the body left out the epoch's last micro-batch
            emit("after_batch")
            if state.step != step:
                self.step_info["data_time"], self._data_time = self._data_time, 0.0
                self.step_info["step_time"] = -self._step_began + (now := perf_counter())
                self._step_began = now
                emit("after_step")
            if not self.window_open and (state.stop is not None or (steps is not None and state.step >= steps)):
                if not self.is_last_batch:
                    return
                break
        losses = self._epoch_losses.flush()
        if losses:
            state.metrics["train_loss"] = losses["loss"]
        state.epoch_done = True
        emit("after_epoch")

    def step_on(self, outcome: Outcome) -> None:
        """Use one micro-batch: in training back-propagate it (and step if it fills the window), in `eval()` record it.

        Raises:
            RuntimeError: outside a train() or eval() loop, or without an optimizer.
            ValueError, NonFiniteGradientError: see `Updater.add`.
        """
        if self.state.phase == "eval":
            self._record_eval(outcome)
            return
        if self.state.phase != "train":
            raise RuntimeError("there is no batch to update on: call this inside `for _ in trainer.train(loader)` or eval(loader)")
        if outcome.loss is not None:
            self._epoch_losses.add({"loss": outcome.loss}, outcome.weight)
        self._micro_records.append(dict(outcome.records))
        self.updater.add(outcome, last=self._closes_here)

    def eval(self, loader: Iterable[Any]) -> Generator[Any, None, None]:
        """A bracket: yield this trainer once a batch, without gradients and in eval mode, then put everything back.

        Phase, every module's training flag, the current batch and its place, and all random generators are restored on
        every way out, so that the rest of training is bit for bit as if nothing had been evaluated.
        `metrics["val_loss"]` is filled from the losses given to `step_on`.
        """
        self.build()
        feed = Feed(loader)
        kept = {name: getattr(self, name) for name in self._bracketed}
        modes = [(module, module.training) for module in self.model.modules()]
        phase, losses = self.state.phase, self._eval_losses
        with rng.preserved(feed.generators):
            try:
                self.state.phase, self._eval_losses = "eval", Averages()
                self.model.eval()
                self.emit("before_eval")
                for self.batch_idx, (batch, self.is_last_batch) in enumerate(feed.epoch(self.state.epoch)):
                    self._receive(batch)
                    with torch.no_grad(), self.autocast():
                        yield self
                for name, value in self._eval_losses.flush().items():
                    self.state.metrics[f"val_{name}"] = value
                self.emit("after_eval")
            finally:
                self.state.phase, self._eval_losses = phase, losses
                for module, training in modes:
                    module.training = training
                for name, value in kept.items():
                    setattr(self, name, value)

    # ── parts of the loop ─────────────────────────────────────────────────────────────────────────────────────

    _bracketed: tuple[str, ...] = ("batch", "batch_idx", "is_last_batch")

    def _loader(self) -> Iterable[Any]:
        raise NotImplementedError

    def _receive(self, batch: Any) -> None:
        """Take a batch into hands: store it where the face of this trainer keeps it."""
        self.batch = batch

    def _record_eval(self, outcome: Outcome) -> None:
        assert self._eval_losses is not None
        if outcome.loss is not None:
            self._eval_losses.add({"loss": outcome.loss}, outcome.weight)

    @property
    def _closes_here(self) -> bool:
        """This micro-batch is the last one of its window because the epoch ends."""
        return self.is_last_batch and self.closes_windows_at_epoch_end

    def _begin(self, feed: Feed, epochs: int | None, steps: int | None) -> None:
        state = self.state
        state.stop, state.phase = None, "train"
        if self._rng is None:  # not resumed: this call counts its own epochs
            if state.micro_step:
                state.epoch += 1
            state.first_epoch, state.epoch_done = state.epoch, False
        self.epoch_length, self.total_steps = feed.length, steps
        if epochs is not None and feed.length is not None:
            windows = -(-feed.length // self.gradient_accumulation_steps)
            done = -(-self._position["cursor"] // self.gradient_accumulation_steps) if self._position else 0
            total = state.step + windows * (epochs - self._epochs_done()) - done
            self.total_steps = total if steps is None else min(total, steps)
        if self._updater is not None:
            self._updater.reset()
        self._data_time, self._step_began = 0.0, perf_counter()

    def _epochs_done(self) -> int:
        return self.state.epoch - self.state.first_epoch + self.state.epoch_done

    def _finished(self, epochs: int | None, steps: int | None) -> bool:
        if self.state.stop is not None or (steps is not None and self.state.step >= steps):
            return True
        return epochs is not None and self._epochs_done() >= epochs

    def _open_epoch(self, feed: Feed) -> Iterator[tuple[Any, bool]]:
        """Make the epoch's iterator; a resumed one at its place, with the checkpoint's generators put back last."""
        state, position, saved_rng = self.state, self._position, self._rng
        self._position = self._rng = None
        if state.epoch_done:
            state.epoch, state.epoch_done, position = state.epoch + 1, False, None
        if position is not None:
            assert saved_rng is not None
            batches = feed.epoch(state.epoch, position)
            rng.restore(saved_rng, feed.generators)
        else:
            if saved_rng is not None:
                rng.restore(saved_rng, feed.generators)
            self._epoch_losses.flush()
            state.metrics.clear()
            self.emit("before_epoch")
            batches = feed.epoch(state.epoch)
        self.batch_idx = feed.cursor - 1
        return batches

    def _next(self, batches: Iterator[tuple[Any, bool]]) -> tuple[Any, bool] | None:
        began = perf_counter()
        item = next(batches, None)
        self._data_time += perf_counter() - began
        return item

    def _synchronisation(self) -> Any:
        """Leave out the gradient exchange between ranks on micro-batches that do not close their window."""
        if self._updater is None or not self.no_sync_accumulate or self.gradient_accumulation_steps == 1:
            return nullcontext()
        closing = self._closes_here or self._updater.micro + 1 >= self._updater.accumulation
        return nullcontext() if closing else runtime.unsynchronised(self.model)

    def _after_optimizer_step(self) -> None:
        updater = self.updater
        self.state.step += 1
        self.step_info = {
            "loss": updater.loss,
            "grad_norm": updater.grad_norm,
            "lr": [group["lr"] for group in updater.optimizer.param_groups],
            "records": self._micro_records,
        }
        self.emit("after_optimizer_step")

    # ── ways out ──────────────────────────────────────────────────────────────────────────────────────────────

    def __enter__(self) -> Any:
        self._entered += 1
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Tell the plugins what the loop's body raised (a generator cannot see it), then close."""
        self._entered -= 1
        if self._entered:
            return
        try:
            if error is not None and not isinstance(error, SystemExit) and id(error) != self._reported:
                self.emit("exception", error)
        finally:
            if self._unclosed:
                self._unclosed = False
                self._close()

    def _close(self) -> None:
        """Every plugin's on_close runs, also where another's raised."""
        with ExitStack() as stack:
            for handler in reversed(self._dispatcher.handlers["close"]):
                stack.callback(handler, self)

    # ── remembering ───────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Everything that the run needs to go on to the same bits: tensors and plain values.

        Raises:
            RuntimeError: an accumulation window is open; checkpoints lie on step boundaries.
        """
        self.build()
        if self.window_open:
            raise RuntimeError(
                f"{self.updater.micro} of {self.updater.accumulation} micro-batches of this window are accumulated and would be lost: a "
                "checkpoint lies on a step boundary. Save in on_after_step, or when `window_open` is False"
            )
        feed = self._feed
        position = self._position
        if position is None and feed is not None and not self.state.epoch_done:
            position = feed.position()
        state: dict[str, Any] = {
            "format": _FORMAT,
            "step": self.state.step,
            "state": self.state.state_dict(),
            "model": self._model_state(),
            "optimizer": self._optimizer_state(),
            "lr_scheduler": None if self.lr_scheduler is None else self.lr_scheduler.state_dict(),
            "grad_scaler": None if self.grad_scaler is None else self.grad_scaler.state_dict(),
            "updater": None if self._updater is None else self._updater.state_dict(),
            "epoch_losses": self._epoch_losses.state_dict(),
            "feed": position,
            "rng": self._rng or rng.capture(feed.generators if feed is not None else ()),
        }
        self.emit("state_dict", state)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`; before the build it is kept until then.

        Raises:
            ValueError: it is no training state, or of another model or optimizer. Nothing has changed then.
            RuntimeError: called inside a running train().
        """
        if self.state.phase != "idle":
            raise RuntimeError("load_state_dict() inside a running loop would mix two runs: leave the loop first")
        missing = [key for key in ("format", "state", "model", "optimizer", "rng") if key not in state]
        if missing:
            raise ValueError(f"this is no training state of orbit: it lacks {', '.join(missing)} (keys: {', '.join(map(str, state))})")
        if state["format"] > _FORMAT:
            raise ValueError(f"the checkpoint has format {state['format']} and this version reads up to {_FORMAT}: update orbit-torch")
        if not self._built and self._pending is not state:
            self._pending = state
            return
        for name, part in (("optimizer", self.optimizer), ("lr_scheduler", self.lr_scheduler), ("grad_scaler", self.grad_scaler)):
            if (part is None) != (state[name] is None):
                raise ValueError(f"the checkpoint has {'no' if state[name] is None else 'a'} {name} and this run has {'none' if part is None else 'one'}")
        self._load_parts(state)
        if self.lr_scheduler is not None:
            self.lr_scheduler.load_state_dict(deepcopy(state["lr_scheduler"]))
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        if self._updater is not None:
            self._updater.load_state_dict(state["updater"])
            self._updater.reset()
        self.state.load_state_dict(state["state"])
        self._epoch_losses.load_state_dict(state["epoch_losses"])
        self._position, self._rng = state["feed"], state["rng"]
        self.emit("load_state_dict", state)

    def _model_state(self) -> dict[str, Any]:
        return self.unwrapped_model.state_dict()

    def _optimizer_state(self) -> dict[str, Any] | None:
        return None if self.optimizer is None else self.optimizer.state_dict()

    def _load_parts(self, state: dict[str, Any]) -> None:
        """Load model and optimizer; both are checked before either is touched."""
        model = self.unwrapped_model
        _check_same_tensors(model.state_dict(), state["model"])
        if self.optimizer is not None:
            self.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # checks its groups first, and would share tensors
        model.load_state_dict(state["model"])


def _check_same_tensors(own: dict[str, Any], given: dict[str, Any]) -> None:
    """ValueError naming the first differences in keys or shapes."""
    problems = [f"missing {key}" for key in own if key not in given] + [f"unexpected {key}" for key in given if key not in own]
    problems += [
        f"{key} is {tuple(given[key].shape)} there and {tuple(value.shape)} here"
        for key, value in own.items()
        if key in given and isinstance(value, torch.Tensor) and value.shape != given[key].shape
    ]
    if problems:
        more = f" … and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint is of another model: {'; '.join(problems[:5])}{more}")


def _at_least(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r}: it must be a whole number >= {least}")
