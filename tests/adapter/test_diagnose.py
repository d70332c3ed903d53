"""The diagnoser: figures against dense matrices, verdicts as data."""

from __future__ import annotations

import copy
import importlib
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    Finding,
    LoRADiagnoser,
    MergeError,
    TaskError,
    inject,
    merge,
    set_route,
    unmerge,
)
from orbit.core.extras import MissingExtraError
from tests.laws.peft_oracle import KINDS

DENSE_KINDS = [kind for kind in KINDS if "xperts" not in kind and "Multihead" not in kind]
Fill = Callable[..., None]


def bare() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 14), nn.ReLU(), nn.Linear(14, 10, bias=False), nn.Linear(10, 3))


def adapted(fill: Fill, size: float = 0.05, **options: object) -> nn.Module:
    model = bare()
    inject(model, AdapterConfig(**{"r": 4, "alpha": 6, **options}))  # type: ignore[arg-type]
    fill(model, size=size)
    return model


@pytest.mark.parametrize("options", [{}, {"gated": True}, {"dora": True}, {"init": "pissa"}], ids=str)
def test_the_figures_are_those_of_the_dense_update(options: dict[str, object], fill: Fill) -> None:
    model = adapted(fill, **options)
    seen = LoRADiagnoser(model).report()
    assert [layer.layer for layer in seen] == ["0", "2"]
    for name, found in zip(("0", "2"), seen, strict=True):
        layer = model.get_submodule(name)
        slot = layer.low_rank_slot("default")
        B, A = slot.up.weight.detach(), slot.down.weight.detach()
        dense = B @ A
        if slot.start is not None:
            dense = dense - slot.start.up.weight @ slot.start.down.weight
        dense = dense * float(slot.up.scale) * (1.0 if slot.gate is None else slot.gate.weight.item())
        S = torch.linalg.svdvals(dense)
        rank = 8 if slot.start is not None else 4
        assert found.r == 4
        assert found.spectrum == pytest.approx(S[:rank].tolist(), rel=1e-3, abs=1e-5)
        p = S[:rank] / S[:rank].sum()
        assert found.effective_rank == pytest.approx(math.exp(-float((p * p.log()).sum())), rel=1e-3)
        assert found.stable_rank == pytest.approx(float(S.square().sum() / S[0] ** 2), rel=1e-3)
        assert found.ratio == pytest.approx(float(dense.norm() / layer.weight.norm()), rel=1e-4)
        assert found.norm == pytest.approx(float(dense.norm()), rel=1e-4)
        assert found.grad_A is None
        assert found.grad_B is None
    assert seen.healthy


def test_the_spectrum_is_not_that_of_a() -> None:
    model = bare()
    inject(model, AdapterConfig(r=4, targets=("0",)))
    slot = model[0].low_rank_slot("default")
    with torch.no_grad():  # A of full rank, and a B that uses one direction of it
        slot.up.weight.copy_(torch.outer(torch.ones(14), torch.tensor([1.0, -1.0, 1.0, -1.0])))
    (layer,) = LoRADiagnoser(model).report()
    assert layer.effective_rank == pytest.approx(1, abs=1e-3)
    assert torch.linalg.svdvals(slot.down.weight)[-1] > 0.3
    assert [finding.rule for finding in layer.findings] == ["collapse", "dominant"]
    assert layer.findings[0] == Finding("0", "collapse", pytest.approx(0, abs=1e-3), 0.1)
    assert LoRADiagnoser(model, collapse=0, dominant=1e9).report().healthy


def test_gradients_and_layers_that_get_none(fill: Fill) -> None:
    model = adapted(fill)
    look = LoRADiagnoser(model)
    model[0](torch.randn(5, 12)).square().sum().backward()  # the other layer is bypassed
    seen = look.report()
    slot = model[0].low_rank_slot("default")
    assert seen.layers[0].grad_A == pytest.approx(float(slot.down.weight.grad.norm()), rel=1e-5)
    assert seen.layers[0].grad_B == pytest.approx(float(slot.up.weight.grad.norm()), rel=1e-5)
    assert [(finding.layer, finding.rule) for finding in seen.findings] == [("2", "no gradient")]
    model.zero_grad()
    assert look.report().healthy


