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

Every figure is a ratio, ours over PEFT's, taken as `measuring.py` says. `adapter_pairs.py` says what is timed and
checks that both sides do the same work.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

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
from benchmarks.measuring import (
    DTYPES,
    Groups,
    Line,
    Setting,
    measure,
    mebibytes,
    median_ratio,
    peak_bytes,
    timed,
)

DECODED = 32  # steps of one decoding


def floor(alone: list[float], products: list[float], theirs: list[float]) -> Line:
    """The least that any adapter takes here: the model alone and the products by A and B."""
    least = [a + p for a, p in zip(alone, products, strict=True)]
    return timed("… the least: the model without, and the products by A and B", least, theirs, None)


def steps(setting: Setting[Shape], kind: str, step_bars: tuple[float, float]) -> Iterator[Line]:
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


def fp32(setting: Setting[Shape]) -> Iterator[Line]:
    yield from steps(setting, "fp32", (0.94, 0.78))


def bf16(setting: Setting[Shape]) -> Iterator[Line]:
    yield from steps(setting, "bf16", (0.75, 0.52))


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


def memory(setting: Setting[Shape]) -> Iterator[Line]:
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


def rows(setting: Setting[Shape]) -> Iterator[Line]:
    """One task per row at inference: the longest and the shortest rows that serving meets."""
    names = [f"task{k}" for k in range(8)]
    for kind, dtype in DTYPES.items():
        base = setting.shape.model(dtype, setting.device)
        mine = ours(base, names).eval()
        theirs = pefts(base, mine, names).eval()
        for what, count, length, bar, repeat in (
            ("prefill", 8, 128, 0.85, 1),
            ("decode", 32, 1, 0.60, DECODED),
        ):
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


def mixed(setting: Setting[Shape]) -> Iterator[Line]:
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


GROUPS: Groups[Shape] = {
    "fp32": fp32,
    "bf16": bf16,
    "memory": memory,
    "rows": rows,
    "mixed": mixed,
}


def main(argv: list[str] | None = None) -> None:
    measure("python -m benchmarks.adapters", __doc__.split("\n")[0], GROUPS, Shape, argv)


if __name__ == "__main__":
    main()
