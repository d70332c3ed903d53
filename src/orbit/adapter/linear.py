"""Adapted `nn.Linear` and its subclasses.

    y = u + D∘(u − b) + (C∘(x·Aᵀ))·Bᵀ          `lora.py`;   LoRA: C = g·s, D = 0
    DoRA: D = c − 1 and c∘B in the place of B,   c = m/‖W + s·B·A‖          `dora.py`
    with dropout:  u + [the same of drop(x), its own W·drop(x) included, − u of drop(x)], as PEFT

x (…, in)   u = x·Wᵀ + b, y (…, out)   A (r, in)   B (out, r)   m, c (out,)

Where the layer's own forward is torch's and W is dense, the layer is computed as a whole (`lora.fused`), else
beside u, which the layer's own forward computes whatever it is (`lora.low_rank`). `repr` says which.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.dense import DenseGraft
from orbit.adapter.errors import GraftError
from orbit.adapter.graft import Graft
from orbit.adapter.kinds import register_kind
from orbit.adapter.lora import fused, low_rank
from orbit.adapter.owners import Slot


class LinearGraft(DenseGraft, nn.Linear):
    """The mixin for `nn.Linear`; `kinds.py` decides where it goes among the layer's bases."""

    LINEAR = True
    _torchs_forward: ClassVar[bool]

    def one(self, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if slot.down.start is not None:
            return super().one(slot, input, *args, **kwargs)
        p = slot.down.dropout if self.training else 0.0
        if not p:
            return self._low_rank(input, *self._terms(slot), args, kwargs)
        A, B, C, D = self._terms(slot)
        u = self.base(input, *args, **kwargs)
        self._refuse_misfit(u.shape[-1], input, A, B)
        x = F.dropout(input, p)
        if D is None:
            return low_rank(u, x, A, B, C)
        dropped = self.base(x, *args, **kwargs)
        return u + (low_rank(dropped, x, A, B, C, D, self.bias) - dropped)

    def _terms(self, slot: Slot) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A, B, C, D of one task."""
        A, B = slot.down.weight, slot.up.weight
        if slot.magnitude is None:
            return A, B, slot.coefficient, None
        c = dora.ratio(slot.magnitude.weight, self.row_norm(slot))
        return A, c[:, None] * B, slot.coefficient, c - 1

    def _low_rank(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        if self.fuses and not args and not kwargs:
            self._refuse_misfit(self.weight.shape[0], x, A, B)
            return fused(x, self.weight, self.bias, A, B, C, D)
        u = self.base(x, *args, **kwargs)
        self._refuse_misfit(u.shape[-1], x, A, B)
        return low_rank(u, x, A, B, C, D, self.bias)

    @property
    def fuses(self) -> bool:
        """Is the layer's own forward x·Wᵀ + b on a dense W?"""
        W = self._parameters.get("weight")
        return W is not None and self._torchs_forward and self._is_dense(W)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        after = cls.__mro__[cls.__mro__.index(Graft) + 1 :]
        cls._torchs_forward = next(base for base in after if "forward" in vars(base)) is nn.Linear

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, low-rank {'fused' if self.fuses else 'beside'}"

    def _refuse_misfit(self, out: int, x: Tensor, A: Tensor, B: Tensor) -> None:
        if out != B.shape[0]:
            raise GraftError(
                f"a layer gives {out} features and its adapter {B.shape[0]}: "
                "its weight was replaced (resize_token_embeddings?); resize before injecting"
            )
        if A.is_meta and not x.is_meta:
            raise GraftError(  # torch would multiply by it without a word, and return garbage
                "an adapter is on the meta device: offload the model before injecting, not after"
            )

    def branch(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        return low_rank(base, x, slot.down.weight, slot.up.weight, slot.coefficient)

    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def times_hidden_weight(self, A: Tensor) -> Tensor:
        """W·Aᵀ (out, r) of a quantised weight: the layer's own forward multiplies by it."""
        product = self.base(A)
        return (product if self.bias is None else product - self.bias).T


register_kind(nn.Linear, LinearGraft)
