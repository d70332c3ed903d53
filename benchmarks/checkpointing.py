"""How long a save holds up training: `make bench-checkpoints`, or `python -m benchmarks.checkpointing [--out FILE]`.

    stall    the loop's wait in `CheckpointingHook.save`, of an asynchronous hook and of a synchronous one. The bar: the
             asynchronous one's is at most a tenth. A save waits for the one before it, so this holds where saves are
             further apart than they take.
    beside   a training step while the file is written in the background, over one while nothing is

One run of a model of 100 million parameters under AdamW (1.2 GB a checkpoint) has both hooks, each with a folder of its
own. Every round saves with both, the other one first each time; ratios are taken within a round, and the table has
their medians. Steps run in as many threads as torch chooses, and writing in one more.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.__main__ import is_cuda, table, verdict
from orbit.core import Plugin
from orbit.plugin import CheckpointingHook
from orbit.trainer import BaseTrainer

WIDTH = 2048
STALL_BAR = 0.1


class Run(BaseTrainer):
    """`layers` square matrices; the hooks only save when they are called."""

    def __init__(self, folder: Path, layers: int, device: str, body: Callable[[Run], None]) -> None:
        super().__init__(1, device=device)
        self.layers, self.body = layers, body
        self.saving = {
            name: CheckpointingHook(
                None, 0, path=folder / name, load=None, exit_signals=[], asynchronous=name == "asynchronous"
            )
            for name in ("synchronous", "asynchronous")
        }

    def build_data_loader(self) -> Any:
        return DataLoader(torch.ones(1, WIDTH))  # type: ignore[arg-type]

    def build_model(self) -> nn.Module:
        return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(self.layers))).to(self.device)

    def build_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def build_hooks(self) -> list[Plugin]:
        return [_Body(self.body), *self.saving.values()]

    def forward(self, input: Any) -> tuple[Tensor, dict[str, Any]]:
        return self.model(input.to(self.device)).square().mean(), {}

    def extra_step(self) -> float:
        """Seconds of one more step, bare."""
        self.settle()
        began = time.perf_counter()
        self.forward(torch.ones(1, WIDTH))[0].backward()
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.settle()
        return time.perf_counter() - began

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class _Body(Plugin):
    def __init__(self, body: Callable[[Run], None]) -> None:
        self.body = body

    def on_after_step(self, trainer: Any) -> None:
        self.body(trainer)


def measure(layers: int, rounds: int, device: str, folder: Path) -> dict[str, list[float]]:
    """Seconds of every stall and step, by kind, a list entry a round."""
    seconds: dict[str, list[float]] = {
        name: [] for name in ("synchronous", "asynchronous", "step", "step beside")
    }

    def rounds_of(run: Run) -> None:
        for turn in range(-1, rounds):  # the first one allocates, and does not count
            for name in ("synchronous", "asynchronous")[:: 1 if turn % 2 else -1]:
                stall, step = _save(run, name)
                if turn >= 0:
                    seconds[name].append(stall)
                    seconds["step beside" if name == "asynchronous" else "step"].append(step)

    Run(folder, layers, device, rounds_of).train()
    return seconds


def _save(run: Run, name: str) -> tuple[float, float]:
    """The loop's wait for a save, and a step's time right after it: while an asynchronous one is under way."""
    hook = run.saving[name]
    hook.acknowledged = None
    run.settle()
    began = time.perf_counter()
    hook.save(run)
    stall = time.perf_counter() - began
    steps = [run.extra_step()]
    while hook.acknowledged is None:
        steps.append(run.extra_step())
    return stall, statistics.median(steps[:-1] or steps)  # the last one may have outlived the write


def report(seconds: dict[str, list[float]], gigabytes: float) -> str:
    rows = [[name, f"{statistics.median(values) * 1e3:.0f}"] for name, values in seconds.items()]
    stall = _ratio(seconds["asynchronous"], seconds["synchronous"])
    step = _ratio(seconds["step beside"], seconds["step"])
    return "\n".join(
        [
            table([f"a checkpoint of {gigabytes:.2f} GB", "ms"], rows),
            verdict("the asynchronous save's stall over the synchronous one's", stall, STALL_BAR),
            f"a step beside the write over one without: {step:.2f}",
        ]
    )


def _ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpointing", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=7, help="saves of each kind (default 7)")
    parser.add_argument("--layers", type=int, default=24, help="of 4.2 million parameters each (default 24)")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    args = parser.parse_args(argv)
    cuda = is_cuda(parser, args.device)
    where = (
        torch.cuda.get_device_name(args.device)
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} thread(s)"
    )
    title = f"{where}; torch {torch.__version__}, Python {platform.python_version()}; {args.rounds} rounds"
    print(title, flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        seconds = measure(args.layers, args.rounds, args.device, Path(name))
    text = report(seconds, args.layers * (WIDTH + 1) * WIDTH * 12 / 1e9)
    print("\n" + text, flush=True)
    if args.out:
        args.out.write_text(f"{title}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
