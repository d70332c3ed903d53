"""A run goes on from its checkpoint on another number of ranks.

Runs of 20 steps are saved at step 10 by one process, and by two ranks under DDP and FSDP2; each goes on alone, on two
ranks and on three, plain, under DDP and under FSDP2, with a full model and with adapters. What is loaded must be what
was saved, and the losses of the next 10 steps those of the uninterrupted run: within 2e-6, and to the last bit where
as many ranks go on in the same way.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from faults.result import Result
from tests.core import parallel_cases
from tests.ranks import on_ranks

SAVED = (("one", 1), ("ddp", 2), ("fsdp", 2))
READ = (("one", 1), ("ddp", 2), ("fsdp", 2), ("ddp", 3), ("fsdp", 3))
SHORT = ((("ddp", 2), ("fsdp", 3), True), (("fsdp", 2), ("one", 1), False))


def run(short: bool, seed: int) -> Result:
    cells = SHORT if short else [(a, b, adapters) for adapters in (False, True) for a in SAVED for b in READ]
    worst, bitwise, equal, wrong = 0.0, 0, 0, list[str]()
    with tempfile.TemporaryDirectory() as name:
        uninterrupted: dict[Path, Any] = {}
        for saved, read, adapters in cells:
            source, target = Path(name) / f"{saved[0]}{saved[1]}{adapters}", Path(name) / "again"
            if source not in uninterrupted:
                uninterrupted[source] = (
                    _train(*saved, source, 20, adapters, 10),
                    _train(*saved, None, 20, adapters),
                )
            at_save, at_end = uninterrupted[source]
            shutil.rmtree(target, ignore_errors=True)
            target.mkdir()
            for kept in source.glob("checkpoint_step_10*"):
                (shutil.copytree if kept.is_dir() else shutil.copy)(kept, target / kept.name)
            loaded = _train(*read, target, 10, adapters)  # nothing is left to train
            if loaded["losses"] or parallel_cases.different(loaded, at_save) > 0.0:
                wrong.append(f"{saved} to {read}: what was loaded is not what was saved")
            resumed = _train(*read, target, 20, adapters)
            apart = max(abs(a - b) for a, b in zip(resumed["losses"], at_end["losses"][10:], strict=True))
            worst = max(worst, apart)
            if saved == read:
                bitwise += 1
                equal += apart == parallel_cases.different(resumed, at_end) == 0.0
    done = f"{len(cells)} ways to go on: 1, 2, 3 ranks; plain, DDP, FSDP2; model and adapters"
    figure = (
        f"{len(cells) - len(wrong)}/{len(cells)} loaded equal; losses apart by at most {worst:.1e}; "
        f"{equal}/{bitwise} bitwise"
    )
    return Result(
        "reshard", done, "; ".join([figure, *wrong]), worst <= 2e-6 and bitwise == equal and not wrong
    )


def _train(
    way: str, ranks: int, folder: Path | None, steps: int, adapters: bool, at: int | None = None
) -> Any:
    where = None if folder is None else str(folder)
    return on_ranks("tests.core.parallel_cases:train", ranks, way, where, steps, adapters, at, seconds=120.0)[
        0
    ]
