"""The driver `orbit`: our own training core, by `Engine`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from orbit.core.rng import seed_everything
from orbit.engine import Engine
from orbit.pipeline.arguments import Arguments
from orbit.pipeline.folder import RunFolder
from orbit.plugin import CheckpointingHook, MetricsFile, ProgressHook


def fit(
    model: nn.Module, objective: Any, train: Any, collate: Any, arguments: Arguments, folder: RunFolder
) -> dict[str, float]:
    """Train `model` by `objective` on the dataset `train`. Returns the last metrics."""
    from transformers import get_scheduler

    loader: DataLoader[Any] = DataLoader(
        train, batch_size=arguments.per_device_train_batch_size, shuffle=True, collate_fn=collate
    )
    windows = -(-len(loader) // arguments.gradient_accumulation_steps)
    steps = arguments.max_steps if arguments.max_steps > 0 else round(windows * arguments.num_train_epochs)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=arguments.learning_rate,
        betas=(arguments.adam_beta1, arguments.adam_beta2),
        eps=arguments.adam_epsilon,
        weight_decay=arguments.weight_decay,
    )
    warmup = arguments.warmup_steps or round(arguments.warmup_ratio * steps)
    scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, warmup, steps)
    engine = Engine(
        model,
        optimizer,
        scheduler=scheduler,
        plugins=[
            ProgressHook(interval=arguments.logging_steps),
            MetricsFile(folder.metrics),
            CheckpointingHook(interval=None, every_epoch=True, path=folder.checkpoints.absolute()),
        ],
        mixed_precision="bf16" if arguments.bf16 else "fp16" if arguments.fp16 else None,
        grad_clip_norm=arguments.max_grad_norm or None,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
    )
    seed_everything(arguments.seed)
    with engine:
        for _ in engine.train(loader, num_epochs=-(-steps // windows), max_steps=steps):
            engine.step_on(objective(engine.model, engine.data))
    return {name: float(value) for name, value in engine.metrics.items()}
