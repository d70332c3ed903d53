"""Adapted `Conv1D` of transformers (GPT-2's linear layer, no convolution).

    y = x·W + b    W (in, out): the matrix of `dense.py` is Wᵀ    A (r, in)   B (out, r)   m (out,)

The branch is that of a linear layer (`lora.py`). PEFT calls the transposed weight `fan_in_fan_out`. The class is
known by its path, so that transformers is not imported before a model brings it.
"""

from __future__ import annotations

from torch import Tensor

from orbit.adapter.kinds.dense import DenseGraft
from orbit.adapter.kinds.linear import linear_branch
from orbit.adapter.kinds.registry import register_kind
from orbit.adapter.owners import Slot


class Conv1DGraft(DenseGraft):
    """The mixin; `registry.py` derives it from Conv1D where a model has one."""

    LINEAR = True

    nf: int
    nx: int

    def branch(self, base: Tensor, x: Tensor, slot: Slot) -> Tensor:
        return linear_branch(base, x, slot)

    @staticmethod
    def as_matrix(W: Tensor) -> Tensor:
        return W.T

    def as_weight(self, M: Tensor) -> Tensor:
        return M.T

    def matrix_shape(self) -> tuple[int, int]:
        return self.nf, self.nx


register_kind("transformers.pytorch_utils.Conv1D", Conv1DGraft)
