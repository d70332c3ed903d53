"""What the kinds that have one weight share: that weight as a matrix, and what tasks do with it.

    W (out, in)   the weight seen as a matrix        A (r, in)   B (out, r)   m (out,)

    Linear     its weight                            Conv1D      its weight, transposed
    Conv       (out, in/groups·∏kernel), flattened   Embedding   (dim, num), transposed

In this view every kind has the same update ΔW = g·s·B·A, the same row norms for DoRA and the same merged weight.
A kind says how to go to the matrix and back (`as_matrix`, `as_weight`), which axis of its output is `out`
(`along_out`), and what its branch computes:

    y  = u                       u = base + ΔW x                                  (`branch`, `_moved`)
    y  = b + c∘(u − b)           c = m/‖W + ΔW‖ row by row, for DoRA              (`dora.py`)

A task with a bias b_t of its own (`bias.py`): b_t in the place of b, as base + (b_t − b).

Dropout applies to the input of the branch. With DoRA it applies to the base within the update too, as in PEFT:
base(x) + [DoRA of drop(x) − base(drop(x))].
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.config import LayerConfig
from orbit.adapter.errors import GraftError, MergeError
from orbit.adapter.graft import Graft
from orbit.adapter.lora import fresh_factors
from orbit.adapter.offload import execution_device, refuse_meta, weights_at_hand
from orbit.adapter.owners import (
    AnySlot,
    Bias,
    BiasSlot,
    Down,
    Gate,
    Magnitude,
    Slot,
    TokenRows,
    TokenSlot,
    Up,
)
from orbit.adapter.quantised import dequantised
from orbit.adapter.routes.mixing import weighted
from orbit.adapter.routes.plan import Mix


class DenseGraft(Graft):
    """The part of a kind that follows from its weight being a matrix. Kinds derive from it and torch's class."""

    STARTS = True

    weight: Tensor
    bias: Any  # Tensor or None

    # -- the forward -----------------------------------------------------------------------------------------

    def one(self, slot: AnySlot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output under one task; the equations are the module's."""
        base = self.base(input, *args, **kwargs)
        if type(slot) is BiasSlot:
            return self.rebiased(base, slot.bias)
        if type(slot) is TokenSlot:
            return self.with_rows(self.rebiased(base, slot.bias), slot.rows, input)
        assert isinstance(slot, Slot)
        return self.beside(base, slot, input, *args, **kwargs)

    def rebiased(self, base: Tensor, bias: Bias | None) -> Tensor:
        """base + (b_t − b): the layer's own output with another bias; `base` itself without one."""
        if bias is None:
            return base
        return base + self.along_out(bias.weight - self.bias).to(base.dtype)

    def with_rows(self, base: Tensor, rows: TokenRows, input: Tensor) -> Tensor:
        """The layer's own output where its weight has these rows."""
        raise NotImplementedError

    def mixed(self, mix: Mix, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output under several tasks. Of a weighted sum, the layer's own product is computed once."""
        if mix.rows is not None or not all(isinstance(slot, Slot) for slot in mix.slots):
            return super().mixed(mix, input, *args, **kwargs)
        base = self.base(input, *args, **kwargs)
        each = (self.beside(base, slot, input, *args, **kwargs) for slot in mix.slots)  # type: ignore[arg-type]
        return weighted(self, base, each, mix)

    def beside(self, base: Tensor, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output under one task, given the layer's own."""
        refuse_meta(slot.down.weight, base)
        base = self.rebiased(base, slot.bias)
        p = slot.down.dropout if self.training else 0.0
        x = F.dropout(input, p) if p else input
        if slot.magnitude is None:
            return self._moved(base, x, slot)
        if not p:
            return self._magnified(self._moved(base, x, slot), slot)
        dropped = self.rebiased(self.base(x, *args, **kwargs), slot.bias)
        return base + (self._magnified(self._moved(dropped, x, slot), slot) - dropped)

    def _moved(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        """base + ΔW x. With a start, δ and δ₀ are made by the same operations, so that δ − δ₀ starts as exactly 0."""
        start = slot.start
        if start is None:
            return self.branch(base, x, slot)
        zero = torch.zeros_like(base, dtype=dora.wide(base.dtype))
        return (base + (self.branch(zero, x, slot) - self.branch(zero, x, start))).to(base.dtype)

    def branch(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        """u = base + ΔW x, in the dtype of `base`."""
        raise NotImplementedError

    def along_out(self, v: Tensor) -> Tensor:
        """v (out,) shaped so that it broadcasts along that axis of the output."""
        return v

    def _magnified(self, u: Tensor, slot: Slot) -> Tensor:
        assert slot.magnitude is not None
        c = dora.ratio(slot.magnitude.weight, self.row_norm(slot))
        b = self.bias if slot.bias is None else slot.bias.weight
        bias = None if b is None else self.along_out(b)
        return dora.rescale(u, bias, self.along_out(c))

    # -- the weight as a matrix ------------------------------------------------------------------------------

    @staticmethod
    def as_matrix(W: Tensor) -> Tensor:
        """A weight as its matrix (out, in), a view."""
        return W

    def as_weight(self, M: Tensor) -> Tensor:
        """A matrix (out, in) in the shape of the weight: the inverse of `as_matrix`."""
        return M

    def factor_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes in which the owners keep A (r, in) and B (out, r)."""
        out_size, in_size = self.matrix_shape()
        return (r, in_size), (out_size, r)

    def row_norm(self, slot: Slot) -> Tensor:
        """‖W + s·B·A‖ row by row, (out,), without gradient."""
        A, B = (factor.detach() for factor in self.update(slot))
        return dora.row_norm(self._squared_rows(), self._times_weight(A), A, B, slot.coefficient)

    def _times_weight(self, A: Tensor) -> Tensor:
        """W·Aᵀ (out, r)."""
        kind = "cpu" if A.is_meta else A.device.type  # autocast does not know the meta device
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            W = self._readable()
            if W is None:
                return self.times_hidden_weight(A)
            dtype = dora.wide(W.dtype)
            return self.as_matrix(W).to(dtype) @ A.to(dtype).T

    def _readable(self) -> Tensor | None:
        """The weight as a plain tensor, dequantised if need be; None if it cannot be read."""
        W = self.weight.detach()
        return W if self._is_dense(W) else dequantised(self)

    def times_hidden_weight(self, A: Tensor) -> Tensor:
        """W·Aᵀ (out, r) for a weight that cannot be read: sharded, say, or of an unknown library."""
        raise GraftError(
            f"the weight of {type(self).__name__} is no dense matrix of its kind's shape, so its norm is not known"
        )

    def _squared_rows(self) -> Tensor:
        """‖W‖² row by row, (out,), kept while W is frozen and unchanged.

        Writing through `weight.data` leaves no mark on W and is seen after the next `train()` or `eval()` alone;
        write under `torch.no_grad()` instead.
        """
        W = self.weight
        if torch.compiler.is_compiling() and self._is_dense(W):
            return dora.squared_rows(self.as_matrix(W))  # fused with the product that needs W anyway
        if W.requires_grad:  # a fused optimizer writes to it without a mark
            self.__dict__.pop("_orbit_w2", None)
        keep = not (W.requires_grad or W.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(W))
        mark = (W._version, W.dtype, W.data_ptr() if self._is_dense(W) else None) if keep else None
        ref, seen, w2 = self.__dict__.get("_orbit_w2", (None, None, None))
        if keep and ref is not None and ref() is W and seen == mark:
            return w2
        w2 = dora.squared_rows(self.matrix())
        if keep:
            self.__dict__["_orbit_w2"] = (weakref.ref(W), mark, w2)
        return w2

    def _is_dense(self, W: Tensor) -> bool:
        # A tensor subclass (torchao's quantised weights) looks dense and need not have these operations.
        if type(W) not in (Tensor, nn.Parameter) or not W.is_floating_point():
            return False
        shape = self.matrix_shape()
        return W.numel() == math.prod(shape) and self.as_matrix(W).shape == shape

    def train(self, mode: bool = True) -> Any:
        self.__dict__.pop("_orbit_w2", None)
        return super().train(mode)

    # -- what Graft asks of a kind ---------------------------------------------------------------------------

    def new_slot(self, config: LayerConfig) -> Slot:
        """Fresh owners: ΔW = 0, g = 1, m = ‖W‖. float32 beside half-precision and quantised weights."""
        W = self.weight
        if W.is_complex():
            raise GraftError(
                f"its weight is {str(W.dtype).removeprefix('torch.')}; only real ones have an update here"
            )
        dtype = dora.wide(W.dtype)
        device = execution_device(self)
        A, B = self.fresh(config.r, device=device, dtype=dtype)
        down, up = self.factor_shapes(config.r)
        gate = Gate(torch.ones((), device=device, dtype=dtype)) if config.gated else None
        slot = Slot(
            Down(A.view(down), config.dropout), Up(B.view(up), config.alpha, config.rslora), gate=gate
        )
        if config.bias and getattr(self, "bias", None) is not None:
            slot = slot._replace(bias=self.new_bias().bias)
        if not config.dora:
            return slot
        with weights_at_hand(self):
            return slot._replace(magnitude=Magnitude(self.row_norm(slot).to(dtype)))

    def new_bias(self) -> BiasSlot:
        """A copy of the bias, in its own dtype."""
        with weights_at_hand(self):
            return BiasSlot(Bias(self.bias.detach().clone()))

    def new_rows(self, indices: Sequence[int]) -> TokenSlot:
        """Copies of these rows of the weight, float32 beside a half-precision one.

        Raises:
            GraftError: the weight is not dense.
        """
        with weights_at_hand(self):
            W = self.weight
            if not self._is_dense(W):
                raise GraftError(
                    "its weight is quantised, derived or sharded, so that no row of it can be replaced"
                )
            dtype = dora.wide(W.dtype)
            index = torch.tensor(tuple(indices), device=W.device)
            return TokenSlot(TokenRows(W.detach().index_select(0, index).to(dtype), indices))

    def merged_rows(self, slot: TokenSlot) -> Tensor:
        W, rows = self._mergeable(), slot.rows
        return W.detach().index_copy(0, rows.index, rows.weight.detach().to(W.dtype))

    def renorm(self, slot: Slot) -> None:
        assert slot.magnitude is not None
        with torch.no_grad(), weights_at_hand(self):
            slot.magnitude.weight.copy_(self.row_norm(slot))

    def fresh(self, r: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r) of a new task: A random, B = 0."""
        out_size, in_size = self.matrix_shape()
        return fresh_factors(in_size, out_size, r, device=device, dtype=dtype)

    def matrix(self) -> Tensor:
        W = self._readable()
        if W is None:
            return self._times_weight(torch.eye(self.matrix_shape()[1], device=execution_device(self)))
        return self.as_matrix(W).to(dora.wide(W.dtype))

    def factors(self, slot: Slot) -> tuple[Tensor, Tensor]:
        return slot.down.weight.flatten(1), slot.up.weight.flatten(1)

    def set_factors(self, slot: Slot, A: Tensor, B: Tensor) -> None:
        with torch.no_grad():
            slot.down.weight.copy_(A.reshape(slot.down.weight.shape))
            slot.up.weight.copy_(B.reshape(slot.up.weight.shape))

    def merged_weight(self, slot: Slot) -> Tensor:
        """W + s·B·A, or its DoRA form, computed in at least float32 and rounded once."""
        W = self._mergeable()
        with torch.no_grad():
            dtype = dora.wide(W.dtype)
            V = self.as_matrix(W).to(dtype) + self.delta(slot).to(dtype)
            if slot.magnitude is not None:
                V = dora.ratio(slot.magnitude.weight.to(dtype), self.row_norm(slot))[:, None] * V
            return self.as_weight(V).to(W.dtype).contiguous()

    def _mergeable(self) -> Tensor:
        W = self._parameters.get("weight")
        if W is None or not self._is_dense(W) or W.is_meta:
            raise MergeError(
                f"the weight of {type(self).__name__} is quantised, derived, sharded or offloaded; save the task and "
                "merge it into a model with plain weights"
            )
        return W
