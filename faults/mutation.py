"""Are the bitwise comparisons able to fail? One part of a saved state is left out, as by a library that forgets it.

Each part (optimizer, scheduler, scaler, random generators, place in the data, averages) is replaced by that of a run
that has just begun; the run that goes on from there must end elsewhere: at other weights for the first five, at another
state for the last. With nothing left out it must end at the same bits.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from faults.compare import difference
from faults.result import Result
from faults.training import FACES, train
from orbit.core import Plugin

AT = 11  # the step that is saved; inside the third epoch under both faces


class Keep(Plugin):
    """The states before the first step and after step AT."""

    priority = 1000

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Any]] = {}

    def on_before_train(self, trainer: Any) -> None:
        self.states[0] = deepcopy(trainer.state_dict())

    def on_after_step(self, trainer: Any) -> None:
        if trainer.step == AT:
            self.states[AT] = deepcopy(trainer.state_dict())


WEIGHTS = (
    "optimizer",
    "lr_scheduler",
    "grad_scaler",
    "rng",
    "feed",
)  # without these the weights go elsewhere
OTHERS = ("EMA",)


def run(short: bool, seed: int) -> Result:
    wrong: list[str] = []
    for face in FACES:
        keep = Keep()
        whole = train(face, None, plugins=[keep]).state_dict()
        fresh, state = keep.states[0], keep.states[AT]
        for part in (None, *WEIGHTS, *OTHERS):
            end = train(face, None, state=_without(part, state, fresh)).state_dict()
            compared = ("model",) if part in WEIGHTS else ("model", "EMA", "optimizer", "state")
            same = all(difference(end[key], whole[key]) is None for key in compared)
            if same != (part is None):
                wrong.append(
                    f"{face}: {f'without {part} nothing differs' if part else 'nothing left out, it differs'}"
                )
    return Result(
        "mutation",
        f"one saved part left out at load: {', '.join((*WEIGHTS, *OTHERS))}; both faces",
        f"{2 * (len(WEIGHTS) + len(OTHERS)) - len(wrong)}/{2 * (len(WEIGHTS) + len(OTHERS))} found by the bitwise "
        "comparison; none left out: equal" + "".join(f"; {line}" for line in wrong),
        not wrong,
    )


def _without(part: str | None, state: dict[str, Any], fresh: dict[str, Any]) -> dict[str, Any]:
    state = deepcopy(state)
    if part == "rng":
        state["ranks"][0]["rng"] = fresh["ranks"][0]["rng"]
    elif part == "feed":
        state["ranks"][0]["feed"]["cursor"] = 0
    elif part is not None:
        state[part] = fresh[part]
    return state
