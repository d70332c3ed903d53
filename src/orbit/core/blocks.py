"""The repeated layers of a model, its blocks: what is checkpointed, compiled and sharded one at a time.

Nearly every large model is a few odd layers around lists of equal ones: `model.layers` of a decoder, `encoder.block`
and `decoder.block` of T5, `layer1` … `layer4` of a ResNet. These lists are found by their structure, not by a name:

    a ModuleList, ModuleDict or Sequential of at least two modules, all of one class and each made of further modules,
    that does not lie inside another such list (the experts within a layer belong to the layer)

Both `checkpoint_activations` and `compile_blocks` work in place and rename no parameter. Their order is: adapters,
checkpointing, compilation, sharding (as in torchtitan), so that a compiled block sees its checkpoint, and the exchange
of shards stays outside of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from orbit.core.names import did_you_mean

_LISTS = (nn.ModuleList, nn.ModuleDict)  # hold modules and cannot be called themselves


class BlocksError(ValueError):
    """A model without blocks that could be found, or names that are not those of blocks."""


def find_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The blocks of `model` in the order of its modules, each once.

    Args:
        names: instead of what the structure says, these modules: full names or their last parts, where each part may be
            a glob ("model.layers.3", "layers.*", "h.[02468]"). A list's name means its members.

    Raises:
        BlocksError: none found (the message says what was looked at), a name that matches nothing, or a block inside
            another one.

    >>> model = nn.Sequential(nn.Linear(2, 4), nn.Sequential(*(nn.TransformerEncoderLayer(4, 2) for _ in range(3))))
    >>> [type(block).__name__ for block in find_blocks(model)]
    ['TransformerEncoderLayer', 'TransformerEncoderLayer', 'TransformerEncoderLayer']
    >>> find_blocks(model, ["1.[12]"]) == list(model[1][1:])
    True
    """
    if names is not None:
        return _named(model, [names] if isinstance(names, str) else list(names))
    found = list(_outermost(model))
    if found:
        return list({id(block): block for block in found}.values())
    raise BlocksError(
        f"{type(model).__name__} has no list of equal blocks (two or more modules of one class that are made of "
        f"further modules); looked at {_looked_at(model)}. Name the blocks: full names, or globs such as 'layers.*'"
    )


def checkpoint_activations(blocks: Sequence[nn.Module], model: nn.Module | None = None) -> None:
    """Let each block keep its inputs alone, and compute the rest a second time in the backward pass.

    Random numbers (dropout) are those of the first time, so gradients are the same: bit for bit, or to the last bits
    where parts that flow back to one input are added in another order (GPT-2, T5). A layer of
    transformers is asked to do it itself: it knows what to do with a cache of keys and values. Where the cache is
    handed to it in its place (GPT-2), the module around it must know too: that is looked for in `model`.
    """
    for block in blocks:
        if hasattr(block, "gradient_checkpointing"):
            block.gradient_checkpointing = True  # type: ignore[assignment]
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
        elif not isinstance(vars(block).get("forward"), _Checkpointed):
            block.forward = _Checkpointed(block)
    asked = {id(block) for block in blocks if hasattr(block, "gradient_checkpointing")}
    for module in () if model is None else model.modules():
        flagged = "gradient_checkpointing" in vars(module)  # a layer has the flag from its class
        if flagged and id(module) not in asked and any(id(inner) in asked for inner in module.modules()):
            module.gradient_checkpointing = True  # type: ignore[assignment]


class _Forward:
    """A block's own forward, called from here. Hooks (FSDP2's) stay outside; copies and pickles go with the block's."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block
        self.before = vars(block).get("forward")  # of the instance: accelerate sets one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.before or partial(type(self.block).forward, self.block))(*args, **kwargs)


class _Checkpointed(_Forward):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.before or partial(type(self.block).forward, self.block)
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)


def compile_blocks(blocks: Sequence[nn.Module], **arguments: Any) -> None:
    """`torch.compile` each block in place; equal blocks share one graph. Compilation happens at the first call.

    Args:
        **arguments: of `torch.compile`.
    """
    for block in blocks:
        of_torch = type(block).forward.__module__.startswith("torch.")
        if of_torch and not isinstance(vars(block).get("forward"), _Forward):
            # The compiler never begins in a function of torch itself: nn.TransformerEncoderLayer would stay as it is.
            block.forward = _Forward(block)
        block.compile(**arguments)


def prepare(
    model: nn.Module, checkpointing: bool | Sequence[str], compile: bool | str | Mapping[str, Any]
) -> None:
    """Do to `model` what the run's options `activation_checkpointing` and `compile` ask for.

    Raises:
        BlocksError: no blocks were found, or a name is none of theirs; the model is as it was.
    """
    arguments = dict(compile) if isinstance(compile, Mapping) else {}
    compiled_names = arguments.pop("blocks", None)
    checkpointed = (
        find_blocks(model, None if checkpointing is True else checkpointing) if checkpointing else []
    )
    whole = compile == "model"
    compiled = [model] if whole else [] if compile is False else find_blocks(model, compiled_names)
    checkpoint_activations(checkpointed, model)
    compile_blocks(compiled, **arguments)


def _outermost(module: nn.Module) -> Iterator[nn.Module]:
    members = list(module.children())
    if (
        isinstance(module, (*_LISTS, nn.Sequential))
        and len(members) > 1
        and len({type(member) for member in members}) == 1
        and all(_composed(member) for member in members)
    ):
        yield from members
        return
    for member in members:
        yield from _outermost(member)


def _looked_at(model: nn.Module) -> str:
    lists = [
        f"{name or 'the model'} ({type(module).__name__} of "
        f"{', '.join(sorted({type(member).__name__ for member in module.children()}))})"
        for name, module in model.named_modules()
        if isinstance(module, (*_LISTS, nn.Sequential)) and len(module) > 1
    ]
    return ", ".join(lists[:8]) + (" …" if len(lists) > 8 else "") or "its modules, of which none is a list"


def _composed(module: nn.Module) -> bool:
    """Can be called, and is made of modules of its own: a lone Linear is too little to be a block."""
    return not isinstance(module, _LISTS) and next(module.children(), None) is not None


def _named(model: nn.Module, patterns: list[str]) -> list[nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matched = [name for name in modules if _matches(name, pattern)]
        if not matched:
            raise BlocksError(
                f"block {pattern!r} matches none of the {len(modules)} modules of {type(model).__name__}"
                f"{did_you_mean(pattern, modules)}"
            )
        for name in matched:
            if isinstance(modules[name], _LISTS):
                chosen |= {f"{name}.{child}": module for child, module in modules[name].named_children()}
            else:
                chosen[name] = modules[name]
    if not chosen:
        raise BlocksError(f"blocks {patterns}: the lists of these names are empty")
    for name in chosen:
        outer = next((other for other in chosen if name.startswith(f"{other}.")), None)
        if outer is not None:
            raise BlocksError(
                f"block {name!r} lies inside block {outer!r}: name one of them, or a longer name"
            )
    order = {name: place for place, name in enumerate(modules)}
    ordered = sorted(chosen, key=lambda name: order.get(name, len(order)))
    return list({id(chosen[name]): chosen[name] for name in ordered}.values())


def _matches(name: str, pattern: str) -> bool:
    """Part by part from the end, so that `*` stays within a part."""
    have, want = name.split("."), pattern.split(".")
    return len(want) <= len(have) and all(
        fnmatchcase(part, glob) for part, glob in zip(have[-len(want) :], want, strict=True)
    )
