"""SAM: its equations in numpy, its two ways to be called by hand, and what it shares with its base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import TaskOptimizers
from orbit.optim import SAM
from tests import tiny

A = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0.0, 0.3, 4.0]])  # L(w) = ½ wᵀAw


def numpy_sam(w: np.ndarray, steps: int, rho: float, adaptive: bool, lr: float) -> np.ndarray:
    for _ in range(steps):
        g = A @ w
        scale = np.abs(w) if adaptive else np.ones_like(w)
        e = rho * scale**2 * g / np.linalg.norm(scale * g)
        w = w - lr * (A @ (w + e))
    return w


def loss_of(parts: list[Tensor]) -> Tensor:
    w = torch.cat(parts)
    return 0.5 * w @ torch.from_numpy(A) @ w


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("by", ["steps", "closure"])
def test_it_is_the_reference_in_numpy(by: str, adaptive: bool) -> None:
    """Over several parameters the norm is one."""
    start = [torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)]
    parts = [nn.Parameter(p.clone()) for p in start]
    optimizer = SAM(parts, torch.optim.SGD, rho=0.3, adaptive=adaptive, lr=0.05)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(parts)
        loss.backward()
        return loss

    for _ in range(4):
        if by == "closure":
            expected = loss_of(parts).item()
            assert optimizer.step(closure).item() == expected, "the loss at w"
        else:
            loss_of(parts).backward()
            optimizer.first_step(zero_grad=True)
            assert optimizer.perturbed
            loss_of(parts).backward()
            optimizer.second_step(zero_grad=True)
            assert parts[0].grad is None
    wanted = numpy_sam(torch.cat(start).numpy(), 4, 0.3, adaptive, 0.05)
    np.testing.assert_allclose(torch.cat(parts).detach().numpy(), wanted, rtol=1e-12)


def test_restore_gives_back_the_very_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = nn.Parameter(torch.randn(1000).to(dtype))
        before = p.detach().clone()
        optimizer = SAM([p], torch.optim.SGD, rho=3.0, lr=0.1)
        p.grad = torch.randn(1000).to(dtype)
        optimizer.perturb()
        assert (p.detach() - before).float().norm().item() == pytest.approx(3.0, rel=0.02)
        optimizer.restore()
        assert torch.equal(p, before)
        optimizer.restore()
        assert torch.equal(p, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_gradient_of_zero_moves_nothing(dtype: torch.dtype) -> None:
    p, other = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2))
    optimizer = SAM([p, other], torch.optim.SGD, lr=0.1)
    p.grad, other.grad = torch.zeros(3, dtype=dtype), torch.zeros(2)
    optimizer.perturb()
    assert (p == 1).all()
    assert (other == 1).all()
    optimizer.restore()
    p.grad.fill_(2.0)
    optimizer.perturb()
    assert p.tolist() == pytest.approx([1 + 0.05 / 3**0.5] * 3, rel=1e-2)


def test_groups_have_their_own_distance() -> None:
    near, far, still = (nn.Parameter(torch.ones(3)) for _ in range(3))
    groups = [
        {"params": [near]},
        {"params": [far], "rho": 1.0, "adaptive": True},
        {"params": [still], "rho": 0.0},
    ]
    optimizer = SAM(groups, torch.optim.AdamW, rho=0.5, lr=0.1)
    for p in (near, far, still):
        p.grad = torch.ones(3)
    optimizer.perturb()
    assert near.tolist() == pytest.approx([1 + 0.5 / 3] * 3)
    assert far.tolist() == pytest.approx([1 + 1.0 / 3] * 3)
    assert still.tolist() == [1.0] * 3


def test_state_and_groups_are_the_bases() -> None:
    model = tiny.model()
    base = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = SAM(model.parameters(), base)
    assert optimizer.param_groups is base.param_groups
    schedule = torch.optim.lr_scheduler.StepLR(base, 1, 0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.perturb()
    optimizer.second_step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 5e-3
    assert len(optimizer.state) == len(base.state) == 6
    saved = optimizer.state_dict()
    again = SAM(model.parameters(), torch.optim.AdamW, lr=1.0, rho=0.7)
    again.load_state_dict(saved)
    assert again.param_groups is again.base.param_groups
    assert (again.param_groups[0]["lr"], again.param_groups[0]["rho"]) == (5e-3, 0.05)
    assert again.state is again.base.state
    plain = torch.optim.AdamW(model.parameters())
    again.load_state_dict(plain.state_dict())
    assert again.param_groups[0]["rho"] == 0.7, "a state of the base alone leaves what it does not say"


def test_an_exception_leaves_w() -> None:
    model = tiny.model()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(optimizer.perturbed)
        if optimizer.perturbed:
            raise KeyError("data")
        loss = model(torch.ones(4, 8)).sum()
        loss.backward()
        return loss

    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert calls == [False, True]
    assert all(torch.equal(p, value) for p, value in zip(model.parameters(), before, strict=True))


def test_a_step_without_the_second_gradient_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1)
    p.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"gradient twice: call first_step\(\).*Engine"):
        optimizer.step()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match="at w \\+ e already"):
        optimizer.first_step()
    optimizer.second_step()
    with pytest.raises(RuntimeError, match="gradient twice"):
        optimizer.step()
    p.grad.zero_()
    optimizer.step()  # e is 0: both gradients are this one


def test_bad_input() -> None:
    model = tiny.model()
    parameters = list(model.parameters())
    for rho in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="rho=.*must be >= 0"):
            SAM(parameters, torch.optim.SGD, rho=rho)
        with pytest.raises(ValueError, match="rho=.*must be >= 0"):
            SAM([{"params": parameters, "rho": rho}], torch.optim.SGD)
    wrong: Any = "sgd"
    with pytest.raises(
        TypeError, match=r"base_optimizer='sgd' is no optimizer: SAM\(params, torch.optim.SGD"
    ):
        SAM(parameters, wrong)
    with pytest.raises(ValueError, match="LBFGS.step\\(\\) cannot do without closure"):
        SAM(parameters, torch.optim.LBFGS)
    with pytest.raises(ValueError, match="around SAM, which perturbs by itself"):
        SAM(parameters, SAM(parameters, torch.optim.SGD))
    tasks: Any = TaskOptimizers({"a": torch.optim.SGD(parameters)})
    with pytest.raises(ValueError, match="around TaskOptimizers, which keeps its parts apart"):
        SAM(parameters, tasks)
    with pytest.raises(ValueError, match="SGD holds 1 parameters, and 5 of the 6 given"):
        SAM(parameters, torch.optim.SGD(parameters[:1]))
    with pytest.raises(ValueError, match="lr= beside a base optimizer that is made already"):
        SAM(parameters, torch.optim.SGD(parameters), lr=0.1)
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = SAM(table.parameters(), torch.optim.SGD, lr=0.1)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="dense gradients"):
        optimizer.perturb()
    assert not optimizer.perturbed
