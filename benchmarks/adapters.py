"""Adapters against PEFT: `make bench-adapters`, or `python -m benchmarks.adapters [--device cuda] [--out table.md]`.

    steps     a training step (forward, backward, fused AdamW), LoRA and DoRA, fp32 and bf16
    least     what no adapter can undercut on this machine: the model without tasks, and the products by A and B alone
    overhead  (ours − frozen) / (PEFT's − frozen), where frozen is forward and backward of the base alone
    memory    peak of a training step above what lay there before it
    saved     bytes that forward keeps for backward: distinct storages, the model's own left out
    rows      one task per row of the batch, 8 tasks, inference, against PEFT's `adapter_names=`: one prefill, or
              32 steps of decoding under one route
    mixed     four tasks trained together, 2 rows of each a batch, against four runs with 2 rows each: PEFT's,
              which cannot mix while it trains, and ours

Every figure is a ratio, ours over PEFT's. Times are interleaved: each round runs every contender once, in an
order that rotates, ratios are taken within a round, and the table has their median. Where other processes
keep the machine busy, `--clock cpu` counts this process's own time. Freed memory is kept (`keep_freed_memory`).
`adapter_pairs.py` says what is timed and checks that both sides do the same work.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.__main__ import CLOCKS, is_cuda, table
from benchmarks.adapter_pairs import (
    ROUNDING,
    Frozen,
    InTurn,
    PeftServing,
    Products,
    Serving,
    Shape,
    Together,
    Training,
    check_same,
    ours,
    pefts,
    training_pair,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Line:
    """One line of the table: a ratio of ours to PEFT's and what it may be at most."""

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


@dataclass(frozen=True)
class Setting:
    """Where and how long to measure."""

    shape: Shape
    device: str
    rounds: int
    clock: Callable[[], float]

    def times(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of every contender in every round, after one round that does not count."""
        order = list(contenders)
        times: dict[str, list[float]] = {name: [] for name in order}
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


def floor(alone: list[float], products: list[float], theirs: list[float]) -> Line:
    """The least that any adapter takes here: the model alone and the products by A and B."""
    least = [a + p for a, p in zip(alone, products, strict=True)]
    return timed("… the least: the model without, and the products by A and B", least, theirs, None)


def steps(setting: Setting, kind: str, step_bars: tuple[float, float]) -> Iterator[Line]:
    base = setting.shape.model(DTYPES[kind], setting.device)
    tokens = setting.shape.tokens(setting.device)
    lora, peft_lora = training_pair(base, tokens)
    dora, peft_dora = training_pair(base, tokens, dora=True)
    t = setting.times(
        {
            "lora": lora,
            "peft lora": peft_lora,
            "frozen": Frozen(base, tokens),
            "products": Products(base, tokens.numel(), 1, backward=True),
            "dora": dora,
            "peft dora": peft_dora,
        }
    )
    frozen, products = t["frozen"], t["products"]
    yield timed(f"LoRA training step, {kind}", t["lora"], t["peft lora"], step_bars[0])
    yield floor(frozen, products, t["peft lora"])
    over = median_ratio(t["lora"], t["peft lora"], frozen)
    detail = f"frozen forward+backward {statistics.median(frozen) * 1e3:.4g} ms"
    yield Line(f"LoRA overhead over the frozen model, {kind}", over, 0.60, detail)
    least = statistics.median(p / (b - f) for p, b, f in zip(products, t["peft lora"], frozen, strict=True))
    detail = f"products {statistics.median(products) * 1e3:.4g} ms"
    yield Line("… the least: the products by A and B", least, None, detail)
    yield timed(f"DoRA training step, {kind}", t["dora"], t["peft dora"], step_bars[1])
    yield floor(frozen, products, t["peft dora"])
    yield timed(f"our DoRA step ÷ our LoRA step, {kind}", t["dora"], t["lora"], 1.12, other="our LoRA")


def fp32(setting: Setting) -> Iterator[Line]:
    yield from steps(setting, "fp32", (0.94, 0.78))


def bf16(setting: Setting) -> Iterator[Line]:
    yield from steps(setting, "bf16", (0.75, 0.52))


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


def saved_bytes(training: Training) -> int:
    """What a forward keeps for its backward: distinct storages, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*training.model.parameters(), *training.model.buffers())}
    kept: dict[int, int] = {}
    held: list[Tensor] = []  # alive until the end, so that no address is used twice

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        training.loss()
    return sum(kept.values())


def mebibytes(measure: str, sizes: list[int], bar: float | None) -> Line:
    mine, theirs = sizes
    return Line(measure, mine / theirs, bar, f"{mine / 2**20:.4g} MiB, PEFT {theirs / 2**20:.4g} MiB")


