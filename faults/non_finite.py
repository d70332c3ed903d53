"""A NaN loss, an infinite gradient, a NaN among the inputs: in single windows, and from some window on without end.

A window that is dropped must change nothing but the place in the data, dropout's generator, the count of failures and,
with fp16, the loss scale. What does not end must stop the run, and its newest checkpoint must be finite and go on.
With two ranks, one of which alone is hit, both must drop the same windows and hold the same weights.
"""

from __future__ import annotations

import math
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from faults.compare import difference
from faults.result import Result
from faults.training import FACES, train
from orbit.core import NonFiniteGradientError, Plugin, latest_checkpoint, load_checkpoint

KINDS = ("loss", "gradient", "input")
MOVES = ("micro_step", "samples")  # what was handed out is counted, used or not


class Still(Plugin):
    """Takes the whole state before each window, and compares where the window was dropped."""

    priority = 1000

    def __init__(self) -> None:
        self.before: Any = None
        self.differences: list[str | None] = []

    def on_before_step(self, trainer: Any) -> None:
        self.before = trainer.epoch, still(trainer.state_dict())

    def on_step_dropped(self, trainer: Any) -> None:
        epoch, before = self.before
        now = still(trainer.state_dict())
        if trainer.epoch != epoch:  # BaseTrainer's window ran across an epoch's end, which counts
            now["state"], now["ranks"] = before["state"], before["ranks"]
        self.differences.append(difference(now, before))


def still(state: dict[str, Any]) -> dict[str, Any]:
    """What must not move in a window that is dropped."""
    state = deepcopy(state)
    state["updater"] = state["updater"]["outside"]  # and the unit of weights is that of the first ever seen
    state["grad_scaler"] = {}
    state["state"] = {key: value for key, value in state["state"].items() if key not in MOVES}
    state["ranks"] = [part["epoch_losses"] for part in state["ranks"]]
    return state


class Poison(Plugin):
    """Spoils the loss, the gradient or the input of the micro-batches `at`, counted over the run."""

    priority = 500  # after a checkpoint was loaded

    def __init__(self, kind: str, at: set[int], scale: float | None = None) -> None:
        self.kind, self.at, self.scale = kind, at, scale

    def on_before_train(self, trainer: Any) -> None:
        def hurts(kind: str) -> bool:
            return self.kind == kind and trainer.phase == "train" and trainer.state.micro_step in self.at

        def before(module: Any, inputs: Any) -> Any:
            return tuple(x * math.nan for x in inputs) if hurts("input") else None

        def after(module: Any, inputs: Any, out: Any) -> Any:
            if hurts("gradient"):
                out.register_hook(lambda gradient: gradient * math.inf)
            return out * math.nan if hurts("loss") else None

        trainer.unwrapped_model.register_forward_pre_hook(before)
        trainer.unwrapped_model.register_forward_hook(after)
        if self.scale is not None:
            trainer.grad_scaler.load_state_dict(trainer.grad_scaler.state_dict() | {"scale": self.scale})


def run(short: bool, seed: int) -> Result:
    wrong, count, dropped = list[str](), 0, 0
    combinations = [(face, scaled, kind) for face in FACES for scaled in (False, True) for kind in KINDS]
    for face, scaled, kind in combinations[:: 5 if short else 1]:
        count += 1
        watch = Still()
        trainer = train(face, None, scaled=scaled, plugins=[watch, Poison(kind, {4, 20})])
        dropped += len(watch.differences)
        found = {text for text in watch.differences if text} | set(_not_finite(trainer.state_dict()))
        if found or len(watch.differences) < 2:
            wrong.append(f"{face}, {kind}, scaler {scaled}: {found or 'no window was dropped'}")
        with tempfile.TemporaryDirectory() as folder:
            if said := _stops(Path(folder), face, kind, scaled):
                wrong.append(f"{face}, {kind}, scaler {scaled}, without end: {said}")
    agreed = sum(_ranks_agree(scaled) for scaled in (False, True))
    return Result(
        "non_finite",
        f"NaN loss, infinite gradient, NaN input x scaler x both faces, twice and without end ({2 * count} runs); "
        "NaN loss on one rank of two",
        f"{dropped} windows dropped; {2 * count - len(wrong)}/{2 * count} runs unchanged by them, or stopped with a "
        f"finite newest checkpoint that trains on; ranks agree {agreed}/2"
        + "".join(f"; {line}" for line in wrong[:3]),
        not wrong and agreed == 2,
    )


def _stops(folder: Path, face: str, kind: str, scaled: bool) -> str:
    """What is wrong with a run that is hit from micro-batch 15 on; "" if nothing."""
    poison = Poison(kind, set(range(15, 99)), scale=4.0 if scaled else None)
    try:
        train(face, folder, scaled=scaled, plugins=[poison])
        return "it did not stop"
    except NonFiniteGradientError:
        newest = latest_checkpoint(folder)
    if newest is None:
        return "no checkpoint is left"
    if found := _not_finite(load_checkpoint(newest)):
        return f"{newest.name}: {found[0]}"
    return next(iter(_not_finite(train(face, folder, scaled=scaled).state_dict())), "")


def _not_finite(state: dict[str, Any]) -> list[str]:
    found = [
        f"{part}[{name!r}] is not finite"
        for part in ("model", "EMA")
        for name, tensor in state[part].items()
        if not tensor.isfinite().all()
    ]
    for entry in state["optimizer"]["state"].values():
        found += [
            f"the optimizer's {name} is not finite"
            for name, v in entry.items()
            if not torch.isfinite(v).all()
        ]
    return found


def _ranks_agree(scaled: bool) -> bool:
    from tests.ranks import on_ranks

    one, other = on_ranks("tests.core.parallel_cases:drops_together", 2, scaled)
    return one == other and bool(one["dropped"]) and set(one["same"]) == {True}
