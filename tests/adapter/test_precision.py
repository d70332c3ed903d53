"""Half precision, every kind × variant: autocast, float32 adapters on a bf16 base, bf16 throughout.

The oracle is the same model in float32 with the very same (rounded) weights.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import adapter_parameters, base_state_dict, inject
from tests.adapter.test_offload import ONE_OF_EACH
from tests.laws.peft_oracle import KINDS
from tests.laws.test_adapters import config, outputs, refused

BF16, FP32 = torch.bfloat16, torch.float32
CELLS = [
    (kind, variant)
    for kind in ONE_OF_EACH
    for variant in ("LoRA", "DoRA", "gated", "gated DoRA", "pissa")
    if refused(kind, variant) is None
]
cells = pytest.mark.parametrize(("kind", "variant"), CELLS)
# where the base lives, where the adapters do, and whether autocast is on
MODES = {
    "autocast": (FP32, FP32, True),
    "bf16 base": (BF16, FP32, False),
    "bf16 base, autocast": (BF16, FP32, True),
    "bf16": (BF16, BF16, False),
}


def make(kind: str, variant: str, base: torch.dtype, adapters: torch.dtype) -> nn.Module:
    model = KINDS[kind].make(base).eval()
    torch.manual_seed(4)
    inject(model, config(kind, variant))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter_parameters(model).items():
            assert parameter.dtype == FP32, name
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return model.to(BF16) if adapters == BF16 else model


def in_float32(kind: str, variant: str, model: nn.Module) -> nn.Module:
    twin = KINDS[kind].make().eval()
    twin.load_state_dict({name: value.float() for name, value in base_state_dict(model).items()})
    inject(twin, config(kind, variant))
    twin.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    return twin


def step(kind: str, model: nn.Module, dtype: torch.dtype, autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
    with torch.autocast("cpu", BF16, enabled=autocast):
        y = outputs(kind, model, dtype)
    y.float().square().mean().backward()
    return y.detach(), {name: p.grad for name, p in adapter_parameters(model).items()}


@pytest.mark.parametrize("mode", MODES)
@cells
def test_near_float32_with_gradients_in_the_adapters_dtype(kind: str, variant: str, mode: str) -> None:
    base, adapters, autocast = MODES[mode]
    model = make(kind, variant, base, adapters)
    y, grads = step(kind, model, base, autocast)
    true, true_grads = step(kind, in_float32(kind, variant, model), FP32, False)
    assert y.dtype == BF16
    assert (y.float() - true).norm() < 0.02 * true.norm()
    largest = max(grad.norm() for grad in true_grads.values())
    for name, grad in grads.items():
        assert grad.dtype == adapters, name
        # A gate's gradient is one number, a sum of what mostly cancels.
        bound = 0.06 * true_grads[name].norm() if grad.dim() else 0.06 * largest
        assert (grad.float() - true_grads[name]).norm() < bound, name
