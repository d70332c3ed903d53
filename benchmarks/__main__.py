"""Loop overhead per step: `make bench`, or `python -m benchmarks [--device cuda] [--out table.md]`.

1. On a model with one parameter a training step is nearly all loop. Overhead is a contender's time per step
   minus the bare PyTorch loop's. The bar: ours is at most 0.6 of the best rival's.
2. On a model with 10 million parameters it should vanish. The bar: ours is at most 1.02 of the bare loop's
   time in the quietest quarter of the rounds of each: a step of 60 ms is long enough for other processes to
   get into most rounds, and they only ever add time. The bare loop runs twice: what it differs from itself is
   noise, and a bar that is missed by less than that is called undecided.

Contenders are interleaved: every round runs each of them once, starting with another one each time. Figures
are medians over rounds where nothing else is said, and differences and ratios are taken within a round, so a
machine that slows down for a while slows all of them. Where it is busy all the time, `--clock cpu` counts the
process's own time in place of the wall's. `workload.py` says what is timed, `contenders.py` who competes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.contenders import OURS, RIVALS, Contender, bare
from benchmarks.workload import Job, Workload, one_parameter, ten_million_parameters

OVERHEAD_BAR = 0.6
STEP_BAR = 1.02
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Times = dict[str, list[float]]


def check_same_work(name: str, job: Job, reference: Job) -> None:
    """AssertionError unless both runs ended at the same weights after the same number of batches."""
    assert len(job.batches.moments) == 2, f"{name} stopped after {job.batches.fetched} of {job.steps} batches"
    for (path, p), q in zip(job.model.named_parameters(), reference.model.parameters(), strict=True):
        if not torch.allclose(p, q, rtol=1e-5, atol=1e-7):
            raise AssertionError(
                f"{name} did other work than the bare loop: {path} differs by {(p - q).abs().max()}"
            )


def run(contender: Contender, job: Job) -> None:
    """Train, with whatever the loop prints kept out of the tables."""
    with contextlib.redirect_stdout(io.StringIO()):
        contender(job)


def measure(workload: Workload, contenders: dict[str, Contender], rounds: int) -> Times:
    """Seconds per step of every contender in every round; one whose package is missing is left out, aloud."""
    times: Times = {}
    reference = workload.job()
    bare(reference)
    for name, contender in contenders.items():  # a first run of each, to import, warm up and compare results
        job = workload.job()
        try:
            run(contender, job)
        except ModuleNotFoundError as missing:
            print(f"left out: {name} ({missing})", file=sys.stderr)
            continue
        check_same_work(name, job, reference)
        times[name] = []
    order = list(times)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            gc.collect()
            job = workload.job()
            run(contenders[name], job)
            times[name].append(job.batches.seconds_per_step)
    return times


def paired(times: Times, name: str, base: str = "bare loop") -> tuple[float, float]:
    """Medians over rounds of the difference to `base`, in seconds, and of the ratio to it."""
    pairs = list(zip(times[name], times[base], strict=True))
    return statistics.median(a - b for a, b in pairs), statistics.median(a / b for a, b in pairs)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Markdown that also reads well on a terminal: the first column left, the others right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    first, rest = slice(0, 1), slice(1, None)
    cells = [
        [c.ljust(w) for c, w in zip(line[first], widths[first], strict=True)]
        + [c.rjust(w) for c, w in zip(line[rest], widths[rest], strict=True)]
        for line in lines
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def verdict(what: str, value: float, bar: float, noise: float = 0.0) -> str:
    word = "kept" if value <= bar else "undecided, too noisy here" if value - noise <= bar else "MISSED"
    return f"{what}: {value:.3f}, bar {bar:.2f}: {word}"


def quiet(seconds: list[float]) -> float:
    """Mean over the fastest quarter of the rounds."""
    return statistics.mean(sorted(seconds)[: max(1, len(seconds) // 4)])


def report_overhead(times: Times) -> str:
    over = {name: paired(times, name)[0] for name in times if name != "bare loop"}
    rivals = {name: value for name, value in over.items() if name in RIVALS}
    best = min(rivals, key=lambda name: rivals[name]) if rivals else None
    rows = [
        [
            name,
            f"{statistics.median(values) * 1e6:.0f}",
            f"{over[name] * 1e6:.0f}" if name in over else "",
            f"{over[name] / over[best]:.2f}" if best and name in over else "",
        ]
        for name, values in times.items()
    ]
    text = table(["one parameter", "µs/step", "overhead µs", "of the best rival"], rows)
    for name in times:
        if name in OURS and best:
            text += "\n" + verdict(f"{name}'s overhead over {best}'s", over[name] / over[best], OVERHEAD_BAR)
    return text


def report_steps(times: Times) -> str:
    ratio = {name: quiet(values) / quiet(times["bare loop"]) for name, values in times.items()}
    noise = abs(ratio.get("bare loop again", 1.0) - 1.0)
    rows = [
        [
            name,
            f"{statistics.median(values) * 1e3:.2f}",
            f"{paired(times, name)[1]:.3f}",
            f"{quiet(values) * 1e3:.2f}",
            f"{ratio[name]:.3f}",
        ]
        for name, values in times.items()
    ]
    head = ["10 million parameters", "ms/step", "of the bare loop", "quiet ms/step", "of the bare loop"]
    text = table(head, rows)
    for name in times:
        if name in OURS:
            text += "\n" + verdict(f"{name}'s step over the bare loop's", ratio[name], STEP_BAR, noise)
    return text


def is_cuda(parser: argparse.ArgumentParser, device: str) -> bool:
    """Is this a CUDA device? The parser's error if torch sees none."""
    cuda = device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        parser.error(f"--device {device}: torch {torch.__version__} sees no CUDA device; use --device cpu")
    return cuda


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=15, help="how often each contender runs (default 15)")
    parser.add_argument("--steps", type=int, default=1000, help="steps of a one-parameter run (default 1000)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default) or cpu time")
    parser.add_argument("--out", type=Path, help="also write the tables to this markdown file")
    args = parser.parse_args(argv)
    cuda = is_cuda(parser, args.device)

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # rivals warn about worker counts and the like
    where = torch.cuda.get_device_name(args.device) if cuda else f"{platform.machine()} CPU, 1 thread"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    title = f"{where}; {versions}; {args.clock} clock, {args.rounds} rounds"
    print(title, flush=True)

    place = {"device": args.device, "clock": CLOCKS[args.clock]}
    small = Workload("one parameter", one_parameter, (1, 1), args.steps, args.steps // 10, **place)
    overhead = report_overhead(measure(small, {"bare loop": bare, **OURS, **RIVALS}, args.rounds))
    print("\n" + overhead, flush=True)

    steps = 300 if cuda else 12  # few on a CPU: short runs, closely interleaved, are the more alike
    large = Workload("10 million", ten_million_parameters, (32, 1600), steps, steps // 4, **place)
    step = report_steps(measure(large, {"bare loop": bare, "bare loop again": bare, **OURS}, 3 * args.rounds))
    print("\n" + step, flush=True)
    if args.out:
        args.out.write_text(f"{title}\n\n{overhead}\n\n{step}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
