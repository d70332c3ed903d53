"""How we are measured beside others: interleaved rounds, lines of a table, peaks of memory, the command line.

Every figure is a ratio, ours over theirs. Times are interleaved: each round runs every contender once, in an
order that rotates, ratios are taken within a round, and the table has their median. Where other processes
keep the machine busy, `--clock cpu` counts this process's own time. Freed memory is kept (`keep_freed_memory`).
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import torch

from benchmarks.__main__ import CLOCKS, is_cuda, table

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Line:
    """One line of the table: a ratio of ours to theirs and what it may be at most."""

    measure: str
    ratio: float
    bar: float | None
    detail: str

    def cells(self) -> list[str]:
        met = "" if self.bar is None else "met" if self.ratio <= self.bar else "MISSED"
        return [
            self.measure,
            f"{self.ratio:.3f}",
            "" if self.bar is None else f"{self.bar:.2f}",
            met,
            self.detail,
        ]


Shape = TypeVar("Shape")  # a dataclass of whole numbers: how large the things are that a benchmark measures


@dataclass(frozen=True)
class Setting(Generic[Shape]):
    """What, where and how long to measure."""

    shape: Shape
    device: str
    rounds: int
    clock: Callable[[], float]

    def times(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every contender in every round, after one round that does not count."""
        order = list(contenders)
        times: dict[str, list[float]] = {name: [] for name in order}
        gc.collect()
        gc.freeze()  # what lies there now is not looked through again before each run
        try:
            for turn in range(-1, self.rounds):
                first = turn % len(order)
                for name in order[first:] + order[:first]:
                    gc.collect()
                    self.settle()
                    start = self.clock()
                    contenders[name]()
                    self.settle()
                    if turn >= 0:
                        times[name].append(self.clock() - start)
        finally:
            gc.unfreeze()
        return times

    def settle(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def median_ratio(mine: list[float], theirs: list[float], floor: list[float] | None = None) -> float:
    """Median over rounds of mine/theirs, both above the floor if there is one."""
    floors = floor or [0.0] * len(mine)
    return statistics.median((a - f) / (b - f) for a, b, f in zip(mine, theirs, floors, strict=True))


def timed(
    measure: str, mine: list[float], theirs: list[float], bar: float | None, other: str = "PEFT"
) -> Line:
    a, b = statistics.median(mine) * 1e3, statistics.median(theirs) * 1e3
    return Line(measure, median_ratio(mine, theirs), bar, f"{a:.4g} ms, {other} {b:.4g} ms")


def peak_bytes(run: Callable[[], object], device: str) -> int:
    """The most that lay allocated at any moment of `run`, above what lay there at its start."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    assert peak > 0, "the profiler saw no allocation"
    return peak


def mebibytes(measure: str, sizes: list[int], bar: float | None) -> Line:
    mine, theirs = sizes
    return Line(measure, mine / theirs, bar, f"{mine / 2**20:.4g} MiB, PEFT {theirs / 2**20:.4g} MiB")


Groups: TypeAlias = "Mapping[str, Callable[[Setting[Shape]], Iterator[Line]]]"


def measure(
    prog: str,
    description: str,
    groups: Groups[Shape],
    shape: type[Shape],
    argv: list[str] | None,
    rival: str = "PEFT",
    packages: Sequence[str] = ("torch", "transformers", "peft"),
) -> None:
    """Measure groups of lines as the command line says, print their table and write it where asked.

    Every field of `shape` is an option of the command line; `packages` are those whose version the title names.
    """
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=9, help="how often each contender runs (default 9)")
    parser.add_argument(
        "--only", nargs="+", choices=groups, default=list(groups), help="run these groups alone"
    )
    sizes: list[Any] = list(fields(shape))  # type: ignore[arg-type]
    for size in sizes:
        parser.add_argument(
            f"--{size.name}", type=int, default=size.default, help=f"(default {size.default})"
        )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default) or cpu time")
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    args = parser.parse_args(argv)
    cuda = is_cuda(parser, args.device)
    chosen = {size.name: getattr(args, size.name) for size in sizes}
    for name, number in {"rounds": args.rounds, **chosen}.items():
        if number < 1:
            parser.error(f"--{name} {number}: must be at least 1")

    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name(args.device) if cuda else f"{cpu_name()}, 1 thread"
    versions = ", ".join([*(f"{p} {version(p)}" for p in packages), f"Python {platform.python_version()}"])
    setting = Setting(shape(**chosen), args.device, args.rounds, CLOCKS[args.clock])
    title = (
        f"{where}; {versions}; {args.clock} clock, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}; "
        f"{setting.shape}"
    )
    print(title, flush=True)
    lines = []
    for group in args.only:
        for line in groups[group](setting):
            lines.append(line)
            print("  ".join(line.cells()), flush=True)
        gc.collect()
    head = ("measure", f"ours ÷ {rival}", "at most", "", "medians")
    text = table(head, [line.cells() for line in lines])
    print("\n" + text, flush=True)
    if args.out:
        args.out.write_text(f"{title}\n\n{text}\n", encoding="utf-8")


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for us and for others, as CUDA's allocator does.

    By default glibc gives blocks of over 32 MiB back at once, and the kernel zeroes them anew page by page: of a
    large batch's step a tenth, which has nothing to do with adapters. Where the C library is another, nothing is done.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for option in (-1, -2, -3):  # M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
            libc.mallopt(option, 2**30)


def cpu_name() -> str:
    """As the system calls it."""
    info = Path("/proc/cpuinfo")
    found = [s for s in info.read_text().splitlines() if s.startswith("model name")] if info.exists() else []
    return found[0].split(":", 1)[1].strip() if found else f"{platform.machine()} CPU"
