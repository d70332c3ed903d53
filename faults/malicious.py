"""Files made to do harm (`forged.py`), loaded: each in a process of its own, whose time and memory are watched.

Every one must be refused with the library's own error within 2 s of processor time (as much as it gets of a busy
machine), with at most 100 MB more memory than before, and without making the canary file. Five more are whole training
states under a valid manifest: NaN weights, and parts of the wrong kind; they must leave the live tensors as they are.
"""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faults import forged
from faults.processes import in_child
from faults.result import Result
from faults.saving import Saving
from orbit.adapter import AdapterFileError
from orbit.adapter import load as load_adapter
from orbit.core import CheckpointError, checkpoint, load_checkpoint

SECONDS, MEGABYTES = 2.0, 100.0


def run(short: bool, seed: int) -> Result:
    made: list[tuple[Callable[[Path], Path], Callable[[Path], object]]] = [
        *((forge, load_checkpoint) for forge in forged.CHECKPOINTS),
        *((forge, lambda path: load_adapter(torch.nn.Linear(2, 2), path)) for forge in forged.ADAPTERS),
    ]
    found = [_watched(forge, load) for forge, load in made]
    found += [_state(name, spoil) for name, spoil in STATES.items()]
    wrong = [f"{name}: {why}" for name, why, _, _ in found if why]
    slowest, largest = max(found, key=lambda f: f[2]), max(found, key=lambda f: f[3])
    return Result(
        "malicious",
        f"{len(forged.CHECKPOINTS)} forged .pt files, {len(forged.ADAPTERS)} forged adapters and {len(STATES)} spoilt "
        "states loaded",
        f"{len(found) - len(wrong)}/{len(found)} refused without a canary; slowest {slowest[2]:.2f} s ({slowest[0]}), "
        f"most memory {largest[3]:.0f} MB ({largest[0]})" + "".join(f"; WRONG {line}" for line in wrong),
        not wrong,
    )


def _watched(forge: Callable[[Path], Path], load: Callable[[Path], object]) -> tuple[str, str, float, float]:
    """(name, what is wrong or "", seconds, megabytes)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = in_child(lambda: str(forge(folder)))
        why, seconds, megabytes = in_child(lambda: _load(Path(path), load))
        if (folder / forged.CANARY).exists():
            why = "the canary was made"
        return forge.__name__, why or _over(seconds, megabytes), seconds, megabytes


def _over(seconds: float, megabytes: float) -> str:
    return "" if seconds <= SECONDS and megabytes <= MEGABYTES else f"{seconds:.1f} s, {megabytes:.0f} MB"


def _load(path: Path, load: Callable[[Path], object]) -> tuple[str, float, float]:
    before, began = _peak(), time.process_time()
    try:
        load(path)
        why = "it was loaded"
    except (CheckpointError, AdapterFileError):
        why = ""
    return why, time.process_time() - began, _peak() - before


def _peak() -> float:
    """The most memory that this process ever had, in megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# -- whole states --------------------------------------------------------------------------------------------------


def _nan_weight(state: dict[str, Any]) -> None:
    state["model"]["0.weight"][3, 4] = float("nan")


def _infinite_weight(state: dict[str, Any]) -> None:
    state["model"]["1.bias"][0] = float("-inf")


def _nan_moment(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["exp_avg"][0] = float("nan")


def _rng_of_another_kind(state: dict[str, Any]) -> None:
    state["ranks"][0]["rng"] = "seven"


def _absurd_counter(state: dict[str, Any]) -> None:
    state["state"]["micro_step"] = -(10**30)


STATES: dict[str, Callable[[dict[str, Any]], None]] = {
    "NaN weight": _nan_weight,
    "infinite weight": _infinite_weight,
    "NaN moment": _nan_moment,
    "random state of another kind": _rng_of_another_kind,
    "absurd counter": _absurd_counter,
}


def _state(name: str, spoil: Callable[[dict[str, Any]], None]) -> tuple[str, str, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        why, seconds, megabytes = in_child(lambda: _resume(Path(folder), spoil))
    return name, why or _over(seconds, megabytes), seconds, megabytes


def _resume(folder: Path, spoil: Callable[[dict[str, Any]], None]) -> tuple[str, float, float]:
    Saving(folder, steps=2, keep_previous=0).train()
    path = checkpoint.checkpoint_path(folder, 2)
    state = load_checkpoint(path)
    spoil(state)
    checkpoint.save_checkpoint(state, path)
    trainer = Saving(folder, steps=3, load=None)
    trainer.build()
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    why, seconds, megabytes = _load(path, lambda path: trainer.load_state_dict(load_checkpoint(path)))
    if any(not torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items()):
        why = "live tensors changed"
    return why, seconds, megabytes
