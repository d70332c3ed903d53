"""Gradients of a model's tasks, taken and compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from orbit.adapter import adapter_parameters


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    """The gradients of all tasks by name, which the model then has no more."""
    found = {
        name: None if p.grad is None else p.grad.clone() for name, p in adapter_parameters(model).items()
    }
    model.zero_grad(set_to_none=True)
    return found


def assert_same(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Where one is None the other is, and the rest are close."""
    for name, gradient in expected.items():
        assert (gradient is None) == (got[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(got[name], gradient)
