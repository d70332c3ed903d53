"""Adapted `nn.Linear` and its subclasses.

    y = u + D∘(u − b) + (C∘(x·Aᵀ))·Bᵀ          `lora.py`;   LoRA: C = g·s, D = 0
    DoRA: D = c − 1 and c∘B in the place of B,   c = m/‖W + s·B·A‖          `dora.py`
    with dropout:  u + [the same of drop(x), its own W·drop(x) included, − u of drop(x)], as PEFT

x (…, in)   u = x·Wᵀ + b, y (…, out)   A (r, in)   B (out, r)   m, c (out,)

Where the layer's own forward is torch's and W is dense, the layer is computed as a whole (`lora.fused`), else
beside u, which the layer's own forward computes whatever it is (`lora.low_rank`). `repr` says which.
"""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.config import LayerConfig
from orbit.adapter.errors import GraftError, MergeError
from orbit.adapter.graft import Graft
from orbit.adapter.kinds import register_kind
from orbit.adapter.lora import fresh_factors, fused, low_rank
from orbit.adapter.offload import execution_device, weights_at_hand
from orbit.adapter.owners import Down, Gate, Magnitude, Slot, Up


class LinearGraft(Graft, nn.Linear):
    """The mixin for `nn.Linear`; `kinds.py` decides where it goes among the layer's bases."""

    _torchs_forward: ClassVar[bool]

    def one(self, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
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

    def row_norm(self, slot: Slot) -> Tensor:
        """‖W + s·B·A‖ row by row, (out,), without gradient."""
        A = slot.down.weight.detach()
        return dora.row_norm(
            self._squared_rows(A.device), self._times_weight(A), A, slot.up.weight, slot.coefficient
        )

    def _times_weight(self, A: Tensor) -> Tensor:
        """W·Aᵀ (out, r). A quantised weight is not dense, but the layer's own forward multiplies by it."""
        kind = "cpu" if A.is_meta else A.device.type  # autocast does not know the meta device
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            W = self.weight
            if self._is_dense(W):
                dtype = dora.wide(W.dtype)
                return W.to(dtype) @ A.to(dtype).T
            product = self.base(A)
            return (product if self.bias is None else product - self.bias).T

    def _squared_rows(self, device: torch.device) -> Tensor:
        """‖W‖² row by row, (out,), kept while W is frozen and unchanged."""
        W = self.weight
        if torch.compiler.is_compiling() and self._is_dense(W):
            return dora.squared_rows(W)  # one pass over W, fused with the product that needs W anyway
        keep = not W.requires_grad and not W.is_inference()
        mark = (W._version, W.dtype, W.data_ptr() if self._is_dense(W) else None) if keep else None
        ref, seen, w2 = self.__dict__.get("_orbit_w2", (None, None, None))
        if keep and ref is not None and ref() is W and seen == mark:
            return w2
        if self._is_dense(W):
            w2 = dora.squared_rows(W)
        else:
            eye = torch.eye(self.in_features, device=device)
            w2 = dora.squared_rows(self._times_weight(eye))
        if keep:
            self.__dict__["_orbit_w2"] = (weakref.ref(W), mark, w2)
        return w2

    def _is_dense(self, W: Tensor) -> bool:
        # A tensor subclass (torchao's quantised weights) looks dense and need not have these operations.
        plain = type(W) in (Tensor, nn.Parameter)
        return plain and W.is_floating_point() and W.shape == (self.out_features, self.in_features)

    # -- what Graft asks of a kind ---------------------------------------------------------------------------

    def new_slot(self, config: LayerConfig) -> Slot:
        """Fresh owners: A random, B = 0, g = 1, m = ‖W‖. float32 beside half-precision and quantised weights."""
        W = self.weight
        dtype = W.dtype if W.dtype in (torch.float32, torch.float64) else torch.float32
        device = execution_device(self)
        A, B = fresh_factors(self.in_features, self.out_features, config.r, device=device, dtype=dtype)
        gate = Gate(torch.ones((), device=device, dtype=dtype)) if config.gated else None
        slot = Slot(Down(A, config.dropout), Up(B, config.alpha, config.rslora), gate=gate)
        if not config.dora:
            return slot
        with weights_at_hand(self):
            return slot._replace(magnitude=Magnitude(self.row_norm(slot).to(dtype)))

    def matrix(self) -> Tensor:
        W = self.weight.detach()
        if not self._is_dense(W):
            return self._times_weight(torch.eye(self.in_features, device=execution_device(self)))
        return W.to(dora.wide(W.dtype))

    def factors(self, slot: Slot) -> tuple[Tensor, Tensor]:
        return slot.down.weight, slot.up.weight

    def set_factors(self, slot: Slot, A: Tensor, B: Tensor) -> None:
        with torch.no_grad():
            slot.down.weight.copy_(A)
            slot.up.weight.copy_(B)

    def merged_weight(self, slot: Slot) -> Tensor:
        """W + s·B·A, or its DoRA form, computed in at least float32 and rounded once."""
        W = self._parameters.get("weight")
        if W is None or not self._is_dense(W) or W.is_meta:
            raise MergeError(
                f"the weight of {type(self).__name__} is quantised, derived, sharded or offloaded"
            )
        with torch.no_grad():
            dtype = dora.wide(W.dtype)
            A, B = slot.down.weight.to(dtype), slot.up.weight.to(dtype)
            V = W.to(dtype) + slot.coefficient.to(dtype) * (B @ A)
            if slot.magnitude is not None:
                V = dora.ratio(slot.magnitude.weight.to(dtype), self.row_norm(slot))[:, None] * V
            return V.to(W.dtype)


register_kind(nn.Linear, LinearGraft)
