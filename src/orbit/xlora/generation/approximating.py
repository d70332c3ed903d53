"""Approximations: a scaling pass that is not run for every token, or not through every layer. Never the default.

    h_t     the state of token t after the first `router_layer` layers and the final norm
    p_t     f(h_t) where token t is routed, else p_{t−1}
    routed  t < freeze_after and t mod route_every = 0;  t counts a text's own tokens from 0, without padding

The definition is of tokens, not of forwards: a text that is read at once and one that is decoded token by token
are given the same scalings. What decoding saves are scaling passes: none is run for a token unless a row of the batch
routes it (`approximation.py`); tokens between two passes wait (`lagging.py`).

    with xlora.approximate(model, route_every=4, on=batch):    # prints what it costs on this batch
        model.generate(...)

    approximate(route_every=4): loss 4.5712 instead of 4.5689 (+0.0023) on 128 tokens; decoded one by one they need
    25 % of the scaling passes
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orbit.xlora.errors import XLoRAError
from orbit.xlora.generation.approximation import Approximation
from orbit.xlora.log import ScalingsLog
from orbit.xlora.model import xLoRAModel
from orbit.xlora.passes.decoder import blocks_of


@contextmanager
def approximate(
    model: xLoRAModel,
    *,
    freeze_after: int | None = None,
    route_every: int = 1,
    router_layer: int | None = None,
    on: Mapping[str, Any] | Tensor,
) -> Iterator[Approximation]:
    """`with approximate(model, route_every=4, on=batch):` cheaper scaling passes, whose cost in loss is printed.

    Args:
        model: a mixture in eval mode.
        freeze_after: route the first so many tokens of a text; all later ones use the last one's scalings.
        route_every: route every so many tokens; those between use the scalings of the one before them.
        router_layer: run the scaling pass through the first so many layers, then the final norm. A classifier that was
            trained on the last layer's output reads another's.
        on: a batch on which the loss is measured both ways: arguments of the model's forward, or token numbers
            (batch, seq). Labels are the tokens themselves where none are given.

    Yields:
        What it costs and saves; its counts go on while the block runs. Leaving the block, in whatever way, undoes it.

    Raises:
        XLoRAError: a number out of range, a model that trains or follows a task, or a batch without tokens to predict.
    """
    _require(
        "freeze_after", freeze_after, freeze_after is None or _at_least_1(freeze_after), "None, or at least 1"
    )
    _require("route_every", route_every, _at_least_1(route_every), "at least 1")
    if not isinstance(model, xLoRAModel) or not model.xlora_acts():
        raise XLoRAError(
            f"{type(model).__name__} mixes no experts now: approximate needs a mixture without a task"
        )
    if model.training:
        raise XLoRAError("approximate measures a loss, which dropout would blur: call model.eval() before")
    depth = len(blocks_of(model)[2])
    ok = router_layer is None or (_at_least_1(router_layer) and router_layer <= depth)
    _require("router_layer", router_layer, ok, f"None, or a number of layers from 1 to {depth}")
    made = Approximation(freeze_after, route_every, router_layer)
    batch = _with_labels(on)
    before, log = model.xlora_approximation, model.xlora_log
    model.xlora_log = ScalingsLog()
    try:
        model.xlora_approximation = None
        made.exact_loss, made.tokens = _loss(model, batch)
        model.xlora_approximation = replace(made)
        made.loss, _ = _loss(model, batch)
        made.pass_share = _pass_share(made, batch)
        model.xlora_approximation, model.xlora_log = made, log
        print(made)
        yield made
    finally:
        model.xlora_approximation, model.xlora_log = before, log


def _with_labels(on: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    batch = {"input_ids": on} if isinstance(on, Tensor) else dict(on)
    if batch.get("labels") is None:
        ids = batch.get("input_ids")
        if ids is None:
            raise XLoRAError(
                f"on= has neither labels nor input_ids, but {sorted(batch)}: nothing says what to predict"
            )
        mask = batch.get("attention_mask")
        labels = batch["labels"] = ids.clone()
        if mask is not None:  # a text's first token is predicted from padding: it does not count
            labels.masked_fill_(mask == 0, -100)
            labels[:, 1:].masked_fill_(mask[:, :-1] == 0, -100)
    if not int((batch["labels"][:, 1:] != -100).sum()):
        raise XLoRAError("on= has no token to predict: texts of at least two tokens are needed")
    return batch


def _loss(model: Any, batch: Mapping[str, Any]) -> tuple[float, int]:
    """The mean loss of the tokens of a batch, in nats, and their number."""
    with torch.no_grad():
        loss = model(**{**batch, "use_cache": False, "return_dict": True}).loss
    return float(loss), int((batch["labels"][:, 1:] != -100).sum())


def _pass_share(made: Approximation, batch: Mapping[str, Any]) -> float:
    routed, mask = made.routed(batch, 0), batch.get("attention_mask")
    real = torch.ones_like(routed) if mask is None else mask.bool()
    return float(routed[real].float().mean())


def _at_least_1(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _require(name: str, value: object, holds: bool, rule: str) -> None:
    if not holds:
        raise XLoRAError(f"approximate({name}={value!r}): it must be {rule}")
