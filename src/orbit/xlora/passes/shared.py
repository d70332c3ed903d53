"""What both passes of a mixture compute alike, computed once: the blocks before the first one that carries an expert.

No route reaches these blocks, so the main pass would get from them the very tensors that the scaling pass got. In a
forward without a cache they run in the scaling pass alone, and return in the main pass what they returned there.

They do so only where nobody could tell: nothing in them asks for a gradient or drops at random, no hook looks
inside, they are not compiled, no states of theirs are among the outputs. Else they run twice, as the others do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from orbit.adapter.owners import Tasks
from orbit.adapter.routes.route import route
from orbit.adapter.routes.state import has_compiled_parts
from orbit.xlora.errors import XLoRAError
from orbit.xlora.passes.decoder import blocks_of, decoder_of

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel

_STATES = ("output_hidden_states", "output_attentions", "output_router_logits")


class Shared:
    """What blocks returned in the scaling pass, until the main pass asks for it.

    Attributes:
        replaying: is it the main pass?
    """

    def __init__(self) -> None:
        self.replaying = False

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A block's forward that runs in the scaling pass alone."""
        # A block may be called several times in a pass.
        outputs: deque[tuple[Any, list[int] | None]] = deque()

        def once(*args: Any, **kwargs: Any) -> Any:
            if not self.replaying:
                output = forward(*args, **kwargs)
                outputs.append((output, _versions(output)))
                return output
            if not outputs:
                return forward(*args, **kwargs)
            output, versions = outputs.popleft()
            written_to = versions is None or _versions(output) != versions
            return forward(*args, **kwargs) if written_to or _ask((args, kwargs)) else output

        return once


@contextmanager
def sharing(model: xLoRAModel, given: Mapping[str, Any]) -> Iterator[Shared]:
    """While both passes run on a forward's arguments, without a cache: set `replaying` between them."""
    shared = Shared()
    with route(model, None):  # which no other thread enters before these blocks are as they were
        blocks = [] if _shows_states(model, given) else leading_blocks(model)
        # accelerate puts one on the instance
        before = [(block, block.__dict__.get("forward")) for block in blocks]
        try:
            for block in blocks:
                block.__dict__["forward"] = shared.around(block.forward)
            yield shared
        finally:
            for block, forward in before:
                if forward is None:
                    block.__dict__.pop("forward", None)
                else:
                    block.__dict__["forward"] = forward


def leading_blocks(model: xLoRAModel) -> list[nn.Module]:
    """The decoder's blocks that are sure to return the same in both passes, and whose second run nobody would miss."""
    try:
        blocks = list(blocks_of(model)[2])
    except XLoRAError:
        return []
    places, decoder = model.xlora_places(), decoder_of(model)

    def is_alike(block: nn.Module) -> bool:
        modules = list(block.modules())
        trains = torch.is_grad_enabled() and any(p.requires_grad for p in block.parameters())
        seen = any(m._forward_hooks or m._forward_pre_hooks for m in modules[1:])
        return not (trains or seen or has_compiled_parts(block) or any(id(m) in places for m in modules))

    found = list(takewhile(is_alike, blocks))
    if not found:
        return []
    within = {id(module) for block in blocks for module in block.modules()}
    before = [m for m in decoder.modules() if m is not decoder and id(m) not in within]  # the embeddings, say
    if any(id(m) in places or m._forward_hooks or m._forward_pre_hooks for m in before):
        return []
    return [] if any(drops(*dropper) for dropper in droppers(decoder)) else found


def droppers(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What drops at random in a module while it trains, its tasks left aside: modules and where they say how much.

    That is torch's dropout, and the numbers that transformers' modules give to functions: `attention_dropout` and such.
    """
    left = [module]
    while left:
        one = left.pop()
        if isinstance(one, nn.modules.dropout._DropoutNd):
            yield one, "p"
        yield from (
            (one, name) for name, value in vars(one).items() if "drop" in name and isinstance(value, float)
        )
        left.extend(child for child in one.children() if not isinstance(child, Tasks))


def drops(module: nn.Module, rate: str) -> bool:
    """Does such a module drop now?"""
    return module.training and getattr(module, rate, 0) > 0


def _shows_states(model: Any, given: Mapping[str, Any]) -> bool:
    return any(given.get(name, getattr(model.config, name, False)) for name in _STATES)


def _ask(values: Any) -> bool:
    """Does one of these ask for a gradient?"""
    return torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tree_leaves(values)
    )


def _versions(output: Any) -> list[int] | None:
    """What changes where somebody writes to an output; None where nothing tells, as in inference mode."""
    tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor)]
    return None if any(t.is_inference() for t in tensors) else [t._version for t in tensors]
