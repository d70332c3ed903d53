"""Adapted linear layers against PEFT, the oracle: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn

from orbit.adapter import AdapterConfig, GraftError, TargetError, inject, register_forward, task_layers

KINDS = {"lora": {}, "dora": {"dora": True}, "rslora": {"rslora": True}}


def twins(
    make: Callable[[], nn.Module], targets: list[str], dropout: float = 0.0, **kind: Any
) -> tuple[nn.Module, nn.Module]:
    """The same model with the same adapter, ours and PEFT's."""
    mine, theirs = make(), make()
    inject(mine, AdapterConfig(r=3, alpha=6, dropout=dropout, targets=tuple(targets), **kind))
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=dropout,
        target_modules=targets,
        use_dora=kind.get("dora", False),
        use_rslora=kind.get("rslora", False),
    )
    theirs = peft.get_peft_model(theirs, config)
    with torch.no_grad():
        for path, layer in task_layers(mine, "default").items():
            slot, twin = layer.slots()["default"], theirs.base_model.model.get_submodule(path)
            slot.up.weight.normal_(std=0.3)
            twin.lora_A["default"].weight.copy_(slot.down.weight)
            twin.lora_B["default"].weight.copy_(slot.up.weight)
            if slot.magnitude is not None:
                slot.magnitude.weight.add_(torch.rand_like(slot.magnitude.weight))
                twin.lora_magnitude_vector["default"].weight.copy_(slot.magnitude.weight)
    return mine, theirs


