"""Parameters that are adapted by themselves, such as the stacked experts of a mixture.

transformers 5 keeps a mixture's experts as one Parameter, (experts, out, in), of a module whose forward picks
from it. `AdapterConfig(parameters=("experts.gate_up_proj", "experts.down_proj"))` gives each a low-rank update of
its own, ΔW = s·B·A expert by expert, in PEFT's layout (`target_parameters`). The module may be of any class and
runs its own forward with W + ΔW (`whole.py`), so that whatever implementation of experts it picks works.

Tokens usually reach experts flattened, (batch·sequence, hidden): under one task per row, neighbouring tokens
belong to one row.

An expert that no token is routed to gets a gradient of zeros, since all of them share one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from orbit.adapter.errors import TargetError
from orbit.adapter.kinds.registry import kind_of, refusal
from orbit.adapter.targets import matches, numbered
from orbit.core.names import did_you_mean
from orbit.core.tree import tree


def resolve_parameters(
    model: nn.Module, targets: Sequence[str], numbers: Sequence[int] | None = None
) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """The modules whose own parameters the targets name, with those parameters' names, by dotted name.

    Raises:
        TargetError: a target that matches nothing; the weight of a layer that is adapted as a layer; a parameter
            that is no matrix or stack of matrices; a module that cannot be run with another.
    """
    if not targets:
        return {}
    modules, parents = tree(model)
    places = {
        f"{path}.{name}" if path else name: (path, name)
        for path, module in modules.items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }
    found: dict[str, list[str]] = {}
    for target in targets:
        hits = matches(target, places)
        if not hits:
            known = (".".join(place.split(".")[-1 - target.count(".") :]) for place in places)
            raise TargetError(
                f"parameters names {target!r}, which matched 0 of {len(places)} parameters{did_you_mean(target, known)}"
            )
        for hit in hits if numbers is None else numbered(hits, numbers):
            path, name = places[hit]
            _refuse(hit, modules[path], parents[path], name)
            if name not in found.setdefault(path, []):
                found[path].append(name)
    return {path: (module, tuple(found[path])) for path, module in modules.items() if path in found}


def _refuse(place: str, module: nn.Module, parent: nn.Module | None, name: str) -> None:
    parameter = module._parameters[name]
    assert parameter is not None
    if kind_of(module) is not None:
        layer = place.rpartition(".")[0]
        raise TargetError(
            f"parameter {place!r} belongs to a layer that is adapted as one; name the layer instead: "
            f"targets=({layer!r},)"
        )
    if parameter.dim() not in (2, 3) or not parameter.is_floating_point():
        raise TargetError(
            f"parameter {place!r} is a {parameter.dtype} of the shape {tuple(parameter.shape)}; only matrices and "
            "stacks of matrices can be adapted"
        )
    why = refusal(module, parent, whole=True)
    if why is not None:
        raise TargetError(f"parameter {place!r} cannot be adapted: {why}")
