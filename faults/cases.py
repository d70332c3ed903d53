"""The cases, in the table's order. `name` is the file `faults/<name>.py`, which is imported when the case runs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import cast

from faults.result import Result

CASES: tuple[str, ...] = (
    "kill_in_save",
    "damaged_files",
    "full_disk",
    "two_writers",
    "malicious",
    "reshard",
    "lost_rank",
    "kill_in_training",
    "signal_in_training",
    "non_finite",
    "bad_workers",
    "accumulation",
    "mutation",
)


def case(name: str) -> Callable[[bool, int], Result]:
    """The function `run(short, seed)` of a case."""
    return cast(Callable[[bool, int], Result], importlib.import_module(f"faults.{name}").run)
