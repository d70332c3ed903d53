"""The loops that are measured. Each trains `job` to its end, and all do the same work on every step:
forward, MSE, backward, clip the gradient's norm at 1.0, AdamW, a scheduler, zero the gradients.

Rivals are set up as their manuals say, with everything optional switched off: progress bars, loggers,
checkpoints, model summaries, metrics. That favours them. Ours run as they come, with whatever `Engine(...)`
and `BaseTrainer(...)` switch on by themselves.

Packages are imported inside the functions, so that one that is missing takes out one contender only.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.workload import CLIP, Batch, Job, first


def bare(job: Job) -> None:
    for x, y in job.loader:
        loss = job.criterion(job.model(x), y)
        loss.backward()
        nn.utils.clip_grad_norm_(job.model.parameters(), CLIP)
        job.optimizer.step()
        job.scheduler.step()
        job.optimizer.zero_grad()


def engine(job: Job) -> None:
    from orbit.engine import Engine

    run = Engine(
        job.model,
        optimizer=job.optimizer,
        criterion=job.criterion,
        scheduler=job.scheduler,
        grad_clip_norm=CLIP,
        device=job.device,
    )
    for _ in run.train(job.loader, num_epochs=1):
        run.auto_update()


def base_trainer(job: Job) -> None:
    from orbit.trainer import BaseTrainer

    class Trainer(BaseTrainer):
        def build_data_loader(self) -> Any:
            return job.loader

        def build_model(self) -> nn.Module:
            return job.model

        def build_optimizer(self) -> torch.optim.Optimizer:
            return job.optimizer

        def build_lr_scheduler(self) -> torch.optim.lr_scheduler.LRScheduler:
            return job.scheduler

        def forward(self, input: Batch) -> tuple[Tensor, dict[str, Any]]:
            x, y = input
            return job.criterion(self.model(x), y), {}

    Trainer(max_steps=job.steps, grad_clip=CLIP, device=job.device).train()


def accelerate(job: Job) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=job.device == "cpu")
    model, optimizer, loader, scheduler = accelerator.prepare(
        job.model, job.optimizer, job.loader, job.scheduler
    )
    for x, y in loader:
        loss = job.criterion(model(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


class WithLoss(nn.Module):
    """transformers.Trainer wants keyword arguments and a loss among the outputs."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.model, self.criterion = job.model, job.criterion

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.criterion(self.model(x), y)}


def keyed(items: list[Batch]) -> dict[str, Tensor]:
    return dict(zip(("x", "y"), first(items), strict=True))


def transformers_trainer(job: Job) -> None:
    from transformers import PrinterCallback, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            max_steps=job.steps,
            per_device_train_batch_size=1,
            max_grad_norm=CLIP,
            use_cpu=job.device == "cpu",
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            logging_nan_inf_filter=False,
            save_strategy="no",
            eval_strategy="no",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(
            WithLoss(job),
            args,
            train_dataset=job.batches,
            data_collator=keyed,
            optimizers=(job.optimizer, job.scheduler),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def lightning(job: Job) -> None:
    from lightning import pytorch as pl

    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)  # it prints at every fit

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = job.model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            x, y = batch
            loss: Tensor = job.criterion(self.model(x), y)
            return loss

        def configure_optimizers(self) -> dict[str, Any]:
            schedule = {"scheduler": job.scheduler, "interval": "step"}
            return {"optimizer": job.optimizer, "lr_scheduler": schedule}

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="gpu" if job.device.startswith("cuda") else "cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=CLIP,
            logger=False,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(), job.loader)


Contender = Callable[[Job], None]

OURS: dict[str, Contender] = {"orbit Engine": engine, "orbit BaseTrainer": base_trainer}
RIVALS: dict[str, Contender] = {
    "accelerate": accelerate,
    "transformers.Trainer": transformers_trainer,
    "Lightning Trainer": lightning,
}