def compare(mine: nn.Module, theirs: nn.Module, x: torch.Tensor, *, rtol: float, atol: float) -> None:
    """Outputs, and gradients of the adapters and the input."""
    results = []
    for model in (mine, theirs):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(5)
        y = model(leaf)
        weight = torch.linspace(-1, 1, y.numel()).view(y.shape)
        (y.float() * weight).sum().backward()
        results.append((y, leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=rtol, atol=atol)
    for path, layer in task_layers(mine, "default").items():
        slot, twin = layer.slots()["default"], theirs.base_model.model.get_submodule(path)
        pairs = [(slot.down, twin.lora_A), (slot.up, twin.lora_B)]
        if slot.magnitude is not None:
            pairs.append((slot.magnitude, twin.lora_magnitude_vector))
        for own, other in pairs:
            assert own.weight.grad.abs().max() > 0
            torch.testing.assert_close(own.weight.grad, other["default"].weight.grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_pefts(kind: str, mlp: Callable[[], nn.Module]) -> None:
    mine, theirs = twins(lambda: mlp().double(), ["0", "2", "3"], **KINDS[kind])
    compare(mine, theirs, torch.randn(2, 5, 6).double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_pefts(kind: str, mlp: Callable[[], nn.Module]) -> None:
    mine, theirs = twins(lambda: mlp().double(), ["0", "2"], dropout=0.4, **KINDS[kind])
    x = torch.randn(7, 6).double()
    compare(mine.train(), theirs.train(), x, rtol=1e-9, atol=1e-12)
    mine.zero_grad()
    theirs.zero_grad()
    compare(mine.eval(), theirs.eval(), x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_base_has_float32_adapters_as_in_peft(kind: str, mlp: Callable[[], nn.Module]) -> None:
    mine, theirs = twins(lambda: mlp().bfloat16(), ["0", "2"], **KINDS[kind])
    slot = task_layers(mine, "default")["0"].slots()["default"]
    assert {owner.weight.dtype for owner in slot if owner is not None} == {torch.float32}
    assert mine(torch.randn(3, 6).bfloat16()).dtype == torch.bfloat16
    compare(mine, theirs, torch.randn(4, 6).bfloat16(), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_is_pefts(kind: str, mlp: Callable[[], nn.Module]) -> None:
    mine, theirs = twins(mlp, ["0", "2"], **KINDS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        compare(mine, theirs, torch.randn(4, 6), rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_fresh_adapter_returns_the_very_bits(
    kind: str, dropout: float, mlp: Callable[[], nn.Module]
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model, x = mlp().to(dtype), torch.randn(5, 6).to(dtype)
        before = model(x)
        inject(model, AdapterConfig(r=4, dropout=dropout, **KINDS[kind]))
        assert torch.equal(model(x), before)


class Int8Linear(nn.Linear):
    """A quantised linear as they are made: an integer weight, and a forward of its own."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=dense.bias is not None)
        step = dense.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((dense.weight / step).round().to(torch.int8), requires_grad=False)
        self.register_buffer("step", step.detach())
        self.bias = dense.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.step, self.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_stay_quantised(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orbit.adapter.kinds.registry._IN_FRONT", set())
    quantised = Int8Linear(nn.Linear(8, 6))
    with pytest.raises(TargetError, match=r"register_forward\(Int8Linear\)"):
        inject(nn.ModuleDict({"a": quantised}), AdapterConfig(targets=("a",)))
    register_forward(Int8Linear)
    dense = nn.Linear(8, 6)
    with torch.no_grad():
        dense.weight.copy_(quantised.weight * quantised.step)
        dense.bias.copy_(quantised.bias)
    x = torch.randn(4, 8)
    torch.testing.assert_close(quantised(x), dense(x))
    for model in (quantised, dense):
        torch.manual_seed(1)
        inject(model, AdapterConfig(r=3, **KINDS[kind]))
        with torch.no_grad():
            model.slots()["default"].up.weight.copy_(torch.linspace(-1, 1, 18).view(6, 3))
    torch.testing.assert_close(quantised(x), dense(x), rtol=1e-4, atol=1e-5)
    assert quantised.weight.dtype == torch.int8


def test_a_parametrized_weight_is_followed(mlp: Callable[[], nn.Module]) -> None:
    class Double(nn.Module):
        def forward(self, W: torch.Tensor) -> torch.Tensor:
            return 2 * W

    plain, x = nn.Linear(6, 4), torch.randn(3, 6)
    dense = nn.Linear(6, 4)
    with torch.no_grad():
        dense.weight.copy_(2 * plain.weight)
        dense.bias.copy_(plain.bias)
    nn.utils.parametrize.register_parametrization(plain, "weight", Double())
    for model in (plain, dense):
        torch.manual_seed(1)
        inject(model, AdapterConfig(r=3, dora=True))
        with torch.no_grad():
            model.slots()["default"].up.weight.copy_(torch.linspace(-1, 1, 12).view(4, 3))
    torch.testing.assert_close(plain(x), dense(x))


def test_a_changed_output_width_is_refused() -> None:
    layer = nn.Linear(6, 4)
    inject(layer, AdapterConfig(r=3))
    layer.weight, layer.bias = nn.Parameter(torch.randn(5, 6)), None
    with pytest.raises(GraftError, match="5 features and its adapter 4"):
        layer(torch.randn(2, 6))


@pytest.mark.parametrize("kind", [{}, {"dora": True}], ids=["lora", "dora"])
def test_shapes_on_the_meta_device(kind: dict[str, bool], mlp: Callable[[], nn.Module]) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2, **kind))
    assert model.to("meta")(torch.empty(4, 6, device="meta")).shape == (4, 3)


def test_a_layer_says_whether_it_is_fused_with_its_base(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(2 * x)

    monkeypatch.setattr("orbit.adapter.kinds.registry._IN_FRONT", set())
    register_forward(Int8Linear)
    dense, quantised, sub = nn.Linear(6, 4), Int8Linear(nn.Linear(6, 4)), Doubled(6, 4)
    for layer in (dense, quantised, sub):
        inject(layer, AdapterConfig(r=3))
    assert "low-rank fused" in repr(dense)
    assert "low-rank beside" in repr(quantised)
    assert "low-rank fused" in repr(sub)  # what it passes on to torch's forward is what the adapter sees
    dense.double()
    assert "low-rank fused" in repr(dense)
    nn.utils.parametrize.register_parametrization(dense, "weight", nn.Identity())
    assert "low-rank beside" in repr(dense)
