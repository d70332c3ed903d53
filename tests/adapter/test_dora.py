"""DoRA's norm, scale and cache against the dense formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orbit.adapter import AdapterConfig, inject, task_layers
from orbit.adapter.dora import ratio, rescale, row_norm, squared_rows


def adapted(bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    layer = nn.Linear(6, 5, bias=bias, dtype=dtype)
    inject(layer, AdapterConfig(r=3, alpha=2, dora=True))
    with torch.no_grad():
        slot = layer.slots()["default"]
        slot.up.weight.normal_()
        slot.magnitude.weight.add_(torch.rand(5))
    return layer


def test_row_norm_is_the_dense_norm() -> None:
    W, A, B = torch.randn(5, 6).double(), torch.randn(3, 6).double(), torch.randn(5, 3).double()
    s = torch.tensor(0.7).double()
    torch.testing.assert_close(
        row_norm(squared_rows(W), W @ A.T, A, B, s), torch.linalg.vector_norm(W + s * B @ A, dim=1)
    )


def test_row_norm_survives_exact_cancellation() -> None:
    A = torch.eye(3)
    W = torch.randn(4, 3)
    n = row_norm(squared_rows(W), W @ A.T, A, -W, torch.tensor(1.0))
    assert (n < 1e-3).all()
    assert torch.isfinite(n).all()


def test_ratio_of_an_empty_row_is_one_and_differentiable() -> None:
    m = torch.tensor([0.0, 2.0], requires_grad=True)
    c = ratio(m, torch.tensor([0.0, 4.0]))
    assert c.tolist() == [1.0, 0.5]
    c.sum().backward()
    assert m.grad.tolist() == [0.0, 0.25]


def test_rescale_by_one_returns_the_very_bits() -> None:
    u, bias = torch.randn(7, 5), torch.randn(5)
    assert torch.equal(rescale(u, bias, torch.ones(5)), u)
    torch.testing.assert_close(rescale(u, bias, torch.full((5,), 3.0)), bias + 3 * (u - bias))


@pytest.mark.parametrize("bias", [True, False])
def test_layer_is_the_dense_formula_with_the_norm_detached(bias: bool) -> None:
    layer = adapted(bias)
    slot = layer.slots()["default"]
    x = torch.randn(4, 6).double().requires_grad_()
    parameters = [x, slot.down.weight, slot.up.weight, slot.magnitude.weight]
    V = layer.weight + slot.up.scale * slot.up.weight @ slot.down.weight
    W = (slot.magnitude.weight / V.detach().norm(dim=1))[:, None] * V
    dense = torch.nn.functional.linear(x, W, layer.bias)
    weight = torch.randn(4, 5).double()
    torch.testing.assert_close(layer(x), dense)
    torch.testing.assert_close(
        torch.autograd.grad((weight * layer(x)).sum(), parameters),
        torch.autograd.grad((weight * dense).sum(), parameters),
    )


def test_magnitude_gradient_is_that_of_the_output() -> None:
    """dm = Σ dy∘(y − bias)/m, wherever m is not 0; and where it is, Σ dy∘(u − bias)/n."""
    layer = adapted()
    m = layer.slots()["default"].magnitude.weight
    x, dy = torch.randn(4, 6).double(), torch.randn(4, 5).double()
    y = layer(x)
    (grad,) = torch.autograd.grad(y, m, dy)
    torch.testing.assert_close(grad, (dy * (y - layer.bias)).sum(0) / m)
    with torch.no_grad():
        m[0] = 0
    (at_zero,) = torch.autograd.grad(layer(x), m, dy)
    torch.testing.assert_close(at_zero, grad)  # linear in m: the same everywhere


def test_an_empty_row_changes_nothing_and_learns() -> None:
    layer = nn.Linear(6, 5)
    nn.init.zeros_(layer.weight)
    x = torch.randn(4, 6)
    before = layer(x)
    inject(layer, AdapterConfig(r=3, dora=True))
    assert torch.equal(layer(x), before)
    layer(x).square().sum().backward()
    assert torch.isfinite(layer.slots()["default"].up.weight.grad).all()


def test_norm_follows_a_fused_optimizer_which_leaves_no_mark() -> None:
    layer = adapted(dtype=torch.float32)
    slot = layer.slots()["default"]
    layer.row_norm(slot)
    optimizer = torch.optim.SGD([layer.weight.requires_grad_(True)], lr=0.5, fused=True)
    layer(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    layer.weight.requires_grad_(False)
    dense = layer.weight + slot.up.scale * slot.up.weight @ slot.down.weight
    torch.testing.assert_close(layer.row_norm(slot), dense.detach().norm(dim=1), rtol=1e-4, atol=1e-5)


def test_norm_of_the_weight_is_computed_once_and_again_when_the_weight_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = adapted(dtype=torch.float32)
    slot = layer.slots()["default"]
    calls = []
    monkeypatch.setattr("orbit.adapter.dora.squared_rows", lambda W: calls.append(1) or squared_rows(W))

    def norm() -> torch.Tensor:
        value = layer.row_norm(slot)
        dense = layer.weight + slot.up.scale * slot.up.weight @ slot.down.weight
        torch.testing.assert_close(value, dense.norm(dim=1), rtol=1e-4, atol=1e-5)
        return value

    norm()
    calls.clear()
    norm()
    with torch.no_grad():
        slot.up.weight.mul_(2)
    norm()
    assert not calls
    with torch.no_grad():
        layer.weight.mul_(3)
    norm()
    layer.load_state_dict({"weight": torch.randn(5, 6), "bias": torch.zeros(5)})
    norm()
    layer.weight = nn.Parameter(torch.randn(5, 6), requires_grad=False)
    norm()
    assert len(calls) == 3
    layer.weight.requires_grad_(True)  # a weight that trains may be written in ways that leave no mark
    norm()
    norm()
    assert len(calls) == 5
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.mul_(2)
    assert not torch.allclose(twin.row_norm(twin.slots()["default"]), norm())


def test_small_updates_survive_a_bf16_weight() -> None:
    """W + s·B·A in bf16 would be W: the delta lies below its last bit."""
    layer = nn.Linear(64, 64, dtype=torch.bfloat16)
    inject(layer, AdapterConfig(r=2, alpha=2, dora=True))
    slot = task_layers(layer, "default")[""].slots()["default"]
    with torch.no_grad():
        slot.up.weight.normal_(std=1e-4)
    delta = slot.up.scale * slot.up.weight @ slot.down.weight
    assert torch.equal(layer.weight + delta.bfloat16(), layer.weight) or delta.abs().max() < 1e-3
    exact = (layer.weight.double() + delta.double()).norm(dim=1)
    torch.testing.assert_close(layer.row_norm(slot).double(), exact, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dora", [True, False])
def test_an_ensemble_by_vmap(dora: bool) -> None:
    """torch's model ensembling: every tensor is batched, the frozen weight whose norm is kept too."""
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(5, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)))
        inject(models[-1], AdapterConfig(r=2, dora=dora, targets=("0", "2")))
        for parameter in models[-1].parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    tensors, x = torch.func.stack_module_state(models), torch.randn(4, 5)
    hollow = copy.deepcopy(models[0]).to("meta")
    many = torch.func.vmap(lambda *given: torch.func.functional_call(hollow, given, (x,)))(*tensors)
    for model, y in zip(models, many, strict=True):
        torch.testing.assert_close(model(x), y)


def test_a_weight_written_behind_torchs_back_is_seen_at_the_next_switch_of_mode() -> None:
    """`weight.data.copy_(…)`, as older loaders do, leaves no mark on the weight."""
    torch.manual_seed(0)
    layer, x = nn.Linear(5, 4), torch.randn(2, 5)
    inject(layer, AdapterConfig(r=2, dora=True))
    layer(x)
    layer.weight.data.mul_(3)
    layer.eval()
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
