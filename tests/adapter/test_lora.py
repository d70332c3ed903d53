"""The low-rank branch against its formula: value, derivatives, what it keeps, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from orbit.adapter.lora import LowRank, compute_dtype, fresh_factors, low_rank


def parts(*shape: int, r: int = 3, out: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """base, x, A, B, s"""
    x = torch.randn(*shape, dtype=dtype)
    base = torch.randn(*shape[:-1], out, dtype=dtype)
    A, B = torch.randn(r, shape[-1], dtype=dtype), torch.randn(out, r, dtype=dtype)
    return [base, x, A, B, torch.tensor(0.7, dtype=dtype)]


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4), (0, 4)])
def test_value_is_the_formula(shape: tuple[int, ...]) -> None:
    base, x, A, B, s = parts(*shape)
    torch.testing.assert_close(low_rank(base, x, A, B, s), base + s * x @ A.T @ B.T)
    with torch.no_grad():
        torch.testing.assert_close(low_rank(base, x, A, B, s), base + s * x @ A.T @ B.T)


@pytest.mark.parametrize("shape", [(4,), (2, 4), (2, 3, 4)])
def test_first_and_second_derivatives(shape: tuple[int, ...]) -> None:
    base, x, A, B, s = parts(*shape)
    inputs = [t.requires_grad_() for t in (base, x, A, B)]
    assert torch.autograd.gradcheck(lambda *t: low_rank(*t, s), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: low_rank(*t, s), inputs)


def test_skips_gradients_that_nobody_asks_for() -> None:
    base, x, A, B, s = parts(2, 4)
    low_rank(base, x, A.requires_grad_(), B, s).sum().backward()
    assert A.grad is not None
    assert x.grad is None
    assert B.grad is None


def test_keeps_only_its_inputs_and_a_small_h() -> None:
    base, x, A, B, s = parts(2, 50, 40, r=3, out=60)
    for t in (x, A, B):
        t.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        low_rank(base, x, A, B, s)
    new = [t for t in kept if all(t.data_ptr() != own.data_ptr() for own in (x, A, B, s))]
    assert [tuple(t.shape) for t in new] == [(2, 50, 3)]


def test_float32_adapter_on_bf16_works_in_float32_and_keeps_no_float32_copy_of_x() -> None:
    base, x, A, B, s = parts(2, 50, 40, r=3, out=60, dtype=torch.float32)
    base, x = base.bfloat16(), x.bfloat16().requires_grad_()
    A.requires_grad_()
    B.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = low_rank(base, x, A, B, s)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (base.float() + s * (x.float() @ A.T) @ B.T).bfloat16())
    assert all(t.numel() < x.numel() for t in kept if t.dtype == torch.float32)
    y.sum().backward()
    assert (A.grad.dtype, B.grad.dtype, x.grad.dtype) == (torch.float32, torch.float32, torch.bfloat16)


def test_autocast_chooses_the_dtype_and_spares_float64() -> None:
    _, x, A, _, _ = parts(2, 4, dtype=torch.float32)
    assert compute_dtype(x, A) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert compute_dtype(x, A) == torch.bfloat16
        assert compute_dtype(x.double(), A.double()) == torch.float64


def test_autocast_gives_what_plain_operations_give() -> None:
    base, x, A, B, s = parts(2, 4, dtype=torch.float32)
    A.requires_grad_()
    B.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = low_rank(base.bfloat16(), x, A, B, s)
        plain = base.bfloat16() + (s * (x @ A.T)) @ B.T
    torch.testing.assert_close(y, plain)
    mine = torch.autograd.grad(y.float().sum(), (A, B))
    torch.testing.assert_close(mine, torch.autograd.grad(plain.float().sum(), (A, B)), rtol=2e-2, atol=2e-2)
    assert mine[0].dtype == torch.float32


def test_per_sample_gradients_by_vmap() -> None:
    base, x, A, B, s = parts(5, 4)

    def loss(A: Tensor, base: Tensor, x: Tensor) -> Tensor:
        return LowRank.apply(base[None], x[None], A, B, s)[0].square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(A, base, x)
    for i in range(5):
        torch.testing.assert_close(each[i], torch.func.grad(loss)(A, base[i], x[i]))


def test_fresh_factors() -> None:
    A, B = fresh_factors(50, 20, 4, device=torch.device("cpu"), dtype=torch.float32)
    assert A.shape == (4, 50)
    assert not B.any()
    assert 0.5 * 50**-0.5 < A.abs().max() <= 50**-0.5
