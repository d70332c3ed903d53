"""Adapted `nn.Linear` and its subclasses: LoRA and DoRA beside a forward that stays the layer's own.

    LoRA   y = low_rank(base, drop(x))                          base = super().forward(x)
    DoRA   y = rescale(low_rank(base, x), c),   c = m/‖W + s·B·A‖
           with dropout:  base + [the same of drop(x), its own base(drop(x)) included, − base(drop(x))], as
           PEFT

x (…, in)   base, y (…, out)   A (r, in)   B (out, r)   m, c (out,).  The maths is in `lora.py` and `dora.py`.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.dense import DenseGraft
from orbit.adapter.errors import GraftError
from orbit.adapter.kinds import register_kind
from orbit.adapter.lora import low_rank
from orbit.adapter.owners import Slot


class LinearGraft(DenseGraft, nn.Linear):
    """The mixin for `nn.Linear`; `kinds.py` decides where it goes among the layer's bases."""

    LINEAR = True

    def one(self, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        base = self.base(input, *args, **kwargs)
        self._refuse_misfit(base, slot)
        p = slot.down.dropout if self.training else 0.0
        x = F.dropout(input, p) if p else input
        if slot.magnitude is None:
            return low_rank(base, x, slot.down.weight, slot.up.weight, slot.coefficient)
        if not p:
            return self._dora(base, x, slot)
        dropped = self.base(x, *args, **kwargs)
        return base + (self._dora(dropped, x, slot) - dropped)

    def _refuse_misfit(self, base: Tensor, slot: Slot) -> None:
        if base.shape[-1] != slot.up.weight.shape[0]:
            raise GraftError(
                f"a layer gives {base.shape[-1]} features and its adapter {slot.up.weight.shape[0]}: "
                "its weight was replaced (resize_token_embeddings?); resize before injecting"
            )
        if slot.down.weight.is_meta and not base.is_meta:
            raise GraftError(  # torch would multiply by it without a word, and return garbage
                "an adapter is on the meta device: offload the model before injecting, not after"
            )

    def _dora(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        assert slot.magnitude is not None
        u = low_rank(base, x, slot.down.weight, slot.up.weight, slot.coefficient)
        return dora.rescale(u, self.bias, dora.ratio(slot.magnitude.weight, self.row_norm(slot)))

    def branch(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        return linear_branch(base, x, slot)

    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def times_hidden_weight(self, A: Tensor) -> Tensor:
        """W·Aᵀ (out, r) of a quantised weight: the layer's own forward multiplies by it."""
        product = self.base(A)
        return (product if self.bias is None else product - self.bias).T


def linear_branch(base: Tensor, x: Tensor, slot: Slot) -> Tensor:
    """base + g·s·x·Aᵀ·Bᵀ: what the branch of a layer that maps (…, in) to (…, out) computes."""
    B = slot.up.weight if slot.gate is None else slot.gate.weight * slot.up.weight
    return low_rank(base, x, slot.down.weight, B, slot.up.scale)


register_kind(nn.Linear, LinearGraft)
