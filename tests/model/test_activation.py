"""Activations: the written derivative is autograd's."""

from __future__ import annotations

import pytest
import torch

from orbit.model.activation import ACTIVATIONS


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_backward_is_the_derivative_of_forward(name: str) -> None:
    phi = ACTIVATIONS[name]
    z = torch.linspace(-4, 4, 50, dtype=torch.float64, requires_grad=True)
    d = torch.randn(50, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(phi.forward(z), z, d)
    torch.testing.assert_close(phi.backward(d, z.detach()), wanted)
