"""EVA: start A from the data that the adapter will see.

    A = Vᵀ (r, in), B = 0        V: the r first right singular vectors of the layer's inputs X (tokens, in)

The inputs pass by batch after batch, and of what was seen each layer keeps its `keep` largest directions:

    M ← the first `keep` rows of Σ·Vᵀ,   U·Σ·Vᵀ = [M; X]        M (keep, in)

That is exact while the inputs have no more than `keep` directions, and close where their spectrum falls off. The
means of the inputs are not subtracted. Ranks stay where they are; the paper also moves them between layers.

Source: Paischer et al. 2024 (arXiv 2410.07170).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orbit.adapter.errors import ConfigError, GraftError, TaskError
from orbit.adapter.graft import Graft
from orbit.adapter.inject import one_task, task_layers, unwrapped
from orbit.adapter.owners import BiasSlot, Slot, TokenSlot
from orbit.adapter.routes.route import route
from orbit.core.modes import evaluating


class _Directions:
    """The largest directions of the rows seen so far."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.rows = 0
        self.energy = torch.zeros(())  # ‖X‖² of all rows
        self.M: Tensor | None = None

    def see(self, X: Tensor) -> None:
        """X (…, in), of any number of rows."""
        X = X.detach().reshape(-1, X.shape[-1]).float()
        self.rows += len(X)
        self.energy = self.energy.to(X.device) + X.square().sum()
        stacked = X if self.M is None else torch.cat([self.M, X])
        _, S, Vt = torch.linalg.svd(stacked, full_matrices=False)
        self.M = S[: self.keep, None] * Vt[: self.keep]

    def first(self, r: int) -> tuple[Tensor, float]:
        """The r first right singular vectors (r, in), and their share of ‖X‖²."""
        assert self.M is not None
        _, S, Vt = torch.linalg.svd(self.M, full_matrices=False)
        share = S[:r].square().sum() / self.energy.clamp_min(torch.finfo(S.dtype).tiny)
        return Vt[:r], min(1.0, float(share))


def init_eva(
    model: nn.Module,
    batches: Iterable[Any],
    name: str | None = None,
    *,
    forward: Callable[[nn.Module, Any], object] | None = None,
    keep: int | None = None,
) -> dict[str, float]:
    """Start a fresh task's A from the inputs that its layers see in `batches`.

    The batches run through the base model, in eval mode and without gradients. Where a batch is a dict with an
    `attention_mask` (batch, sequence), padding is left out.

    Args:
        model: a model with the task, not trained yet: its update is still zero.
        batches: a few batches of the training data. A dict is passed as keywords, a tuple or list as arguments,
            anything else as the only argument.
        name: the task; None means the only or the current one.
        forward: instead, called as forward(model, batch).
        keep: how many directions a layer keeps between batches, at least its rank; by default twice the rank + 16.

    Returns:
        For each layer, by its dotted name, the share of its inputs' energy ‖X‖² that A's rows span.

    Raises:
        TaskError: no such task, or it was trained. GraftError: a layer whose inputs are no rows (an embedding, a
        convolution). ConfigError: too few or non-finite inputs, or `keep` below a rank. The model is unchanged.
    """
    model = unwrapped(model)
    name = one_task(model, name)
    layers = {path: layer for path, layer in task_layers(model, name).items() if not _is_own(layer, name)}
    found: dict[str, _Directions] = {}
    for path, layer in layers.items():
        r = _fresh_rank(layer, name, path)
        if keep is not None and keep < r:
            raise ConfigError(f"keep={keep} is below the rank {r} of layer {path!r}")
        found[path] = _Directions(2 * r + 16 if keep is None else keep)
    mask: list[Tensor | None] = [None]
    with _watched(layers, found, mask), evaluating(model), torch.no_grad(), route(model, None):
        for batch in batches:
            given = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask[0] = given if isinstance(given, Tensor) and given.dim() == 2 else None
            (_call if forward is None else forward)(model, batch)
    starts = {path: _start(path, layers[path].low_rank_slot(name), seen) for path, seen in found.items()}
    for path, (A, _) in starts.items():
        slot = layers[path].low_rank_slot(name)
        layers[path].set_factors(slot, A, layers[path].factors(slot)[1])
    return {path: share for path, (_, share) in starts.items()}


def _is_own(layer: Graft, name: str) -> bool:
    """Has the task a bias or rows here, and no low-rank update that could start anywhere?"""
    return isinstance(layer.slots()[name], (BiasSlot, TokenSlot))


def _fresh_rank(layer: Graft, name: str, path: str) -> int:
    slot = layer.slots()[name]
    if not isinstance(slot, Slot) or not layer.LINEAR:
        raise GraftError(
            f"layer {path!r} ({type(layer).__name__}) does not multiply the rows of its input by one matrix, so it "
            "has no input directions to start from; exclude it, or use another init"
        )
    A, B = layer.factors(slot)
    if slot.start is not None or B.count_nonzero():
        raise TaskError(
            f"task {name!r} has an update already at layer {path!r}; init_eva comes before training"
        )
    return A.shape[-2]


def _start(path: str, slot: Slot, seen: _Directions) -> tuple[Tensor, float]:
    r = slot.up.r
    if seen.M is None or len(seen.M) < r:
        raise ConfigError(f"layer {path!r} saw {seen.rows} inputs, too few for rank {r}; give more batches")
    return seen.first(r)


def _call(model: nn.Module, batch: Any) -> object:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


@contextmanager
def _watched(
    layers: Mapping[str, Graft], found: Mapping[str, _Directions], mask: list[Tensor | None]
) -> Iterator[None]:
    """Inside, every layer shows its inputs to its `_Directions`."""

    def watch(seen: _Directions, path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            X = args[0] if args else kwargs["input"]
            real = mask[0]
            if real is not None and X.shape[:-1] == real.shape:
                X = X[real.bool()]
            if not torch.isfinite(X).all():
                raise ConfigError(f"the inputs of layer {path!r} are not finite")
            if X.numel():
                seen.see(X)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(found[path], path), with_kwargs=True)
        for path, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
