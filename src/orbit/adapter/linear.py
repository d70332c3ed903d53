"""Adapted `nn.Linear` and its subclasses: LoRA and DoRA beside a forward that stays the layer's own.

    LoRA   y = low_rank(base, drop(x))                          base = super().forward(x)
    DoRA   y = rescale(low_rank(base, x), c),   c = m/‖W + s·B·A‖
           with dropout:  base + [the same of drop(x), its own base(drop(x)) included, − base(drop(x))], as
           PEFT

x (…, in)   base, y (…, out)   A (r, in)   B (out, r)   m, c (out,).  The maths is in `lora.py` and `dora.py`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.config import LayerConfig
from orbit.adapter.errors import GraftError, MergeError
from orbit.adapter.graft import Graft
from orbit.adapter.kinds import register_kind
from orbit.adapter.lora import fresh_factors, low_rank
from orbit.adapter.offload import execution_device, weights_at_hand
from orbit.adapter.owners import Down, Gate, Magnitude, Slot, Up


class LinearGraft(Graft, nn.Linear):
    """The mixin for `nn.Linear`; `kinds.py` decides where it goes among the layer's bases."""

    LINEAR = STARTS = True

    def one(self, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if slot.down.start is not None:
            return self._started(slot, input, *args, **kwargs)
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

    def _started(self, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`one` for a slot with a start: δ and δ₀ by the same operations, so that δ − δ₀ starts as exactly 0."""
        base = self.base(input, *args, **kwargs)
        self._refuse_misfit(base, slot)
        p = slot.down.dropout if self.training else 0.0
        x = dropped_input = F.dropout(input, p) if p else input
        start = slot.start
        assert start is not None
        x = x.to(slot.down.weight.dtype)
        now = F.linear(F.linear(x, slot.down.weight), slot.up.weight)
        moved = slot.coefficient * (now - F.linear(F.linear(x, start.down.weight), start.up.weight))
        if slot.magnitude is None:
            return (base + moved).to(base.dtype)
        c = dora.ratio(slot.magnitude.weight, self.row_norm(slot))
        if not p:
            return dora.rescale((base + moved).to(base.dtype), self.bias, c)
        dropped = self.base(dropped_input, *args, **kwargs)
        return base + (dora.rescale((dropped + moved).to(base.dtype), self.bias, c) - dropped)

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

    def row_norm(self, slot: Slot) -> Tensor:
        """‖W + s·B·A‖ row by row, (out,), without gradient."""
        A, B = self.update(slot)
        A = A.detach()
        return dora.row_norm(self._squared_rows(A.device), self._times_weight(A), A, B, slot.coefficient)

    def renorm(self, slot: Slot) -> None:
        assert slot.magnitude is not None
        with torch.no_grad(), weights_at_hand(self):
            slot.magnitude.weight.copy_(self.row_norm(slot))

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
            V = W.to(dtype) + self.delta(slot).to(dtype)
            if slot.magnitude is not None:
                V = dora.ratio(slot.magnitude.weight.to(dtype), self.row_norm(slot))[:, None] * V
            return V.to(W.dtype)


register_kind(nn.Linear, LinearGraft)
