"""Adapted `nn.Linear` and its subclasses.

    y = u + D∘(u − b) + (C∘(x·Aᵀ))·Bᵀ          `lora.py`;   LoRA: C = g·s, D = 0
    DoRA: D = c − 1 and c∘B in the place of B,   c = m/‖W + s·B·A‖          `dora.py`
    with dropout:  u + [the same of drop(x), its own W·drop(x) included, − u of drop(x)], as PEFT

x (…, in)   u = x·Wᵀ + b, y (…, out)   A (r, in)   B (out, r)   m, c (out,)

A task's own bias b_t stands in the place of b. Rows of W that a task replaces (`tokens.py`, in a tied head) change the
features of their numbers: y[…, i] = u[…, i] + x·(rowᵢ − W[i]).

Where the layer's own forward is torch's and W is dense, the layer is computed as a whole (`lora.fused`), else
beside u, which the layer's own forward computes whatever it is (`lora.low_rank`). `repr` says which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.errors import GraftError, ScalingsError
from orbit.adapter.graft import Graft
from orbit.adapter.kinds.dense import DenseGraft
from orbit.adapter.kinds.registry import register_kind
from orbit.adapter.lora import compute_dtype, fused, low_rank
from orbit.adapter.offload import refuse_meta
from orbit.adapter.owners import AnySlot, Bias, Slot, TokenRows
from orbit.adapter.routes.plan import Mix
from orbit.adapter.routes.stacks import (
    Kept,
    Stack,
    Terms,
    by_rank,
    end_to_end,
    grouped,
    per_row,
    stacked,
    together,
)


class LinearGraft(DenseGraft, nn.Linear):
    """The mixin for `nn.Linear`; `registry.py` decides where it goes among the layer's bases."""

    LINEAR = True
    _torchs_forward: ClassVar[bool]

    def one(self, slot: AnySlot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if type(slot) is not Slot:
            return super().one(slot, input, *args, **kwargs)
        if self._is_short(slot):
            return self._low_rank(input, *self._terms(slot), args, kwargs, slot.bias)
        if slot.down.start is not None:
            return super().one(slot, input, *args, **kwargs)
        A, B, C, D = self._terms(slot)
        u = self.rebiased(self.base(input, *args, **kwargs), slot.bias)
        self._refuse_misfit(u.shape[-1], input, A, B)
        x = F.dropout(input, slot.down.dropout)
        if D is None:
            return low_rank(u, x, A, B, C)
        b = self.bias if slot.bias is None else slot.bias.weight
        dropped = self.rebiased(self.base(x, *args, **kwargs), slot.bias)
        return u + (low_rank(dropped, x, A, B, C, D, b) - dropped)

    def mixed(self, mix: Mix, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output under several tasks; `stacks.py` says which way is taken and why."""
        slots = [slot for slot in mix.slots if type(slot) is Slot and self._is_short(slot)]
        scaled = mix.rows is None and mix.weights.dim() > 1
        if scaled and input.dim() == 2:
            mix = self._flattened(mix, input)
        if len(slots) < len(mix.slots) or (scaled and input.shape[:-1] != mix.weights.shape[:-1]):
            return super().mixed(mix, input, *args, **kwargs)
        if mix.rows is not None:
            mix = self.fitted(mix, input)
        y = self._short(mix, slots, input, args, kwargs)
        shift = self._shift(mix, slots, input.dim())
        return y if shift is None else y + shift.to(y.dtype)

    def _flattened(self, mix: Mix, input: Tensor) -> Mix:
        """A mix of weights per token for an input (batch·sequence, in)."""
        tokens = mix.weights.shape[:-1]
        if not mix.flat or len(input) != tokens.numel():
            raise ScalingsError(
                f"scalings for (batch, sequence) = {tuple(tokens)} do not fit an input of {len(input)} rows, which "
                "tokens they are is unknown",
                self,
            )
        return mix._replace(weights=mix.weights.flatten(0, 1))

    def _short(
        self, mix: Mix, slots: list[Slot], input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The output under tasks whose updates are short, with the layer's own bias."""
        if torch.compiler.is_compiling() or mix.order is None:
            return self._together(mix, slots, input, args, kwargs)
        most = max(slot.up.r for slot in slots)
        if input.numel() >= most * len(mix.weights) * input.shape[-1]:
            stack = stacked([self._terms(slot) for slot in slots], mix.order.none)
            return self._low_rank(input, *per_row(stack, mix.order, input.dim()), args, kwargs)
        if torch.is_grad_enabled():
            return self._together(mix, slots, input, args, kwargs)
        u = self.base(input, *args, **kwargs)
        none, kept = mix.order.none, mix.order.kept
        sources = self._sources(slots)
        stack = self._kept_stack(kept, id(self), slots, sources, u.dtype, lambda terms: stacked(terms, none))
        self._refuse_misfit(u.shape[-1], input, stack.A, stack.B)
        return grouped(u, self.bias, input, stack, mix.order)

    def _sources(self, slots: list[Slot]) -> list[Tensor]:
        """What the tasks' terms are made of."""
        owners = [owner for slot in slots for owner in slot if owner is not None]
        found = [owner._parameters["weight"] for owner in owners]
        if any(slot.magnitude is not None for slot in slots):
            found.extend(self._parameters.values())
        return [t for t in found if t is not None]

    def _kept_stack(
        self,
        place: dict[Any, Kept],
        key: object,
        slots: list[Slot],
        sources: list[Tensor],
        dtype: torch.dtype,
        make: Callable[[list[Terms]], Stack],
    ) -> Stack:
        """What `make` makes of the tasks' terms, in this dtype, without gradient, and kept in a place under a key."""
        kept, age = place.get(key), self.stacks_age
        if kept is None or not kept.holds(sources, age, dtype):
            with torch.inference_mode(False), torch.no_grad():  # it may serve a training step
                A, B, D = make([self._terms(slot) for slot in slots])
                stack = Stack(A.to(dtype), B.to(dtype), D)
            kept = Kept.made_from(sources, age, stack)
            if kept is None:
                return stack
            place[key] = kept
        return kept.stack

    def _shift(self, mix: Mix, slots: list[Slot], dims: int) -> Tensor | None:
        """Σ_t w_t·(b_t − b), broadcastable to an output of so many dimensions; None where no task has a b_t."""
        if all(slot.bias is None for slot in slots):
            return None
        each = [torch.zeros_like(self.bias) if s.bias is None else s.bias.weight - self.bias for s in slots]
        return self._spread(mix, dims).to(self.bias.dtype) @ torch.stack(each)

    def _spread(self, mix: Mix, dims: int) -> Tensor:
        """The weights (…, tasks), with axes of one where rows have several positions."""
        if mix.rows is None:
            return mix.weights
        return mix.weights.view(len(mix.weights), *[1] * (dims - 2), -1)

    def with_rows(self, base: Tensor, rows: TokenRows, input: Tensor) -> Tensor:
        change = rows.weight - self.weight.index_select(0, rows.index).to(rows.weight.dtype)
        update = F.linear(input.to(base.dtype), change.to(base.dtype))
        return base.index_add(-1, rows.index, update.to(base.dtype))

    def _is_short(self, slot: Slot) -> bool:
        """Is the task's update one product of A and B, of the layer's very input?"""
        return slot.down.start is None and not (self.training and slot.down.dropout)

    def _together(
        self, mix: Mix, slots: list[Slot], input: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The output under tasks whose updates are one product, their ranks end to end."""
        stack = self._end_to_end(slots, input)
        weights, ranks = self._spread(mix, input.dim()), tuple(slot.up.r for slot in slots)
        dtype = slots[0].up.scale.dtype
        if torch.compiler.is_compiling() or mix.derived is None:
            C = by_rank(weights.to(dtype), ranks)
        else:  # once for all layers; keyed by the mode for the same reason as in `Scaled.at`
            key = (ranks, weights.dim(), dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
            if key not in mix.derived:
                mix.derived[key] = by_rank(weights.to(dtype), ranks)
            C = mix.derived[key]
        return self._low_rank(input, *together(stack, weights, C), args, kwargs)

    def _end_to_end(self, slots: list[Slot], input: Tensor) -> Stack:
        """The tasks end to end; kept with the layer while all are frozen, beside the tensors that they own."""
        if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            sources = self._sources(slots)
            if not any(t.requires_grad for t in sources):
                dtype = compute_dtype(input, self.weight) if self.fuses else slots[0].down.weight.dtype
                place = self.__dict__.setdefault("_orbit_kept", {})
                return self._kept_stack(place, "end to end", slots, sources, dtype, end_to_end)
        return end_to_end([self._terms(slot) for slot in slots])

    def _terms(self, slot: Slot) -> Terms:
        A, B = slot.down.weight, slot.up.weight
        trains = (
            A.requires_grad
            or B.requires_grad
            or any(o is not None and o.weight.requires_grad for o in slot[2:])
        )
        if trains and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.forget_stacks()
        if slot.magnitude is None:
            return Terms(A, B, slot.coefficient, None)
        refuse_meta(A, self.weight)
        c = dora.ratio(slot.magnitude.weight, self.row_norm(slot))
        return Terms(A, c[:, None] * B, slot.coefficient, c - 1)

    def _low_rank(
        self,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor | None,
        D: Tensor | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        bias: Bias | None = None,
    ) -> Tensor:
        b = self.bias if bias is None else bias.weight
        if self.fuses and not args and not kwargs:
            self._refuse_misfit(self.weight.shape[0], x, A, B)
            return fused(x, self.weight, b, A, B, C, D)
        u = self.rebiased(self.base(x, *args, **kwargs), bias)
        self._refuse_misfit(u.shape[-1], x, A, B)
        return low_rank(u, x, A, B, C, D, b)

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
        return f"{super().extra_repr()}, {self._way()}"

    def __repr__(self) -> str:
        said, own = super().__repr__(), vars(self).get("extra_repr")  # torchao puts one on the instance
        return said if own is None else said.replace(own(), f"{own()}, {self._way()}", 1)

    def _way(self) -> str:
        return f"low-rank {'fused' if self.fuses else 'beside'}"

    def _refuse_misfit(self, out: int, x: Tensor, A: Tensor, B: Tensor) -> None:
        if out != B.shape[-2]:
            raise GraftError(
                f"a layer gives {out} features and its adapter {B.shape[-2]}: "
                "its weight was replaced (resize_token_embeddings?); resize before injecting"
            )
        refuse_meta(A, x)

    def branch(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        return linear_branch(base, x, slot)

    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def times_hidden_weight(self, A: Tensor) -> Tensor:
        """W·Aᵀ (out, r) of a weight that cannot be read: the layer's own forward multiplies by it."""
        product = self.base(A)
        return (product if self.bias is None else product - self.bias).T


def linear_branch(base: Tensor, x: Tensor, slot: Slot) -> Tensor:
    """base + g·s·x·Aᵀ·Bᵀ: what the branch of a layer that maps (…, in) to (…, out) computes."""
    return low_rank(base, x, slot.down.weight, slot.up.weight, slot.coefficient)


register_kind(nn.Linear, LinearGraft)
