"""Which layers a config means.

    "q_proj", "layers.*.q_proj", "re:.*[qv]_proj"    by the grammar of `core/patterns.py`
    None                         every linear layer but the head; or the model itself, if it is a layer

A match that is a container means every adaptable layer below it. A name, without wildcards, that means a layer which
cannot be adapted is an error. Linear are nn.Linear and transformers' Conv1D; convolutions and embeddings are adapted
where a target names them or a container of theirs.

The head, for transformers' models, is what `get_output_embeddings()` returns and every layer outside of
`base_model` (a classifier); for other models it is the last linear layer in the order of registration,
unless that is the only one. Name it as a target to adapt it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from orbit.adapter.errors import TargetError
from orbit.adapter.kinds.registry import is_linear, kind_of, refusal
from orbit.core import patterns
from orbit.core.patterns import at_or_below, is_pattern, nearest_ending
from orbit.core.tree import tree


def resolve(
    model: nn.Module,
    targets: Sequence[str] | None,
    exclude: Sequence[str] = (),
    numbers: Sequence[int] | None = None,
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to adapt and those left out.

    Args:
        numbers: of the layers that the targets name, only those with these numbers (`number_of`); None: all.

    Returns:
        Two dicts by dotted name: the layers, in the model's order; and, for layers that were in reach and are
        not among them, the reason.

    Raises:
        TargetError: a target or an exclusion that matches nothing, or names a layer that cannot be adapted;
            a number that no layer has; no layer left.
    """
    modules, parents = tree(model)
    layers = {name: module for name, module in modules.items() if kind_of(module) is not None}
    skipped: dict[str, str] = {}
    if targets is None:
        linear = {name: layer for name, layer in layers.items() if is_linear(layer) or not name}
        chosen = set(linear)
        for name in _head(model, linear):
            chosen.discard(name)
            skipped[name] = "the head"
        by_name: set[str] = set()
    else:
        chosen, by_name = set(), set()
        for target in targets:
            hits = matches(target, modules)
            reached = [name for name in layers if at_or_below(name, hits)]
            if not reached:
                raise TargetError(_nothing(target, hits, modules, layers))
            for hit in () if is_pattern(target) else hits:
                if hit not in layers and _is_leaf(modules[hit]):
                    raise TargetError(
                        f"target {target!r} names {hit!r}, a {type(modules[hit]).__name__}, which is none of the "
                        "kinds that can be adapted; name the others more fully, or by a glob, which leaves it out"
                    )
            chosen.update(reached)
            if not is_pattern(target):
                by_name.update(hit for hit in hits if hit in layers)
    for target in exclude:
        hits = matches(target, modules)
        gone = [name for name in layers if at_or_below(name, hits)]
        if not gone:
            raise TargetError(_nothing(target, hits, modules, layers, label="exclude"))
        chosen.difference_update(gone)
    if numbers is not None:
        chosen = set(numbered(chosen, numbers))
    for name in sorted(chosen):
        why = refusal(layers[name], parents[name])
        if why is None:
            continue
        if name in by_name or isinstance(layers[name], nn.modules.lazy.LazyModuleMixin):
            raise TargetError(f"layer {name!r} cannot be adapted: {why}")
        chosen.discard(name)
        skipped[name] = why
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule) and module.original_name in ("Linear",):
            skipped[name] = "it is a scripted module"
    if not chosen:
        reasons = "".join(f"\n  {name}: {why}" for name, why in list(skipped.items())[:5])
        others = (
            sorted({type(x).__name__ for x in layers.values() if not is_linear(x)}) if targets is None else []
        )
        hint = f"; to adapt its {', '.join(others)} layers, name them as targets" if others else ""
        raise TargetError(
            f"no layer is left to adapt in {type(model).__name__}{hint}{':' + reasons if reasons else ''}"
        )
    return {name: layer for name, layer in layers.items() if name in chosen}, skipped


def matches(target: str, names: Iterable[str]) -> list[str]:
    """The names that `target` matches; see `core.patterns`.

    Raises:
        TargetError: a regular expression that is none, or takes too long.
    """
    return patterns.matches(target, names, TargetError)


def number_of(name: str) -> int | None:
    """The number of a model's layer in which a module lies: the first segment of its name that is one.

    >>> number_of("model.layers.3.mlp.experts.0"), number_of("lm_head")
    (3, None)
    """
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def numbered(names: Iterable[str], numbers: Sequence[int]) -> list[str]:
    """Those of the names that lie in layers of these numbers.

    Raises:
        TargetError: a number that none of them has.
    """
    names = list(names)
    have = {number for name in names if (number := number_of(name)) is not None}
    for number in numbers:
        if number not in have:
            exist = ", ".join(map(str, sorted(have))) or "none of the targets lies in a numbered layer"
            raise TargetError(f"layers names {number}, and there is none of that number; there are: {exist}")
    return [name for name in names if number_of(name) in numbers]


def _is_leaf(module: nn.Module) -> bool:
    """A layer with parameters of its own and nothing below it."""
    return not module._modules and any(p is not None for p in module._parameters.values())


def _head(model: nn.Module, layers: dict[str, nn.Module]) -> list[str]:
    if hasattr(model, "get_output_embeddings") and hasattr(model, "base_model"):
        head = model.get_output_embeddings()  # type: ignore[operator]
        body = set(model.base_model.modules())  # type: ignore[union-attr]
        return [name for name, layer in layers.items() if layer is head or layer not in body]
    return list(layers)[-1:] if len(layers) > 1 else []


def _nothing(
    target: str,
    hits: Sequence[str],
    modules: dict[str, nn.Module],
    layers: dict[str, nn.Module],
    label: str = "target",
) -> str:
    kinds = sorted({kind_of(layer).__name__ for layer in layers.values()}) or ["adaptable"]  # type: ignore[union-attr]
    said = f"{label} {target!r} matched 0 of {len(layers)} {'/'.join(kinds)} layers"
    if hits:
        classes = ", ".join(sorted({type(modules[hit]).__name__ for hit in hits}))
        return f"{said}; it names {len(hits)} module(s) of class {classes} with none of them below"
    found = nearest_ending(target, modules)
    if found:
        count = len([name for name in layers if at_or_below(name, matches(found, modules))])
        return f"{said}; did you mean {found!r} ({count})?"
    some = sorted({name.rpartition(".")[2] for name in layers})[:8]
    return f"{said}; their names end in {', '.join(map(repr, some)) or 'nothing'}"
