"""Experts against a loop over tokens, by each of the ways in which they are run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orbit.model.activation import ACTIVATIONS
from orbit.model.errors import SettingError
from orbit.model.experts import Experts, grouped_experts
from orbit.model.experts_op import experts as one_by_one

TOKENS, HIDDEN, INNER, EXPERTS = 9, 8, 12, 4


def make(gated: bool = True, activation: str = "silu", **options: torch.dtype) -> Experts:
    torch.manual_seed(0)
    return Experts(HIDDEN, INNER, EXPERTS, gated=gated, activation=activation, **options)


def routed(nobody: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """x, indices, weights; expert 2 gets no token, and some rows have no expert."""
    torch.manual_seed(1)
    x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, 2)
    indices = torch.tensor([0, 1, 3])[torch.rand(TOKENS, 3).argsort(-1)[:, :2]]
    if nobody:
        indices[2] = EXPERTS
        indices[5, 1] = EXPERTS
    return x, indices, weights


def reference(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    phi = ACTIVATIONS[experts.activation].forward
    rows = []
    for t, token in enumerate(x):
        y = torch.zeros_like(token)
        for e, w in zip(indices[t].tolist(), weights[t], strict=True):
            if e == EXPERTS:
                continue
            if experts.gated:
                gate, value = (experts.gate_up_proj[e] @ token).chunk(2)
                h = phi(gate) * value
            else:
                h = phi(experts.up_proj[e] @ token)
            y = y + w * (experts.down_proj[e] @ h)
        rows.append(y)
    return torch.stack(rows)


def by_grouped_mm(experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The route of CUDA devices, which torch can also run here in float32."""
    up = experts.gate_up_proj if experts.gated else experts.up_proj
    sorted_S, order_S = indices.T.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(sorted_S, torch.arange(EXPERTS), right=True, out_int32=True)
    return grouped_experts(x, up, experts.down_proj, weights, order_S, ends_E, experts.activation)


def gradients(run: object, experts: Experts, x: Tensor, indices: Tensor, weights: Tensor) -> list[Tensor]:
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    y = run(experts, x, indices, weights)  # type: ignore[operator]
    return [y, *torch.autograd.grad(y.sin().sum(), [x, weights, *experts.parameters()])]


@pytest.mark.parametrize("nobody", [False, True], ids=["all rows", "rows of nobody"])
@pytest.mark.parametrize(
    ("gated", "activation"), [(True, "silu"), (True, "gelu"), (False, "relu"), (False, "gelu_tanh")]
)
@pytest.mark.parametrize("run", [Experts.__call__, by_grouped_mm], ids=["one by one", "grouped_mm"])
def test_equal_to_a_loop_over_tokens(run: object, gated: bool, activation: str, nobody: bool) -> None:
    experts, batch = make(gated, activation), routed(nobody)
    for found, wanted in zip(
        gradients(run, experts, *batch), gradients(reference, experts, *batch), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_what_nobody_owns_is_never_read() -> None:
    """grouped_mm leaves it as memory was; here that is NaN."""
    experts, (x, indices, weights) = make(), routed(nobody=True)
    torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
    try:
        assert torch.empty(3).isnan().all()
        for found in gradients(by_grouped_mm, experts, x, indices, weights):
            assert found.isfinite().all()
        for found in gradients(Experts.__call__, experts, x, indices, weights):
            assert found.isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_operator_is_well_made() -> None:
    """Its shapes under tracing, its gradients and its schema are what torch expects of an operator."""
    experts, (x, indices, weights) = make(dtype=torch.float64), routed(nobody=True)
    sorted_S, order_S = indices.T.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(sorted_S, torch.arange(EXPERTS), right=True, out_int32=True)
    weights = weights.double().requires_grad_()
    for gated in (True, False):
        experts = make(gated, dtype=torch.float64)
        up = experts.gate_up_proj if gated else experts.up_proj
        arguments = (
            x.double().requires_grad_(),
            up,
            experts.down_proj,
            weights,
            order_S,
            ends_E,
            "silu",
        )
        torch.library.opcheck(
            torch.ops.orbit.experts.default,
            arguments,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        torch.testing.assert_close(torch.ops.orbit.experts(*arguments)[0], one_by_one(*arguments))


def test_frozen_experts_pass_the_gradient_on_and_cost_none_of_their_own() -> None:
    experts, (x, indices, weights) = make(), routed()
    wanted = gradients(Experts.__call__, experts, x, indices, weights)[1:3]
    experts.requires_grad_(False)
    x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
    found = torch.autograd.grad(experts(x, indices, weights).sin().sum(), [x, weights])
    for f, w in zip(found, wanted, strict=True):
        assert torch.equal(f, w)


def test_bfloat16_adds_up_in_float32() -> None:
    """Eight experts that say 1, 2⁻⁸, 2⁻⁸, …: rounded at every step, the small ones would be lost."""
    experts = Experts(8, 8, 8, gated=False, activation="relu", dtype=torch.bfloat16)
    with torch.no_grad():
        experts.up_proj.fill_(1)
        experts.down_proj.fill_(1 / 64)
    weights = torch.full((1, 8), 2.0**-8)
    weights[0, 0] = 1.0
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    y = experts(x, torch.arange(8)[None], weights)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), torch.full((1, 8), 1 + 7 / 256), rtol=0, atol=2**-8)
    assert (y.float() > 1.02).all()


def test_autocast() -> None:
    experts, batch = make(), routed()
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(*batch)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), experts(*batch), rtol=0.05, atol=0.02)
    y.float().sum().backward()
    assert experts.down_proj.grad.dtype is torch.float32


def test_refused() -> None:
    with pytest.raises(SettingError, match="did you mean 'silu'"):
        Experts(8, 8, 2, activation="sillu")
    with pytest.raises(SettingError, match="intermediate_size=0"):
        Experts(8, 0, 2)
