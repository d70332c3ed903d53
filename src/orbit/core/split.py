"""A micro-batch that does not fit into memory is halved, and its parts are run one after the other.

    window's gradient = Σ wᵢ·∇lossᵢ / Σ wᵢ        over parts as over micro-batches

so the gradient is that of the whole micro-batch (a model whose rows know of each other, by batch norm, sees smaller
batches). What a backward pass had added before it failed never counts: gradients of the window are set aside while one
runs. What fits is remembered, and later micro-batches are cut to that number of rows before they are tried.

Ranks may cut differently. Their gradients are then exchanged once a window, when it closes, and not during a backward
pass, which may fail on one rank alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.core import runtime
from orbit.core.nested import count_samples, first_tensor
from orbit.core.outcome import Outcome
from orbit.core.ranks import shards

if TYPE_CHECKING:
    from orbit.core.loop import Core


def check(model: nn.Module) -> None:
    """ValueError where a forward pass needs all ranks, so that none can run one more."""
    if shards.holds_shards(model):
        raise ValueError(
            "split_on_oom=True with a sharded model: every forward pass gathers pieces from all ranks, so that one "
            'rank cannot run another; choose smaller batches, or parallel="ddp"'
        )


def accumulate(trainer: Core, compute: Callable[[], Outcome]) -> Outcome:
    """Back-propagate the batch at hand, in as many parts as it takes, and return what it came to, records averaged.

    Args:
        compute: the outcome of `trainer.batch`, computed anew at each call.

    Raises:
        torch.OutOfMemoryError: one row does not fit, or the batch holds no tensor to cut.
    """
    batch, state = trainer.batch, trainer.state
    kept = {name: getattr(trainer, name) for name in trainer._bracketed}
    rows, done = max(1, count_samples(batch)), 0
    outcomes: list[Outcome] = []
    try:
        while done < rows:
            count = min(rows - done, state.rows_that_fit or rows)
            if count < rows:
                trainer.use_batch(cut(batch, rows, done, done + count))
                trainer.part = count / rows
            result = _attempt(trainer, compute, whole=count == rows)
            if isinstance(result, Outcome):
                outcomes.append(result)
                done += count
                continue
            if count == 1:
                raise torch.OutOfMemoryError(f"{_way_out(batch)}. {result}") from result
            state.rows_that_fit = -(-count // 2)
            trainer.logger.warning(
                "out of memory with %d rows: going on with %d at a time", count, state.rows_that_fit
            )
    finally:
        if trainer.part != 1.0:
            trainer.part = 1.0
            for name, value in kept.items():
                setattr(trainer, name, value)
    return outcomes[0] if len(outcomes) == 1 else _together(outcomes)


def unsynchronised(trainer: Core) -> Any:
    """Leave the exchange between ranks to the closing window, also of its last micro-batch."""
    model: Any = trainer.model
    if not trainer.window_open and hasattr(model, "require_forward_param_sync"):
        model.require_forward_param_sync = (
            True  # DDP's buffers, which it sends round after an exchange of its own
        )
    trainer.updater.synchronised = False
    return runtime.unsynchronised(model)


def _attempt(trainer: Core, compute: Callable[[], Outcome], whole: bool) -> Outcome | torch.OutOfMemoryError:
    """Forward and backward; or the error, without the frames that hold on to what was computed."""
    updater = trainer.updater
    try:
        with _set_aside(trainer):
            outcome = trainer.weighed(compute())
            updater.accumulate(outcome, alone=whole and updater.is_alone(trainer._closes_here))
        return replace(outcome, loss=outcome.loss.detach() if isinstance(outcome.loss, Tensor) else None)
    except torch.OutOfMemoryError as error:
        failed = error.with_traceback(None)
    model: Any = trainer.model
    if hasattr(model, "require_forward_param_sync"):
        model.require_forward_param_sync = False  # DDP sends buffers round once a window: that is done
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    return failed


def cut(batch: Any, rows: int, start: int, stop: int) -> Any:
    """Rows `start` to `stop` of what in nested containers has `rows` rows: tensors by their first dimension, and lists
    of other things by their length.

    >>> cut({"x": torch.arange(4), "names": ["a", "b", "c", "d"], "scale": torch.tensor(2.0)}, 4, 1, 3)
    {'x': tensor([1, 2]), 'names': ['b', 'c'], 'scale': tensor(2.)}
    """
    if isinstance(batch, Tensor):
        return batch[start:stop] if batch.ndim and batch.shape[0] == rows else batch
    if isinstance(batch, MutableMapping):
        part = copy(batch)
        for key, value in batch.items():
            part[key] = cut(value, rows, start, stop)
        return part
    if isinstance(batch, list) and len(batch) == rows and not any(map(_is_container, batch)):
        return batch[start:stop]
    if isinstance(batch, list | tuple):
        items = [cut(value, rows, start, stop) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def _is_container(value: Any) -> bool:
    return isinstance(value, Tensor | Mapping | list | tuple)


def _way_out(batch: Any) -> str:
    if first_tensor(batch) is None:
        return f"the batch, a {type(batch).__name__}, has no rows of tensors and cannot be split: make smaller batches"
    return "one row does not fit into memory: shorten it, or try activation_checkpointing=True or a smaller model"


@contextmanager
def _set_aside(trainer: Core) -> Iterator[None]:
    """Gradients of the open window wait; those of a pass that ends are added to them, others are dropped."""
    parameters = [*trainer.model.parameters(), *trainer.updater.outside]
    earlier = [(p, p.grad) for p in parameters if p.requires_grad]
    for p, _ in earlier:
        p.grad = None
    try:
        yield
    except BaseException:
        for p, gradient in earlier:
            p.grad = gradient
        raise
    for p, gradient in earlier:
        if gradient is not None:
            if p.grad is None:
                p.grad = gradient
            elif gradient.is_sparse:
                p.grad = gradient + p.grad
            else:
                p.grad = gradient.add_(p.grad)  # as autograd adds


def _together(outcomes: Sequence[Outcome]) -> Outcome:
    """One outcome for the parts of a micro-batch: means over their weights. Nothing is read by the host."""
    total: Any = sum(outcome.weight for outcome in outcomes)
    losses = [(outcome.loss, outcome.weight) for outcome in outcomes if outcome.loss is not None]
    return Outcome(
        _mean(losses) if losses else None,
        total,
        _mean_records([(outcome.records, outcome.weight) for outcome in outcomes]),
    )


def _mean_records(parts: Sequence[tuple[Mapping[str, Any], Any]]) -> dict[str, Any]:
    names = dict.fromkeys(name for records, _ in parts for name in records)
    result: dict[str, Any] = {}
    for name in names:
        having = [(records[name], weight) for records, weight in parts if name in records]
        nested = isinstance(having[0][0], Mapping)
        result[name] = _mean_records(having) if nested else _mean(having)
    return result


def _mean(parts: Sequence[tuple[Any, Any]]) -> Any:
    total: Any = sum(weight for _, weight in parts)
    if not isinstance(total, Tensor) and total == 0:
        return parts[0][0]
    kept = [
        torch.where(weight > 0, value * weight, 0.0) if isinstance(weight, Tensor) else value * weight
        for value, weight in parts
        if isinstance(weight, Tensor) or weight > 0
    ]
    return sum(kept[1:], kept[0]) / total
