"""What the run stands on: devices, number formats, ranks, and the wrappers around a model."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn

PRECISIONS = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def resolve_device(device: torch.device | str | int | None, model: nn.Module | None = None) -> torch.device:
    """The device to train on.

    None means: where `model` is, if it already is on an accelerator; else CUDA when there is one, else the CPU.

    Raises:
        ValueError: the device does not exist here; the message names `device="cpu"`.
    """
    if device is None:
        placed = next((p.device for p in model.parameters()), None) if model is not None else None
        if placed is not None and placed.type not in ("cpu", "meta"):
            return placed
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        resolved = torch.device(device) if not isinstance(device, int) else torch.device("cuda", device)
    except RuntimeError as error:
        raise ValueError(f'device={device!r} names no device: use "cuda", "cuda:0", "cpu" …') from error
    if resolved.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            raise ValueError(f'device={device!r} but PyTorch sees no CUDA device here; pass device="cpu"')
        if resolved.index is not None and resolved.index >= count:
            raise ValueError(
                f'device={device!r} but PyTorch sees {count} CUDA device(s); pass a lower index or device="cpu"'
            )
        if resolved.index is None:  # tensors always say which one they are on
            return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_precision(mixed_precision: str | None) -> torch.dtype | None:
    """The autocast dtype of "fp16" or "bf16"; None for None and "no". ValueError for anything else."""
    name = "no" if mixed_precision is None else mixed_precision
    if name not in PRECISIONS:
        raise ValueError(f'mixed_precision={mixed_precision!r} is unknown: use "fp16", "bf16", "no" or None')
    return PRECISIONS[name]


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast to `dtype` on `device`, or a context that does nothing for None."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def is_main_process() -> bool:
    return rank() == 0


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def wait_for_ranks(seconds: float) -> None:
    """Wait until every rank is here, or at most so long; a single process does not wait."""
    if world_size() > 1:
        arrived = dist.barrier(async_op=True)
        assert arrived is not None
        try:
            arrived.wait(timedelta(seconds=seconds))
        except RuntimeError as error:  # a rank has died or is late: leave without it
            logging.getLogger("orbit").warning("not all ranks came within %g s: %s", seconds, error)


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside torch.compile, DDP, DataParallel, FSDP1 and averaged (EMA) models."""
    # A wrapper's class exists only if its module was imported; these imports are slow where nobody asked for them.
    wrappers = tuple(
        getattr(sys.modules[module], name)
        for module, name in (
            ("torch.nn.parallel", "DistributedDataParallel"),
            ("torch.nn.parallel", "DataParallel"),
            ("torch.distributed.fsdp", "FullyShardedDataParallel"),
            ("torch.optim.swa_utils", "AveragedModel"),
        )
        if module in sys.modules
    )
    while True:
        if isinstance(model, wrappers):
            model = cast(nn.Module, model.module)
        elif hasattr(model, "_orig_mod"):  # torch.compile's OptimizedModule
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def unsynchronised(model: nn.Module) -> AbstractContextManager[Any]:
    """A micro-batch whose gradients stay on their rank: `no_sync()` of DDP and FSDP1, its switch in FSDP2."""
    if hasattr(model, "no_sync"):
        return cast(AbstractContextManager[Any], cast(Any, model).no_sync())
    if hasattr(model, "set_requires_gradient_sync"):
        return _Fsdp2NoSync(model)
    return nullcontext()


class _Fsdp2NoSync:
    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.model.set_requires_gradient_sync(False)

    def __exit__(self, *_: object) -> None:
        self.model.set_requires_gradient_sync(True)
