"""Muon against AdamW on a small decoder: `make bench-muon`, or `python -m benchmarks.muon [--out benchmarks/muon.md]`.

How many of AdamW's steps does Muon need to come to AdamW's final loss? Both train the same decoder on bytes of real
English (`examples/data`, the texts of `train`) with the same batches, schedule and length. The schedule warms up in a
fifth of the run and then falls linearly to zero: with a twentieth AdamW loses 0.05 nats, and its best rates with it.
Its betas (0.9, 0.95) were the best of four pairs. Each is tuned over a range of learning rates of its own, equally many
at equal distances, by the final loss on held-out texts of one seed; what is compared is the mean over seeds at the best
rate of each. Muon's matrices are those that `Muon.for_model` finds, and the rest trains with AdamW's own best rate.
Times are not taken.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.__main__ import table, verdict
from orbit.core import seed_everything
from orbit.engine import Engine
from orbit.model import Transformer, TransformerConfig
from orbit.optim import Muon

BAR = 0.9
TEXTS = Path(__file__).parents[1] / "examples/data"
ROWS, LENGTH = 16, 64
ADAMW_LRS = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
MUON_LRS = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
WEIGHT_DECAY = 0.1
EVALUATIONS = 30  # in a run
Maker = Callable[[nn.Module], torch.optim.Optimizer]


def texts(split: str) -> Tensor:
    """The bytes of all texts of a split, in an order that mixes their kinds; (n,), one a token."""
    found: list[str] = []
    for kind in ("facts", "chat", "verse"):
        lines = (TEXTS / f"{kind}.jsonl").read_text("utf-8").splitlines()
        found += [entry["text"] for entry in map(json.loads, lines) if entry["split"] == split]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).tolist()
    return torch.tensor(list("\n\n".join(found[i] for i in order).encode()), dtype=torch.long)


def decoder() -> nn.Module:
    return Transformer(TransformerConfig(vocab_size=256, hidden_size=64, num_layers=3, num_heads=4))


def loss_of(model: nn.Module, rows: Tensor) -> Tensor:
    """Mean cross-entropy of the next byte; rows (B, T + 1)."""
    return F.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())


def batches(tokens: Tensor, count: int, seed: int) -> list[Tensor]:
    """(B, T + 1) pieces from anywhere in the text."""
    made = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - LENGTH - 1, (count, ROWS), generator=made)
    return [tokens[start[:, None] + torch.arange(LENGTH + 1)] for start in starts]


def curve(optimizer_of: Maker, steps: int, seed: int) -> list[float]:
    """Loss on held-out texts after each of `EVALUATIONS` equal parts of a run."""
    seed_everything(seed)
    model = decoder()
    optimizer = optimizer_of(model)
    warm = max(1, steps // 5)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    engine = Engine(model, optimizer, scheduler=schedule, plugins=[], grad_clip_norm=1.0, device="cpu")
    held_out = batches(texts("held out"), 16, seed=0)
    losses: list[float] = []
    for _ in engine.train(batches(texts("train"), steps, seed + 1), num_epochs=1):
        engine.update(lambda: loss_of(engine.model, engine.batch))
        if engine.step * EVALUATIONS // steps > len(losses):
            for _ in engine.eval(held_out):
                engine.update(lambda: loss_of(engine.model, engine.batch))
            losses.append(engine.metrics["val_loss"])
    return losses


def adamw(lr: float) -> Maker:
    return lambda model: torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )


def muon(lr: float, adamw_lr: float) -> Maker:
    return lambda model: Muon.for_model(
        model, lr=lr, adamw_lr=adamw_lr, weight_decay=WEIGHT_DECAY, adamw_weight_decay=WEIGHT_DECAY
    )


def tuned(
    optimizer_of: Callable[[float], Maker], rates: tuple[float, ...], steps: int
) -> dict[float, list[float]]:
    """Rate → the curve of its run of seed 0."""
    curves = {}
    for lr in rates:
        curves[lr] = curve(optimizer_of(lr), steps, seed=0)
        print(f"  lr {lr:g}: {curves[lr][-1]:.4f}", flush=True)
    return curves


def of_seeds(first: list[float], optimizer_of: Maker, steps: int, seeds: int) -> list[float]:
    """The mean of the curve of seed 0 and those of further seeds, each with weights and batches of its own."""
    runs = [first, *(curve(optimizer_of, steps, seed) for seed in range(1, seeds))]
    print(f"  of seeds: {', '.join(f'{run[-1]:.4f}' for run in runs)}", flush=True)
    return [statistics.fmean(losses) for losses in zip(*runs, strict=True)]


def best(curves: dict[float, list[float]]) -> float:
    return min(curves, key=lambda lr: curves[lr][-1])


def reached(losses: list[float], target: float) -> float | None:
    """The part of the run after which the loss is at most `target`, between evaluations on a straight line."""
    for index, loss in enumerate(losses):
        if loss <= target:
            before = losses[index - 1] if index else loss
            part = 1.0 if before == loss else (before - target) / (before - loss)
            return (index + part) / len(losses)
    return None


def drawn(curves: dict[str, list[float]], target: float, height: int = 14) -> str:
    """The curves in characters, without the first tenth; `-` is the target."""
    marks = dict(zip(curves, "ao", strict=True))
    tails = {name: losses[len(losses) // 10 :] for name, losses in curves.items()}
    low, high = min(map(min, tails.values())), max(map(max, tails.values()))
    grid = [[" "] * len(next(iter(tails.values()))) * 2 for _ in range(height)]

    def row(loss: float) -> int:
        return round((high - loss) / (high - low) * (height - 1))

    grid[row(target)] = ["-"] * len(grid[0])
    for name, losses in tails.items():
        for column, loss in enumerate(losses):
            grid[row(loss)][2 * column] = marks[name]
    names = ", ".join(f"{mark} {name}" for name, mark in marks.items())
    labels = [f"{high - (high - low) * i / (height - 1):5.2f} |" for i in range(height)]
    lines = [label + "".join(cells) for label, cells in zip(labels, grid, strict=True)]
    return "\n".join(["```", *lines, f"      {names}; the last nine tenths of the run", "```"])


def report(tried: dict[str, dict[float, list[float]]], winners: dict[str, list[float]], steps: int) -> str:
    target = winners["AdamW"][-1]
    part = reached(winners["Muon"], target)
    rates = [
        [f"{name}, best lr {best(curves):g}", *(f"{lr:g}: {losses[-1]:.3f}" for lr, losses in curves.items())]
        for name, curves in tried.items()
    ]
    every = EVALUATIONS // 10
    course = [
        [str((i + 1) * steps // EVALUATIONS), *(f"{losses[i]:.3f}" for losses in winners.values())]
        for i in range(every - 1, EVALUATIONS, every)
    ]
    return "\n\n".join(
        [
            table(["held-out loss of seed 0, nats a byte", *["lr: loss"] * len(rates[0][1:])], rates),
            table(["step, mean over seeds", *winners], course),
            drawn(winners, target),
            verdict(
                f"part of AdamW's {steps} steps after which Muon has AdamW's final loss of {target:.3f}",
                float("inf") if part is None else part,
                BAR,
            ),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.muon", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of a run (default 400, at least 30)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of the best rate (default 3)")
    parser.add_argument("--rates", type=int, default=5, help="rates of each optimizer (default 5)")
    parser.add_argument("--out", type=Path, help="also write the table to this markdown file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    size = sum(p.numel() for p in decoder().parameters())
    title = (
        f"A decoder of {size:,} parameters, {args.steps} steps of {ROWS} rows of {LENGTH} bytes, {args.seeds} seeds; "
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()} CPU"
    )
    print(title, flush=True)
    makers: dict[str, tuple[Callable[[float], Maker], tuple[float, ...]]] = {
        "AdamW": (adamw, ADAMW_LRS),
        "Muon": (lambda lr: muon(lr, best(tried["AdamW"])), MUON_LRS),
    }
    tried: dict[str, dict[float, list[float]]] = {}
    winners: dict[str, list[float]] = {}
    for name, (maker, rates) in makers.items():
        print(name, flush=True)
        tried[name] = tuned(maker, rates[: args.rates], args.steps)
        lr = best(tried[name])
        winners[name] = of_seeds(tried[name][lr], maker(lr), args.steps, args.seeds)
    text = report(tried, winners, args.steps)
    print("\n" + text, flush=True)
    if args.out:
        args.out.write_text(f"{title}\n\n{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
