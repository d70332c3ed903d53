"""Keep an optimizer in step with a model whose trainable parameters changed.

A plugin that injects adapters or freezes layers changes what trains, after the optimizer was made. Its `param_groups`
are edited in place, so that a scheduler and the optimizer's identity stay: parameters that were frozen leave (with
their state), and new ones join the group of the weight they adapt. Which weight that is follows from the
structure: the nearest enclosing module that has parameters of its own in the optimizer. Below the weight's own
layer, siblings come first: a new task's B joins the group of the other tasks' Bs. An optimizer whose groups do not take
everything has a method `group_for(parameter, group)`, which says the group of its that such a parameter joins instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

Snapshot = list[tuple[nn.Parameter, bool]]


def snapshot(model: nn.Module) -> Snapshot:
    """Every parameter with its requires_grad, to compare with later (the tensors are held, so no id is reused)."""
    return [(p, p.requires_grad) for p in model.parameters()]


def changed(before: Snapshot, after: Snapshot) -> bool:
    """Other parameters than before, or others that train."""
    return [(id(p), trains) for p, trains in before] != [(id(p), trains) for p, trains in after]


def reconcile(optimizer: Optimizer, model: nn.Module, snapshot_before: Snapshot) -> tuple[int, int]:
    """Make `optimizer` hold what trains in `model` now, given the `snapshot` from before the change.

    Parameters that were frozen all along stay where the user put them, and trainable ones that the user had left
    out stay out.

    Returns:
        (how many parameters left, how many joined).

    Raises:
        ValueError: after the change the optimizer holds nothing that trains; or parameters would join an optimizer
            that keeps its parts apart.
    """
    before = {id(p): trains for p, trains in snapshot_before}
    home = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    joining = [
        (name, p)
        for name, p in model.named_parameters()
        if p.requires_grad and id(p) not in home and not before.get(id(p), False)
    ]
    if joining and getattr(optimizer, "keeps_apart", False):
        raise ValueError(
            f"{joining[0][0]} trains since the optimizer was made, and {type(optimizer).__name__} keeps its parts "
            "apart: make it from the model as it is now, so that it says which part trains this"
        )
    destinations = [_group_of(name, model, home, optimizer) for name, _ in joining]
    leaving = {
        id(p)
        for p in model.parameters()
        if id(p) in home and before.get(id(p), False) and not p.requires_grad
    }
    present = {id(p) for p in model.parameters()}
    leaving |= {key for key in home if key in before and key not in present}  # replaced by the change
    for group in optimizer.param_groups:
        for p in group["params"]:
            if id(p) in leaving:
                optimizer.state.pop(p, None)
        group["params"] = [p for p in group["params"] if id(p) not in leaving]
    for (_, p), group in zip(joining, destinations, strict=True):
        group["params"].append(p)
    require_trainable(optimizer)
    return len(leaving), len(joining)


def require_trainable(optimizer: Optimizer) -> None:
    """ValueError unless the optimizer holds a parameter that trains."""
    if not any(p.requires_grad for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "nothing is left to train: every parameter that the optimizer holds is frozen. Were adapters "
            "injected after it was made? Make it from the injected model's parameters, or let the LoRA plugin inject "
            "them"
        )


def _group_of(
    name: str, model: nn.Module, home: dict[int, dict[str, Any]], optimizer: Optimizer
) -> dict[str, Any]:
    owner, *around = _enclosing(name, model)
    decide = getattr(optimizer, "group_for", lambda parameter, group: group)
    joining = model.get_parameter(name)
    for module in (owner, *_siblings(around), *around):
        own = dict(module.named_parameters(recurse=False))
        for p in [own["weight"], *own.values()] if "weight" in own else own.values():
            if id(p) in home:
                return decide(joining, home[id(p)])
    return decide(joining, optimizer.param_groups[0])


def _enclosing(name: str, model: nn.Module) -> Iterator[nn.Module]:
    """The modules around a parameter, innermost first."""
    path = name.split(".")[:-1]
    for depth in range(len(path), -1, -1):
        yield model.get_submodule(".".join(path[:depth]))


def _siblings(around: list[nn.Module]) -> Iterator[nn.Module]:
    """What a layer holds beside a parameter's owner in a container: other tasks' tensors of the same role."""
    if len(around) > 1 and not around[0]._parameters and around[1]._parameters:
        yield from around[0].children()
