"""The same adapters on every device: what a CPU computes in float32 is what a GPU does under autocast and compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import TaskOptimizers, adapter_parameters, inject, merge, route, unmerge
from tests.adapter.test_offload import ONE_OF_EACH
from tests.laws.peft_oracle import KINDS, result
from tests.laws.test_adapters import config, refused

DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
CELLS = pytest.mark.parametrize(
    ("kind", "variant"),
    [(k, v) for k in ONE_OF_EACH for v in ("LoRA", "DoRA", "gated") if refused(k, v) is None],
)


def three(kind: str, variant: str) -> nn.Module:
    """Tasks a, b, c with something in them, in float32 on the CPU."""
    model = KINDS[kind].make().eval()
    for seed, name in enumerate("abc"):
        inject(model, config(kind, variant), name)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(model, name).values():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
    return model


def batch(kind: str, device: str) -> list[Tensor]:
    return [x.to(device) for x in KINDS[kind].batch()]


def run(model: nn.Module, inputs: list[Tensor], rows: list[str | None]) -> tuple[Tensor, dict[str, Tensor]]:
    with route(model, rows):
        y = result(model(*inputs))
    y.float().square().mean().backward()
    return y.detach(), {n: p.grad for n, p in adapter_parameters(model).items() if p.grad is not None}


def off(mine: Tensor, true: Tensor) -> float:
    mine, true = mine.detach().double().cpu(), true.detach().double().cpu()
    return float((mine - true).norm() / true.norm().clamp_min(1e-30))


@DEVICES
@CELLS
@pytest.mark.parametrize("way", ["float32", "autocast", "compiled"])
def test_rows_of_tasks(kind: str, variant: str, way: str, device: str) -> None:
    if way == "compiled" and device == "cpu":
        pytest.skip("compiled on the CPU in test_compiled.py")
    model = three(kind, variant)
    n = len(KINDS[kind].batch()[0])
    rows = (["a", None, "b", "a"] * n)[:n]
    true, grads = run(copy.deepcopy(model), batch(kind, "cpu"), rows)
    model.to(device)
    if way == "compiled":
        model.compile(fullgraph=True)
    with torch.autocast(device, torch.bfloat16, enabled=way == "autocast"):
        y, mine = run(model, batch(kind, device), rows)
    tolerance = 0.06 if way == "autocast" else 1e-4
    assert off(y, true) < tolerance
    assert mine.keys() == grads.keys()
    for name, grad in mine.items():
        assert grad.dtype == torch.float32
        if "gate" not in name or way != "autocast":  # one number, of terms that cancel
            assert off(grad, grads[name]) < tolerance, name


@DEVICES
def test_merging_and_moving(device: str) -> None:
    model = three("Linear", "DoRA").to(device)
    inputs = batch("Linear", device)
    with torch.no_grad():
        before = model(*inputs, task="b")
        merge(model, "b")
        assert off(model(*inputs), before) < 1e-5
        unmerge(model)
        assert torch.equal(model(*inputs, task="b"), before)
        assert off(model.cpu()(*batch("Linear", "cpu"), task="b"), before) < 1e-5


@DEVICES
def test_tasks_are_trained_together(device: str) -> None:
    model = three("Linear", "LoRA").to(device).train()
    optimizer = TaskOptimizers(
        {t: torch.optim.AdamW(adapter_parameters(model, t).values(), lr=1e-2) for t in "abc"}, clip=1.0
    )
    kept = {name: p.clone() for name, p in adapter_parameters(model, "c").items()}
    first = last = None
    for _ in range(20):
        rows = ["a", "b", "a", "b"]
        losses = model(*batch("Linear", device), task=rows).square().flatten(1).mean(1)
        optimizer.outcome(losses, rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = losses if first is None else first, losses
    assert last.mean() < first.mean()
    assert all(torch.equal(p, kept[name]) for name, p in adapter_parameters(model, "c").items())
