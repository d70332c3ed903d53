"""Adapted `nn.Embedding` and its subclasses: the layer computes a row of W' = W + ΔW for every index.

    y[i] = W[i] + s·A[:, i]·Bᵀ                       DoRA: y[i] = c∘(W[i] + s·A[:, i]·Bᵀ),  c = m/n

    W (num, dim), so that ΔW = s·(B·A)ᵀ, the transpose of the matrix view (`dense.py`)
    A (r, num), zero at the start   B (dim, r), normal   m, n, c (dim,): one for every feature, as in PEFT

Whatever torch does to the gradient of a row of W, it does to that of W', and so to A, B and m: nothing comes from
positions at `padding_idx`, and `scale_grad_by_freq` divides by the number of times that an index occurs:

    dy[i] is multiplied by w[i] = 0 or 1/count(i) on its way to A, B and c; the base's own forward sees to W

(PEFT scales A's gradient alone.) `sparse` concerns W; an A of r rows has no use for it. Dropout does not apply,
as in PEFT: an index cannot be dropped. A layer with `max_norm` shrinks rows of W as they are used: its update is
added to the shrunken row, and DoRA and merging, which need all of W' as it is, are refused.

Rows that a task replaces (`tokens.py`): y[i] = rowᵢ where i is one of them, else W[i].

A subclass that computes its indices (OPT's positions) or scales what it finds (Gemma's) calls super().forward: the
update lies inside of that. A head that is tied to the embedding reads W, and stays as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbit.adapter import dora
from orbit.adapter.config import LayerConfig
from orbit.adapter.errors import GraftError, MergeError, RouteError
from orbit.adapter.kinds.dense import DenseGraft
from orbit.adapter.kinds.registry import register_kind
from orbit.adapter.lora import compute_dtype
from orbit.adapter.offload import refuse_meta
from orbit.adapter.owners import Slot, TokenRows, TokenSlot
from orbit.adapter.routes.plan import Mix


class EmbeddingGraft(DenseGraft, nn.Embedding):
    """The mixin for `nn.Embedding`."""

    FILE_NAMES: ClassVar[Mapping[str, str]] = {
        "lora_embedding_A.weight": "lora_embedding_A",
        "lora_embedding_B.weight": "lora_embedding_B",
        "lora_magnitude.weight": "lora_magnitude_vector",
    }

    BANKS: ClassVar[tuple[str, ...]] = (
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude",
        "lora_gate",
        "lora_bias",
    )

    def beside(self, base: Tensor, slot: Slot, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        share = self._gradient_share(input)
        u = (base + self._update(base, slot, input, share)).to(base.dtype)
        if slot.magnitude is None:
            return u
        c = dora.ratio(slot.magnitude.weight, self.row_norm(slot))
        return dora.rescale(u, None, _share_gradient(c.expand(u.shape), share))

    def _update(self, base: Tensor, slot: Slot, input: Tensor, share: Tensor | None) -> Tensor:
        """The rows of ΔW (…, dim) for these indices, in the dtype in which the branch multiplies."""
        self._refuse_misfit(slot)
        update = self._rows_of_update(base, slot, input)
        if slot.start is not None:
            update = update - self._rows_of_update(base, slot.start, input)
        return _share_gradient(update, share)

    def _rows_of_update(self, base: Tensor, slot: Slot, input: Tensor) -> Tensor:
        A, B = slot.down.weight, slot.up.weight
        dtype = compute_dtype(base, A)
        return (slot.coefficient * F.embedding(input, A.T).to(dtype)) @ B.to(dtype).T

    def with_rows(self, base: Tensor, rows: TokenRows, input: Tensor) -> Tensor:
        hit, which = rows.find(input)
        found = _share_gradient(F.embedding(which, rows.weight), self._gradient_share(input))
        return torch.where(hit[..., None], found.to(base.dtype), base)

    def mixed(self, mix: Mix, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Several tasks. Indices (1, …) that all rows share, such as positions, are repeated for every row.

        Raises:
            RouteError: one task per row, and indices (n,) where n is not the number of rows: those of a batch or
                positions of a sequence?
        """
        if mix.weights.dim() > 1:
            rows = len(mix.weights)
            if input.dim() > 1 and input.shape[0] == 1:
                input = input.expand(rows, *input.shape[1:])
            elif input.dim() < 2 and input.shape != (rows,):
                raise RouteError(
                    f"an embedding was given indices {tuple(input.shape)} under a route for {rows} rows; "
                    "give it (rows, …), or (1, …) if all rows share them"
                )
        low_rank = all(isinstance(slot, Slot) and slot.magnitude is None for slot in mix.slots)
        if mix.rows is None or not low_rank or torch.compiler.is_compiling():
            return super().mixed(mix, input, *args, **kwargs)
        return self._low_rank_rows(self.fitted(mix, input), input, *args, **kwargs)

    def _low_rank_rows(self, mix: Mix, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """One task per row: the base once, and on it the updates of the rows that have one."""
        assert mix.rows is not None
        base = self.base(input, *args, **kwargs)
        used = [(slot, rows) for slot, rows in zip(mix.slots, mix.rows, strict=False) if len(rows)]
        updates = []
        for slot, rows in used:
            own = input.index_select(0, rows)
            updates.append(self._update(base, slot, own, self._gradient_share(own)))  # type: ignore[arg-type]
        update = torch.cat(updates)
        wide = torch.promote_types(base.dtype, update.dtype)
        order = torch.cat([rows for _, rows in used])
        return base.to(wide).index_add(0, order, update.to(wide)).to(base.dtype)

    def _gradient_share(self, input: Tensor) -> Tensor | None:
        """w (…, 1): which share of the gradient of each position reaches its row."""
        if not torch.is_grad_enabled() or (self.padding_idx is None and not self.scale_grad_by_freq):
            return None
        share = torch.ones(input.shape, device=input.device, dtype=dora.wide(self.weight.dtype))
        if self.scale_grad_by_freq:
            counts = share.new_zeros(self.num_embeddings).index_add(0, input.flatten(), share.flatten())
            share = 1 / counts[input.long()]
        if self.padding_idx is not None:
            share = share.masked_fill(input == self.padding_idx, 0)
        return share[..., None]

    def _refuse_misfit(self, slot: Slot) -> None:
        num = slot.down.weight.shape[1]
        if self.weight.shape[0] != num:
            raise GraftError(
                f"an embedding has {self.weight.shape[0]} rows and its adapter {num}: its weight was replaced "
                "(resize_token_embeddings?); resize before injecting"
            )
        refuse_meta(slot.down.weight, self.weight)

    # -- what DenseGraft asks of a kind ----------------------------------------------------------------------

    @staticmethod
    def as_matrix(W: Tensor) -> Tensor:
        return W.T

    def as_weight(self, M: Tensor) -> Tensor:
        return M.T

    def matrix_shape(self) -> tuple[int, int]:
        return self.embedding_dim, self.num_embeddings

    def fresh(self, r: int, *, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A = 0 and B normal, as in PEFT: of A only the columns of tokens that were seen are trained."""
        A = torch.zeros(r, self.num_embeddings, device=device, dtype=dtype)
        return A, torch.randn(self.embedding_dim, r, device=device, dtype=dtype)

    def new_slot(self, config: LayerConfig) -> Slot:
        if config.dora and self.max_norm is not None:
            raise GraftError("it has max_norm, which changes the weight whose norm DoRA takes; use LoRA")
        return super().new_slot(config)

    def new_rows(self, indices: Sequence[int]) -> TokenSlot:
        if self.max_norm is not None:
            raise GraftError(
                "it has max_norm, which shrinks its rows as they are used, and not those of a task"
            )
        return super().new_rows(indices)

    def merged_weight(self, slot: Slot) -> Tensor:
        if self.max_norm is not None:
            raise MergeError("it has max_norm, which would shrink the merged rows as it shrinks its own")
        return super().merged_weight(slot)


class _ShareGradient(torch.autograd.Function):
    """The identity; its gradient is multiplied by a share."""

    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, share: Tensor) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, dt: Tensor) -> tuple[Tensor, None]:
        (share,) = ctx.saved_tensors
        return dt * share.to(dt.dtype), None


def _share_gradient(t: Tensor, share: Tensor | None) -> Tensor:
    return t if share is None else _ShareGradient.apply(t, share)


register_kind(nn.Embedding, EmbeddingGraft)
