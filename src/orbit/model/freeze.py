"""Which parameters train: `freeze_layers`, `unfreeze_layers`, and what is left for the optimizer.

Targets are names of modules or parameters, in the grammar of `core/patterns.py`:

    "encoder", "layers.3.mlp"    a dotted suffix of the name; a module means every parameter in it
    "layers.[0-5]", "*.bias"     a glob, of the whole name or of a dotted suffix
    "re:.*[qk]_proj\\.weight"     a regular expression for the whole name

A name means the model's own layers and not the adapters that hang on them: freezing "encoder" leaves a LoRA task
inside of it training, and unfreezing it wakes no frozen expert. A target that matches nothing of the model's own is
looked for among the adapters' tensors ("lora_A", "q_proj.lora_B.math").

Freezing is about parameters. The running statistics of a batch norm are none: they go on moving until the layer is put
into `eval()`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from orbit.core.names import nearest
from orbit.core.patterns import at_or_below, matches, nearest_ending
from orbit.core.runtime import unwrap
from orbit.core.tree import Attached
from orbit.model.errors import TargetError

__all__ = ["freeze_layers", "get_trainable_params", "unfreeze_layers"]


def freeze_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Stop the training of the parameters that `targets` mean; a gradient that they have is dropped.

    Call it before the optimizer is made, and give that `get_trainable_params(model)`. A parameter that two layers
    share is frozen for both.

    Args:
        model: any module, also inside of torch.compile or DDP.
        targets: names, globs or expressions; see the top of this file.

    Returns:
        The names of the parameters that trained before and do not now.

    Raises:
        TargetError: a target that matches nothing, or no parameter. Nothing was changed.

    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> freeze_layers(model, "0")
    ['0.weight', '0.bias']
    >>> len(get_trainable_params(model))
    2
    """
    chosen = select(model, targets)
    frozen = [name for name, parameter in chosen.items() if parameter.requires_grad]
    for parameter in chosen.values():
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimizer would still apply it
    return frozen


def unfreeze_layers(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """Let the parameters that `targets` mean train again.

    An optimizer does not know parameters that were frozen when it was made: make it afterwards.

    Args:
        model, targets: as for `freeze_layers`.

    Returns:
        The names of the parameters that were frozen and train now.

    Raises:
        TargetError: a target that matches nothing, or no parameter; a parameter of whole numbers (quantised), which
            cannot train. Nothing was changed.
    """
    chosen = select(model, targets)
    for name, parameter in chosen.items():
        if not (parameter.is_floating_point() or parameter.is_complex()):
            raise TargetError(
                f"{name} holds {parameter.dtype} (a quantised weight?) and cannot train: adapt it "
                "(orbit.adapter.inject), or name the other parameters alone"
            )
    woken = [name for name, parameter in chosen.items() if not parameter.requires_grad]
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return woken


def get_trainable_params(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that train, each once, in the model's order: what an optimizer is made of."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def select(model: nn.Module, targets: str | Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that `targets` mean, each once under its first name, in the model's order.

    Raises:
        TargetError: no target or an empty one, or one that matches nothing or no parameter.
    """
    if not isinstance(targets, (str, Iterable)):
        raise TargetError(f"targets={targets!r} is a {type(targets).__name__}: targets are names")
    targets = [targets] if isinstance(targets, str) else list(targets)
    if not targets or "" in targets:
        raise TargetError('no target was given: name layers, or say "*" for the whole model')
    model = unwrap(model)
    parts = _parts(model)
    chosen: set[int] = set()
    for target in targets:
        chosen.update(map(id, _meant(target, parts, model)))
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


class _Part:
    """The modules and parameters of the model's own, or those of what is attached to it, by all their names."""

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, nn.Parameter] = {}


def _parts(model: nn.Module) -> tuple[_Part, _Part]:
    own, attached = _Part(), _Part()
    for name, module in model.named_modules(remove_duplicate=False):  # tied ones are found by each name
        hangs = isinstance(module, Attached) or (name and name.rpartition(".")[0] in attached.modules)
        part = attached if hangs else own
        part.modules[name] = module
        for key, parameter in module._parameters.items():
            if parameter is not None:
                part.parameters[f"{name}.{key}" if name else key] = parameter
    return own, attached


def _meant(target: str, parts: tuple[_Part, _Part], model: nn.Module) -> list[nn.Parameter]:
    if not isinstance(target, str):
        raise TargetError(f"target {target!r} is a {type(target).__name__}: targets are names")
    for part in parts:
        hits = set(matches(target, [*part.modules, *part.parameters], TargetError))
        if not hits:
            continue
        found = [parameter for name, parameter in part.parameters.items() if at_or_below(name, hits)]
        if found:
            return found
        classes = ", ".join(sorted({type(part.modules[hit]).__name__ for hit in hits}))
        raise TargetError(f"target {target!r} names {len(hits)} module(s) ({classes}) without parameters")
    raise TargetError(f"target {target!r} matches nothing in {type(model).__name__}{_hint(target, parts)}")


def _hint(target: str, parts: tuple[_Part, _Part]) -> str:
    names = [name for part in parts for name in (*part.modules, *part.parameters)]
    near = nearest_ending(target, names) or nearest(target, names)
    if near is not None:
        return f"; did you mean {near!r}?"
    top = sorted({name.partition(".")[0] for name in names if name})[:8]
    return f"; its names begin with {', '.join(map(repr, top))}" if top else "; it has no parameters"
