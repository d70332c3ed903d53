"""Adapted `nn.MultiheadAttention`: its own forward, with W + ΔW in the place of its projections.

    in_proj_weight (3·embed, embed)      or q_, k_, v_proj_weight (embed, embed | kdim | vdim)
    out_proj.weight (embed, embed)       a site like them: attention reads it without calling `out_proj`

All of them are adapted, as in PEFT, which cannot do so for kdim and vdim, nor with DoRA. Whatever the forward
does is torch's, its fast path included, which is given the adapted weights.

One task per row: query, key and value are taken apart along their batch axis, (batch, length, embed) or, without
`batch_first`, (length, batch, embed); masks are (batch, S) and (batch·heads, L, S); the attention weights come back
(batch, …).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from orbit.adapter.config import LayerConfig
from orbit.adapter.errors import GraftError, RouteError
from orbit.adapter.graft import Graft, graft, ungraft
from orbit.adapter.init import initialise
from orbit.adapter.kinds.linear import LinearGraft
from orbit.adapter.kinds.registry import refusal, register_kind
from orbit.adapter.kinds.whole import WholeGraft
from orbit.adapter.owners import Bias, BiasSlot, Whole
from orbit.adapter.routes.mixing import weighted
from orbit.adapter.routes.plan import Mix

_OUT = "out_proj.weight"


class AttentionGraft(WholeGraft, nn.MultiheadAttention):
    """The mixin for `nn.MultiheadAttention`."""

    def base(self, *args: Any, **kwargs: Any) -> Any:
        return Graft.base(self, *args, **kwargs)  # which does not go through its children

    def mixed(self, mix: Mix, *args: Any, **kwargs: Any) -> Any:
        if mix.rows is None:
            return super().mixed(mix, *args, **kwargs)
        call = _SIGNATURE.bind(self, *args, **kwargs).arguments
        call.pop("self")
        if call["query"].dim() != 3:
            raise RouteError("one task per row needs a batch; this attention was given an input without one")
        axis = 0 if self.batch_first else 1
        batch = call["query"].shape[axis]
        mix = self.fitted(mix, call["query"], axis)
        assert mix.rows is not None
        if torch.compiler.is_compiling():
            return self._chosen(mix, call, axis)
        outputs, weights, order = [], [], []
        for slot, rows in zip((*mix.slots, None), mix.rows, strict=True):
            if len(rows):
                part = self._take(call, rows, axis, batch)
                y, w = self.base(**part) if slot is None else self.adapted(slot, **part)
                outputs.append(y)
                weights.append(w)
                order.append(rows)
        back = torch.cat(order).argsort()
        output = torch.cat(outputs, axis).index_select(axis, back)
        return output, None if weights[0] is None else torch.cat(weights).index_select(0, back)

    def _chosen(self, mix: Mix, call: dict[str, Any], axis: int) -> tuple[Tensor, Tensor | None]:
        """Every task on the whole batch, and each row its own: no shape depends on who got which rows."""
        base, base_weights = self.base(**call)
        each = [self.adapted(slot, **call) for slot in mix.slots]
        output = weighted(self, base, (y for y, _ in each), mix, axis)
        if base_weights is None:
            return output, None
        return output, weighted(self, base_weights, (w for _, w in each), mix)

    def _take(self, call: dict[str, Any], rows: Tensor, axis: int, batch: int) -> dict[str, Any]:
        """The arguments of these rows. A tensor that is both query and key stays one tensor."""
        part, seen = dict(call), dict[int, Tensor]()
        for name in ("query", "key", "value"):
            whole = call[name]
            if id(whole) not in seen:
                seen[id(whole)] = whole.index_select(axis, rows)
            part[name] = seen[id(whole)]
        if call.get("key_padding_mask") is not None:
            part["key_padding_mask"] = call["key_padding_mask"].index_select(0, rows)
        mask = call.get("attn_mask")
        if mask is not None and mask.dim() == 3:
            part["attn_mask"] = mask.unflatten(0, (batch, -1)).index_select(0, rows).flatten(0, 1)
        return part

    # -- tasks -----------------------------------------------------------------------------------------------

    def sites(self) -> dict[str, Graft]:
        out = self.out_proj
        return {**super().sites(), **({_OUT: out} if isinstance(out, Graft) else {})}

    def make_site(self, name: str) -> Graft:
        if name != _OUT:
            return super().make_site(name)
        if not isinstance(self.out_proj, Graft):
            graft(self.out_proj, self._orbit_route)
        return self.out_proj  # type: ignore[return-value]

    def new_slot(self, config: LayerConfig) -> Whole:  # type: ignore[override]
        """Fresh owners for every projection.

        Raises:
            ConfigError: dropout. GraftError: a projection that is not dense.
        """
        names = ["in_proj_weight"] if self._qkv_same_embed_dim else [f"{x}_proj_weight" for x in "qkv"]
        inside = self.new_whole(dict.fromkeys(names, config)).slots
        out = self.out_proj
        why = None if isinstance(out, LinearGraft) else refusal(out, None)
        if why is not None or not isinstance(out, nn.Linear):
            raise GraftError(
                f"its out_proj, a {type(out).__name__}, cannot be adapted: {why or 'it is no Linear'}"
            )
        if out.weight.is_meta:
            raise GraftError(
                "its out_proj is offloaded by itself, and nn.MultiheadAttention reads it without calling it"
            )
        held = isinstance(out, LinearGraft)
        if not held:
            graft(out, self._orbit_route)
        try:
            slot = out.new_slot(config)  # type: ignore[operator]
            initialise(out, slot, config.init)  # type: ignore[arg-type]
            return Whole({**inside, _OUT: slot})
        finally:
            if not held:
                ungraft(out)  # type: ignore[arg-type]

    def new_bias(self) -> Whole:
        """That of `out_proj`, whose forward does not run; PEFT leaves in_proj_bias alone."""
        out = self.out_proj
        return Whole({_OUT: BiasSlot(Bias(out.bias.detach().clone()))})

    def matrix_shape(self) -> tuple[int, int]:
        """(embed, the least of the inputs): no projection's rank may exceed either."""
        return self.embed_dim, min(self.embed_dim, self.kdim, self.vdim)


_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)

register_kind(nn.MultiheadAttention, AttentionGraft)
