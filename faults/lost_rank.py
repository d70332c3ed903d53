"""One of two ranks is killed, raises or hangs; torchrun starts both again, and the run goes on by itself.

A hang is an error on the other rank after the process group's timeout. The final weights must be those of a run that
nothing happened to, to the last bit, after at most two restarts, and no process may be left.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from faults.result import Result

ROOT = Path(__file__).parents[1]
WORKER = Path(__file__).with_name("rank_worker.py")


def run(short: bool, seed: int) -> Result:
    deeds = ["kill"] if short else [deed for deed in ("kill", "raise", "hang") for _ in range(3)]
    equal = orphans = most = 0
    wrong = list[str]()
    with tempfile.TemporaryDirectory() as name:
        expected = _launch(Path(name) / "whole", "none", 0, seed)[0]
        for number, deed in enumerate(deeds):
            folder = Path(name) / f"{number}"
            weights, restarts, left, said = _launch(folder, deed, 4 + 3 * (number % 3), seed)
            same = (weights is not None and expected is not None) and all(
                torch.equal(weights[key], value) for key, value in expected.items()
            )
            equal, orphans, most = equal + same, orphans + left, max(most, restarts)
            if not same:
                wrong.append(f"{deed}: {said[-300:]}")
    figure = f"{equal}/{len(deeds)} bitwise equal; at most {most} restarts; {orphans} orphans"
    done = f"rank 1 of 2 under torchrun: {', '.join(f'{deeds.count(d)} x {d}' for d in dict.fromkeys(deeds))}"
    holds = equal == len(deeds) and most <= 2 and not orphans
    return Result("lost_rank", done, "; ".join([figure, *wrong]), holds)


def _launch(
    folder: Path, deed: str, step: int, seed: int
) -> tuple[dict[str, torch.Tensor] | None, int, int, str]:
    """Final weights, restarts, processes left behind, and what was printed."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--monitor-interval", "0.1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # without it a restart over gloo often meets the dead store
    }
    done = subprocess.run(
        [*command, str(WORKER), str(folder), deed, str(step), str(seed)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    started = [line.split() for line in (folder / "started").read_text().splitlines()]
    alive = sum(_alive(int(pid)) for pid, _ in started)
    restarts = max(int(attempt) for _, attempt in started)
    final = folder / "final.pt"
    weights = torch.load(final, weights_only=True) if final.exists() else None
    return weights, restarts, alive, done.stderr


def _alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
