"""Attention over grouped heads: every fused way, and the unfused one, against the formula one query at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from orbit.model.attention import attend, attend_with_weights

B, H, D, S = 2, 4, 8, 9


def formula(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """Row by row, query by query, over the visible keys alone."""
    out, weights = torch.zeros_like(q), q.new_zeros(*q.shape[:3], k.shape[2])
    repeats, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    mask = None if mask is None else mask.expand(*q.shape[:3], keys)
    for b, h, t in itertools.product(*map(range, q.shape[:3])):
        i, g = keys - queries + t, h // repeats
        seen = [
            j
            for j in range(keys)
            if (not causal or j <= i)
            and (window is None or abs(i - j) < window)
            and (mask is None or mask[b, h, t, j])
        ]
        if seen:
            p = torch.softmax(k[b, g, seen] @ q[b, h, t] / math.sqrt(D), 0)
            weights[b, h, t, seen] = p
            out[b, h, t] = p @ v[b, g, seen]
    return out, weights


def masks(queries: int) -> dict[str, Tensor | None]:
    """One that hides keys, one per query, one per head; some queries see nothing."""
    generator = torch.Generator().manual_seed(0)
    one, two, three = (
        torch.rand(shape, generator=generator) < 0.5
        for shape in ((B, 1, 1, S), (1, 1, queries, S), (B, H, queries, S))
    )
    three[0, 1] = False
    one[1] = False
    return {"none": None, "keys": one, "queries": two, "heads": three}


@pytest.mark.parametrize("queries", [1, 4, S])
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (True, 3), (False, 3), (True, S - 1)]
)
def test_formula(causal: bool, window: int | None, groups: int, queries: int):
    q, k, v = torch.randn(B, H, queries, D), torch.randn(B, groups, S, D), torch.randn(B, groups, S, D)
    for name, mask in masks(queries).items():
        out, weights = formula(q, k, v, mask, causal, window)
        fused = attend(q, k, v, mask, causal=causal, window=window)
        plain, found = attend_with_weights(q, k, v, mask, causal=causal, window=window)
        torch.testing.assert_close(found, weights, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(plain, out, atol=1e-6, rtol=0, msg=name)
        torch.testing.assert_close(fused, out, atol=1e-6, rtol=0, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_queries_that_see_nothing_give_zeros_and_no_nan_gradients(dtype: torch.dtype):
    mask = torch.ones(1, 1, S, S, dtype=torch.bool)
    mask[..., :3, :] = False
    for groups, way in itertools.product((4, 2), (attend, lambda *a: attend_with_weights(*a)[0])):
        inputs = [torch.randn(B, n, S, D, dtype=dtype, requires_grad=True) for n in (H, groups, groups)]
        out = way(*inputs, mask)
        assert torch.equal(out[:, :, :3], torch.zeros(B, H, 3, D, dtype=dtype))
        out.sum().backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs)


def test_the_causal_square_needs_no_mask(monkeypatch: pytest.MonkeyPatch):
    """Flash kernels take the flag, not a mask."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **rest):
        calls.append((attn_mask is not None, is_causal))
        return real(q, k, v, attn_mask, dropout_p, is_causal, **rest)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, kv = torch.randn(1, H, S, D), torch.randn(1, 2, S, D)
    attend(q, kv, kv)
    attend(q, kv, kv, causal=True)
    attend(q, kv, kv, causal=True, window=S)
    attend(q[:, :, :1], kv, kv, causal=True)
    attend(q[:, :, :3], kv, kv, causal=True)
    attend(q, kv, kv, causal=True, window=S - 1)
    assert calls == [
        (False, False),
        (False, True),
        (False, True),
        (False, False),
        (True, False),
        (True, False),
    ]


def test_dropout_acts_on_weights_and_leaves_them_out_of_the_report():
    q, k, v = torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.ones(B, H, S, D)
    out, weights = attend_with_weights(q, k, v, dropout=0.5)
    torch.testing.assert_close(weights.sum(-1), torch.ones(B, H, S))
    for found in (out, attend(q, k, v, dropout=0.5)):
        assert found.std() > 0.05
        assert abs(found.mean() - 1) < 0.2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [4, 2])
def test_cuda_equals_cpu(groups: int, dtype: torch.dtype):
    for (name, mask), causal in itertools.product(masks(S).items(), (False, True)):
        inputs = [torch.randn(B, n, S, D, dtype=dtype) for n in (H, groups, groups)]
        here = [x.clone().requires_grad_() for x in inputs]
        there = [x.cuda().requires_grad_() for x in inputs]
        wanted = attend(*here, mask, causal=causal)
        found = attend(*there, None if mask is None else mask.cuda(), causal=causal)
        tolerance = {"atol": 2e-2 if dtype is torch.bfloat16 else 1e-5, "rtol": 0.0}
        torch.testing.assert_close(found.cpu(), wanted, msg=name, **tolerance)
        found.sum().backward()
        wanted.sum().backward()
        for f, w in zip(there, here, strict=True):
            torch.testing.assert_close(f.grad.cpu(), w.grad, msg=name, **tolerance)


@pytest.mark.gpu
def test_cuda_takes_flash_where_there_is_no_mask():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, kv = (torch.randn(B, n, 64, 64, dtype=torch.bfloat16, device="cuda") for n in (H, 2))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for causal in (False, True):
            assert attend(q, kv, kv, causal=causal).isfinite().all()
        assert attend(q[:, :, :1], kv, kv, causal=True).isfinite().all()
