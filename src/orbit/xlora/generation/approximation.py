"""An approximation at work: which tokens are routed, and what the others use (`approximating.py` says why).

p_t     f(h_t) where token t is routed, else p_{t−1}
routed  t < freeze_after and t mod route_every = 0;  t counts a text's own tokens from 0, without padding
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.adapter.routes.route import route
from orbit.xlora.errors import CacheError
from orbit.xlora.generation.cache import TwinCache
from orbit.xlora.generation.lagging import Lagging
from orbit.xlora.passes import forward
from orbit.xlora.passes.decoder import blocks_of

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel

_PER_TOKEN = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")


@dataclass
class Approximation:
    """What is approximated, what that costs and what it has saved.

    Attributes:
        freeze_after: tokens of a text from this one on use the scalings of the one before it; None is never.
        route_every: only every so many tokens of a text are routed; 1 is all.
        router_layer: the layers that the scaling pass runs; None is all.
        exact_loss: mean token loss of the batch without this approximation, in nats.
        loss: the same with it.
        tokens: how many tokens of the batch have a loss.
        pass_share: of one scaling pass per token, how many are left where the batch's texts are decoded, each alone.
        passes: the scaling passes that were run so far.
        skipped: the forwards that needed none.
    """

    freeze_after: int | None = None
    route_every: int = 1
    router_layer: int | None = None
    exact_loss: float = float("nan")
    loss: float = float("nan")
    tokens: int = 0
    pass_share: float = 1.0
    passes: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        given = {"freeze_after": self.freeze_after, "router_layer": self.router_layer}
        if self.route_every > 1:
            given["route_every"] = self.route_every
        said = ", ".join(f"{name}={value}" for name, value in given.items() if value is not None)
        return (
            f"approximate({said}): loss {self.loss:.4f} instead of {self.exact_loss:.4f} "
            f"({self.loss - self.exact_loss:+.4f}) on {self.tokens} tokens; decoded one by one they need "
            f"{100 * self.pass_share:.0f} % of the scaling passes"
            + (f", of {self.router_layer} layers each" if self.router_layer else "")
        )

    def routed(self, given: Mapping[str, Any], past: int) -> Tensor:
        """Which tokens of a forward are routed: (batch, seq), for arguments that follow on `past` tokens."""
        batch, seq = _tokens(given).shape[:2]
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        if isinstance(positions, Tensor) and positions.dim() == 2:
            t = positions
        elif isinstance(mask, Tensor) and mask.dim() == 2:
            t = mask.cumsum(1)[:, -seq:] - 1
        else:
            t = torch.arange(past, past + seq, device=_tokens(given).device)[None]
        routed = t % self.route_every == 0
        if self.freeze_after is not None:
            routed = routed & (t < self.freeze_after)
        return routed.expand(batch, seq)

    def predict(self, model: xLoRAModel, given: Mapping[str, Any], cache: TwinCache | None) -> Tensor:
        """The prediction (batch, seq, layers, experts) that a forward uses."""
        layers = model.xlora_classifier.n_layers
        if cache is None:
            self.passes += 1
            exact = _once(self._ahead(model, given, None))
            return carried(exact, self.routed(given, 0), None).expand(-1, -1, layers, -1)
        for name in ("attention_mask", "position_ids"):
            if (one := given.get(name)) is not None and (not isinstance(one, Tensor) or one.dim() != 2):
                raise CacheError(
                    f"tokens that wait for a scaling pass need {name} of (batch, tokens), and these are not, "
                    "as generate makes them for a static cache; use a dynamic one under approximate"
                )
        late = self._lagging(cache)
        routed = self.routed(given, late.get_seq_length())
        new = {name: _each_row(given[name], routed) for name in _PER_TOKEN if given.get(name) is not None}
        last = None if late.used is None else late.used[:, -1:]
        needed = last is None or bool(routed.any())
        if needed:
            self.passes += 1
            exact = _once(self._ahead(model, {**given, **late.with_waiting(new)}, late.cache))
            used = carried(exact[:, -routed.shape[1] :], routed, last)
        else:
            self.skipped += 1
            used = last.expand(-1, routed.shape[1], -1, -1)  # type: ignore[union-attr]
        late.add(new, used, seen=needed)
        return used.expand(-1, -1, layers, -1)

    def _ahead(self, model: xLoRAModel, given: Mapping[str, Any], cache: Any) -> Tensor:
        with route(model, None), shallow(model, self.router_layer):  # no other thread finds a model cut short
            hidden = forward.scaling_pass(model, given, cache)
        prediction: Tensor = model.xlora_classifier(hidden, model.xlora_config)
        return prediction

    def _lagging(self, cache: TwinCache) -> Lagging:
        settings = (self.freeze_after, self.route_every, self.router_layer)
        late = cache.scaling
        if not late.get_seq_length():
            empty = late.cache if isinstance(late, Lagging) else late
            late = cache.scaling = Lagging(empty, settings)
        if not isinstance(late, Lagging) or late.settings != settings:
            raise CacheError(
                "past_key_values was filled exactly or under another approximation, whose scaling pass is another; "
                "start from an empty cache"
            )
        return late


def carried(prediction: Tensor, routed: Tensor, before: Tensor | None) -> Tensor:
    """The predictions used: of each token's last routed one, up to itself.

    Args:
        prediction: (batch, seq, layers, experts).
        routed: (batch, seq).
        before: what the token before these used, (batch, 1, layers, experts); None has the first token routed.
    """
    own = torch.arange(routed.shape[1], device=routed.device)
    found = torch.where(routed, own, -1 if before is not None else 0).cummax(1).values
    if before is not None:
        prediction, found = torch.cat([before, prediction], 1), found + 1
    found = found.to(prediction.device)
    return prediction.gather(1, found[:, :, None, None].expand(-1, -1, *prediction.shape[2:]))


@contextmanager
def shallow(model: nn.Module, layers: int | None) -> Iterator[None]:
    """The decoder has its first so many layers only; None is all."""
    if layers is None:
        yield
        return
    owner, name, blocks = blocks_of(model)
    owner._modules[name] = nn.ModuleList(list(blocks)[:layers])
    try:
        yield
    finally:
        owner._modules[name] = blocks


def _once(prediction: Tensor) -> Tensor:
    """A prediction that is the same for all layers, for one of them."""
    return prediction if prediction.stride(2) else prediction[:, :, :1]


def _tokens(given: Mapping[str, Any]) -> Tensor:
    found = given.get("input_ids")
    tokens: Tensor = found if found is not None else given["inputs_embeds"]
    return tokens


def _each_row(values: Tensor, routed: Tensor) -> Tensor:
    return values.expand(len(routed), *values.shape[1:])
