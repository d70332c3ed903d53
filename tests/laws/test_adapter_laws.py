"""The table of laws that every adapter keeps. A new kind of adapter adds a row to ADAPTERS."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orbit.adapter import (
    AdapterConfig,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    inject,
    load,
    merge,
    remove,
    route,
    save,
    unmerge,
)

ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "DoRA": {"dora": True},
    "rsLoRA": {"rslora": True},
    "LoRA with dropout": {"dropout": 0.3},
    "DoRA with dropout": {"dora": True, "dropout": 0.3},
    "LoRA of several ranks": {"rank_pattern": {"0": 1}, "alpha_pattern": {"2": 5}},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def make(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(5, 7), nn.ReLU(inplace=True), nn.Linear(7, 6, bias=False), nn.GELU(), nn.Linear(6, 2)
    ).to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).to(dtype)


def adapt(model: nn.Module, kind: str, name: str = "default") -> nn.Module:
    inject(model, AdapterConfig(r=3, alpha=4, **ADAPTERS[kind]), name)
    return model


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        model.train()(batch().to(next(model.parameters()).dtype)).square().sum().backward()
        check_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fresh_adapter_changes_nothing(kind: str, dtype: torch.dtype) -> None:
    model = make(dtype)
    before = model(batch(dtype))
    adapt(model, kind)
    assert torch.equal(model.train()(batch(dtype)), before)
    assert torch.equal(model.eval()(batch(dtype)), before)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_frozen_base_never_moves_and_the_adapter_does(kind: str, dtype: torch.dtype) -> None:
    model = make(dtype)
    before = copy.deepcopy(model.state_dict())
    adapt(model, kind)
    fresh = {name: parameter.clone() for name, parameter in adapter_parameters(model).items()}
    train(model)
    assert all(torch.equal(base_state_dict(model)[name], value) for name, value in before.items())
    assert not any(torch.equal(p, fresh[name]) for name, p in adapter_parameters(model).items())
    with route(model, None):
        off = model(batch(dtype))
    assert not torch.equal(model(batch(dtype)), off)
    remove(model, "default")
    assert torch.equal(model(batch(dtype)), off)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_then_unmerge_is_exact_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    model = adapt(make(dtype), kind)
    train(model)
    state, routed = copy.deepcopy(model.state_dict()), model(batch(dtype))
    for _ in range(3):
        merge(model)
        tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(model(batch(dtype)), routed, **tolerance)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
        unmerge(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(model(batch(dtype)), routed)


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["folder", "file.safetensors"])
def test_save_then_load_is_equal(kind: str, dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    model = adapt(make(dtype), kind)
    train(model)
    other = make(dtype)
    load(other, save(model, tmp_path / form))
    assert torch.equal(other.eval()(batch(dtype)), model(batch(dtype)))
    for (name, mine), (_, theirs) in zip(
        adapter_parameters(model).items(), adapter_parameters(other).items(), strict=True
    ):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_second_task_changes_nothing_of_the_first(kind: str) -> None:
    model = adapt(make(), kind, "first")
    train(model)
    before = model(batch())
    kept = {name: parameter.clone() for name, parameter in adapter_parameters(model, "first").items()}
    adapt(model, kind, "second")
    train(model)
    assert all(torch.equal(p, kept[name]) for name, p in adapter_parameters(model, "first").items())
    assert torch.equal(model(batch(), task="first"), before)
    remove(model, "second")
    assert torch.equal(model(batch(), task="first"), before)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_copy_computes_the_same_and_trains_alone(kind: str) -> None:
    model = adapt(make(), kind)
    train(model)
    before = model(batch())
    twin = copy.deepcopy(model)
    assert torch.equal(twin(batch()), before)
    train(twin)
    assert torch.equal(model(batch()), before)
    assert not torch.equal(twin(batch()), before)