def test_a_fresh_task_is_dead_until_it_trains() -> None:
    model = bare()
    inject(model, AdapterConfig(r=2))
    look = LoRADiagnoser(model)
    assert [str(finding) for finding in look.report().findings] == [
        "0: dead (0; threshold 0)",
        "2: dead (0; threshold 0)",
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(torch.randn(8, 12)).square().sum().backward()
        seen = look.report()
        optimizer.step()
        optimizer.zero_grad()
    assert seen.healthy
    assert all(layer.grad_B for layer in seen)


def test_values_that_are_not_finite_are_a_finding(fill: Fill) -> None:
    model = adapted(fill)
    with torch.no_grad():
        model[2].low_rank_slot("default").up.weight[0, 0] = torch.nan
    seen = LoRADiagnoser(model).report()
    assert [(finding.layer, finding.rule) for finding in seen.findings] == [("2", "not finite")]
    assert math.isnan(seen.layers[1].effective_rank)
    assert "not finite" in str(seen)


def test_the_weights_norm_is_taken_again_when_the_weight_changes(fill: Fill) -> None:
    model = adapted(fill)
    look = LoRADiagnoser(model)
    first = look.report()
    with mock.patch.object(type(model[0]), "matrix", side_effect=AssertionError("a pass over W")):
        assert look.report() == first
    with torch.no_grad():
        model[0].weight.mul_(2)
    again = look.report()
    assert again.layers[0].ratio == pytest.approx(first.layers[0].ratio / 2, rel=1e-5)
    assert again.layers[1] == first.layers[1]


def test_the_table(fill: Fill) -> None:
    model = adapted(fill)
    lines = str(LoRADiagnoser(model).report()).splitlines()
    assert lines[0] == "task 'default': 2 layers, 0 findings"
    assert lines[1].split()[:3] == ["layer", "r", "eff."]
    assert [line.split()[:2] for line in lines[2:]] == [["0", "4"], ["2", "4"]]


def test_which_task(fill: Fill) -> None:
    model = adapted(fill)
    inject(model, AdapterConfig(r=2, targets=("3",)), "head")
    assert LoRADiagnoser(model).report().task == "head"  # the current one
    set_route(model, None)
    with pytest.raises(TaskError, match="say which task"):
        LoRADiagnoser(model)
    with pytest.raises(TaskError, match="no task 'x'"):
        LoRADiagnoser(model, "x")
    with pytest.raises(ConfigError, match="collapse must not be negative, got -1"):
        LoRADiagnoser(model, "head", collapse=-1)
    look = LoRADiagnoser(model, "default")
    merge(model, "head")
    with pytest.raises(MergeError, match="'head' is merged"):
        look.report()
    unmerge(model)
    assert look.report().task == "default"


def test_a_picture(fill: Fill, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = LoRADiagnoser(adapted(fill))
    picture = look.plot(tmp_path / "new" / "picture.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    whole = importlib.import_module

    def without(name: str, package: str | None = None) -> object:
        if name.startswith("matplotlib"):
            raise ModuleNotFoundError(name)
        return whole(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(MissingExtraError, match=r"orbit-torch\[plot\]"):
        look.plot(tmp_path / "other.png")
    assert not (tmp_path / "other.png").exists()


def test_the_documented_path() -> None:
    from orbit import utils

    assert utils.LoRADiagnoser is LoRADiagnoser


@pytest.mark.parametrize("kind", DENSE_KINDS)
def test_every_kind_is_judged_by_its_matrix(kind: str, fill: Fill) -> None:
    model = KINDS[kind].make()
    inject(model, AdapterConfig(r=2, targets=("layer",)))
    fill(model)
    (found,) = LoRADiagnoser(model).report()
    delta = model.layer.delta(model.layer.slots()["default"])
    assert found.spectrum == pytest.approx(torch.linalg.svdvals(delta)[:2].tolist(), rel=1e-4)
    assert found.ratio == pytest.approx(float(delta.norm() / model.layer.weight.detach().norm()), rel=1e-4)


def test_experts_and_projections_are_judged_one_by_one(fill: Fill) -> None:
    model = KINDS["Experts"].make()
    inject(model, AdapterConfig(r=2, targets=(), parameters=("layer.up", "layer.down")))
    fill(model)
    layer, weight = model.layer.sites()["up"], model.layer.up.detach()
    delta = layer.delta(layer.slots()["default"])
    look = LoRADiagnoser(model)
    seen = {found.layer: found for found in look.report()}
    assert len(seen) == 2 * len(weight)
    for index in range(len(weight)):
        found = seen[f"layer.up[{index}]"]
        assert found.spectrum == pytest.approx(torch.linalg.svdvals(delta[index])[:2].tolist(), rel=1e-4)
        assert found.ratio == pytest.approx(float(delta[index].norm() / weight[index].norm()), rel=1e-4)
    with torch.no_grad():
        model.layer.up.mul_(2)
    assert look.report().layers[0].ratio == pytest.approx(seen["layer.up[0]"].ratio / 2, rel=1e-4)
    attends = KINDS["MultiheadAttention"].make()
    inject(attends, AdapterConfig(r=2, targets=("layer",)))
    names = {found.layer for found in LoRADiagnoser(attends).report()}
    assert names == {"layer.in_proj_weight", "layer.out_proj"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_diagnoser_is_copied_with_its_model(copied: Any, fill: Fill) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    inject(model, AdapterConfig(r=2))
    fill(model)
    doctor = LoRADiagnoser(model)
    before = doctor.report()
    twin = copied(doctor)
    assert twin.report() == before
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert twin.report() == before != doctor.report()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_fresh_start_is_dead_and_a_moved_one_is_not(init: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 3))
    inject(model, AdapterConfig(r=3, init=init, targets=("0",)))
    (layer,) = LoRADiagnoser(model).report()
    assert [finding.rule for finding in layer.findings] == ["dead"]
    with torch.no_grad():
        model[0].slots()["default"].up.weight.add_(1e-3)
    (layer,) = LoRADiagnoser(model).report()
    assert layer.norm > 0
    assert "dead" not in [finding.rule for finding in layer.findings]
