"""Train a small decoder on real English with Muon, letter by letter, and let it write.

    python examples/05_language_model.py                     # what ships here: prose and verses, two minutes
    python examples/05_language_model.py --moe               # a mixture of four experts in place of each MLP
    python examples/05_language_model.py --optimizer adamw   # the same run without Muon, to compare
    python examples/05_language_model.py kjv.txt             # any text files of yours

A longer text that installs offline, the King James Version (public domain):

    apt-get install bible-kjv
    bible -l100000 gen1:1-rev22:21 < /dev/null > kjv.txt

A tenth of the text is held out. Tokens are bytes, so there is no tokenizer to fetch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

import orbit.demo
from orbit import Engine, seed_everything
from orbit.model import Transformer, TransformerConfig
from orbit.optim import Muon
from orbit.plugin import Warmup

ROWS, LENGTH = 16, 64


def shipped() -> str:
    """The demo's prose (Jane Austen) and the verses of examples/03."""
    files = [
        Path(orbit.demo.__file__).with_name("prose.jsonl"),
        Path(__file__).with_name("data") / "verse.jsonl",
    ]
    lines = [line for file in files for line in file.read_text("utf-8").splitlines()]
    return "\n".join(json.loads(line)["text"] for line in lines)


def batches(tokens: Tensor, count: int, rows: int = ROWS) -> list[dict[str, Tensor]]:
    """Pieces (rows, LENGTH) from anywhere in the text; the model shifts the labels itself."""
    starts = torch.randint(0, len(tokens) - LENGTH, (count, rows))
    pieces = [tokens[start[:, None] + torch.arange(LENGTH)] for start in starts]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def main(
    files: list[Path], steps: int = 400, width: int = 64, moe: bool = False, optimizer: str = "muon"
) -> float:
    """The loss on the text held out, in nats a byte."""
    seed_everything(42)
    text = "\n".join(file.read_text("utf-8") for file in files) if files else shipped()
    tokens = torch.tensor(list(text.encode()), dtype=torch.long)
    train, held_out = tokens[: -len(tokens) // 10], tokens[-len(tokens) // 10 :]
    if len(held_out) <= LENGTH:
        raise ValueError(
            f"{len(tokens)} bytes are too few to hold out a tenth of: give {20 * LENGTH} at least"
        )

    model = Transformer(
        TransformerConfig(
            vocab_size=256,
            hidden_size=width,
            num_layers=3,
            num_heads=4,
            num_experts=4 if moe else None,
        )
    )
    chosen: torch.optim.Optimizer
    if optimizer == "muon":
        chosen = muon = Muon.for_model(model, lr=0.02, adamw_lr=4e-3)
        assert muon.report is not None
        print(f"{len(muon.report.muon)} parameters with Muon, {len(muon.report.adamw)} with AdamW")
    else:
        chosen = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.1)

    engine = Engine(
        model,
        chosen,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(chosen, T_max=steps),
        plugins=[Warmup(warmup_steps=max(1, steps // 20))],
        grad_clip_norm=1.0,
    )
    test = batches(held_out, 8)
    for _ in engine.train(batches(train, steps)):
        engine.auto_update()
        if engine.step % max(1, steps // 8) == 0:
            loss = engine.step_info["loss"]
            for _ in engine.eval(test):
                engine.auto_update()
            print(f"step {engine.step:5d}  loss {loss:.3f}  held out {engine.metrics['val_loss']:.3f}")

    prompt = torch.tensor([list(b"And the ")], device=engine.device)
    written = model.generate(prompt, max_new_tokens=160, temperature=0.7, top_k=40)
    print("\n" + bytes(written[0].tolist()).decode(errors="replace"))
    return engine.metrics["val_loss"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small decoder on English text.")
    parser.add_argument("files", type=Path, nargs="*", help="text files; default: what ships here")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--moe", action="store_true", help="a mixture of experts in place of each MLP")
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    given = parser.parse_args()
    main(given.files, given.steps, given.width, given.moe, given.optimizer)