def memory(setting: Setting) -> Iterator[Line]:
    bars = {("LoRA", "peak"): 0.78, ("DoRA", "saved"): 0.62}
    tokens = setting.shape.tokens(setting.device)
    for kind, dtype in DTYPES.items():
        base = setting.shape.model(dtype, setting.device)
        for method in ("LoRA", "DoRA"):
            mine, theirs = training_pair(base, tokens, dora=method == "DoRA")
            peaks = [peak_bytes(t, setting.device) for t in (mine, theirs)]
            yield mebibytes(
                f"{method} peak memory above the model, {kind}", peaks, bars.get((method, "peak"))
            )
            kept = [saved_bytes(t) for t in (mine, theirs)]
            yield mebibytes(f"{method} bytes saved for backward, {kind}", kept, bars.get((method, "saved")))


def rows(setting: Setting) -> Iterator[Line]:
    """One task per row at inference: the longest and the shortest rows that serving meets."""
    names = [f"task{k}" for k in range(8)]
    for kind, dtype in DTYPES.items():
        base = setting.shape.model(dtype, setting.device)
        mine = ours(base, names).eval()
        theirs = pefts(base, mine, names).eval()
        for what, count, length, bar, repeat in (("prefill", 8, 128, 0.85, 1), ("decode", 32, 1, 0.60, 32)):
            tokens = setting.shape.tokens(setting.device, count, length)
            chosen = [names[row % len(names)] for row in range(count)]

            us = Serving(mine, mine, tokens, chosen, repeat)
            them = PeftServing(theirs, theirs.get_base_model(), tokens, chosen, repeat)  # type: ignore[operator]
            check_same(us(), them(), f"{what} logits", rtol=ROUNDING[dtype])
            none = Serving(mine, mine, tokens, [None], repeat)
            products = Products(base, tokens.numel(), len(names), backward=False)

            def often(products: Products = products, repeat: int = repeat) -> None:
                for _ in range(repeat):
                    products()

            t = setting.times({"us": us, "them": them, "none": none, "products": often})
            measure = f"one task per row, {len(names)} tasks, {what} {count}x{length}, {kind}"
            yield timed(measure, t["us"], t["them"], bar)
            yield floor(t["none"], t["products"], t["them"])


def mixed(setting: Setting) -> Iterator[Line]:
    """Four tasks trained in one batch, against one run for each, of PEFT's and of ours."""
    tasks, each = 4, 2
    for kind, dtype in DTYPES.items():
        base = setting.shape.model(dtype, setting.device)
        for length in (setting.shape.length, 32):
            tokens = setting.shape.tokens(setting.device, each * tasks, length)
            pairs = [training_pair(base, part) for part in tokens.split(each)]
            together = Together(base, [mine for mine, _ in pairs], tokens)
            alone = torch.stack([mine.loss() for mine, _ in pairs]).mean()
            check_same(together(), alone, "loss of the mixed batch", rtol=ROUNDING[dtype])
            contenders: dict[str, Callable[[], object]] = {
                "together": together,
                "separate": InTurn([mine for mine, _ in pairs]),
                "peft": InTurn([theirs for _, theirs in pairs]),
                "frozen": Frozen(base, tokens),
                "products": Products(base, tokens.numel(), tasks, backward=True),
            }
            t = setting.times(contenders)
            measure = f"{tasks} tasks in mixed batches ÷ {tasks} runs, {each}x{length} each, {kind}"
            yield timed(measure, t["together"], t["peft"], 0.77)
            yield floor(t["frozen"], t["products"], t["peft"])
            yield timed(f"{measure}, both ours", t["together"], t["separate"], None, other="separate")


GROUPS: dict[str, Callable[[Setting], Iterator[Line]]] = {
    "fp32": fp32,
    "bf16": bf16,
    "memory": memory,
    "rows": rows,
    "mixed": mixed,
}
HEAD = ("measure", "ours ÷ PEFT", "at most", "", "medians")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--rounds", type=int, default=9, help="how often each contender runs (default 9)")
    parser.add_argument(
        "--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="run these groups alone"
    )
    parser.add_argument(
        "--layers", type=int, default=Shape.layers, help=f"of the model (default {Shape.layers})"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall (default) or cpu time")
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    args = parser.parse_args(argv)
    cuda = is_cuda(parser, args.device)
    if args.rounds < 1 or args.layers < 1:
        parser.error(f"--rounds {args.rounds} --layers {args.layers}: both are at least 1")

    import peft
    import transformers

    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    where = torch.cuda.get_device_name(args.device) if cuda else f"{cpu_name()}, 1 thread"
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}, "
        f"Python {platform.python_version()}"
    )
    shape = Shape(layers=args.layers)
    setting = Setting(shape, args.device, args.rounds, CLOCKS[args.clock])
    title = (
        f"{where}; {versions}; {args.clock} clock, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}; {shape}"
    )
    print(title, flush=True)
    lines = []
    for group in args.only:
        for line in GROUPS[group](setting):
            lines.append(line)
            print("  ".join(line.cells()), flush=True)
        gc.collect()
    text = table(HEAD, [line.cells() for line in lines])
    print("\n" + text, flush=True)
    if args.out:
        args.out.write_text(f"{title}\n\n{text}\n", encoding="utf-8")


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for us and for PEFT, as CUDA's allocator does.

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


if __name__ == "__main__":
    main()
