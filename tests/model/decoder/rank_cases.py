"""What `test_ranks.py` runs on every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.data import DataLoader

from orbit.core import runtime
from orbit.data import SFTCollator
from orbit.engine import Engine
from orbit.model import Transformer, TransformerConfig
from orbit.utils import train_sft

PADDING = SimpleNamespace(pad_token_id=0, eos_token_id=1)  # all of a tokenizer that a collator asks for


def samples() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(5)
    ids = [torch.randint(1, 28, (length,), generator=draw) for length in (5, 9, 7, 12, 6, 8, 11, 4)]
    return [{"input_ids": row, "labels": row.masked_fill(torch.arange(len(row)) < 2, -100)} for row in ids]


def train(parallel: str | None, tied: bool, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The whole parameters after two epochs."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "init_std": 0.2, **settings}
    model = Transformer(TransformerConfig(28, **sizes, tie_embeddings=tied))
    loader = DataLoader(samples(), batch_size=4 // runtime.world_size(), collate_fn=SFTCollator(PADDING))
    engine = Engine(
        model, torch.optim.SGD(model.parameters(), lr=0.5), plugins=[], device="cpu", parallel=parallel
    )
    for _ in engine.train(loader, num_epochs=2):
        train_sft(engine)
    parts = engine.unwrapped_model.named_parameters()
    return {name: getattr(part, "full_tensor", lambda part=part: part)().detach() for name, part in parts}
