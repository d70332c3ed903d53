"""Micro-batches of many lengths, one with nothing in it, a last one that is shorter: the gradient is the whole batch's.

Rows of 4 to 40 tokens that count, one row with none, 19 rows in all. A window of n micro-batches on each of R ranks is
compared with the same rows as one batch on one process; ‖Δg‖/‖g‖ at the most, before and after clipping.
"""

from __future__ import annotations

import torch

from faults.result import Result
from tests.core.parallel_cases import gradient
from tests.ranks import on_ranks

LIMITS = {torch.float64: 1e-10, torch.float32: 2e-6}
ACCUMULATION = (1, 2, 4, 8)


def run(short: bool, seed: int) -> Result:
    worst = dict.fromkeys(LIMITS, 0.0)
    for dtype in LIMITS:
        for n in ACCUMULATION:  # n micro-batches of one row against one batch of n rows, twice
            for split, whole in zip(gradient("one", dtype, n, 1), gradient("one", dtype, 1, n), strict=True):
                worst[dtype] = max(worst[dtype], ((split - whole).norm() / whole.norm()).item())
    for way in ("ddp",) if short else ("ddp", "fsdp"):
        for rank in on_ranks("tests.core.parallel_cases:windows", 2, way, list(LIMITS)):
            for (dtype, n), windows in rank.items():
                for split, whole in zip(windows, gradient("one", dtype, n, rows_at_once=6), strict=True):
                    worst[dtype] = max(worst[dtype], ((split - whole).norm() / whole.norm()).item())
    return Result(
        "accumulation",
        f"windows of 1, 2, 4, 8 micro-batches x 1, 2 ranks ({'DDP' if short else 'DDP, FSDP2'}), 10x length spread, "
        "one all masked, last one uneven",
        ", ".join(f"{str(dtype).removeprefix('torch.')} {worst[dtype]:.1e}" for dtype in LIMITS),
        all(worst[dtype] <= limit for dtype, limit in LIMITS.items()),
    )
