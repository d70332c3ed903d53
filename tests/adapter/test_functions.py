"""Document 000's functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from orbit.adapter import (
    AdapterConfig,
    ConfigError,
    TargetError,
    TaskError,
    adapter_parameters,
    freeze_backbone_only,
    inject,
    inject_lora,
    inject_lora_file,
    load_lora,
    merge_lora,
    save_lora,
    set_route,
    set_trainable,
    task_config,
    tasks,
    unmerge_lora,
)

Make = Callable[..., nn.Module]


def test_the_whole_round(
    mlp: Make, fill: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:  # type: ignore[type-arg]
    model, x = mlp(), torch.randn(4, 6)
    before = model(x)
    assert inject_lora(model, r=4, lora_alpha=8, dora=True, target_names=["0", "2"], verbose=True) is model
    assert "2 layers adapted" in capsys.readouterr().out
    assert torch.equal(model(x), before)
    fill(model)
    y = model(x)
    model.eval()
    torch.testing.assert_close(merge_lora(model)(x), y)
    assert torch.equal(unmerge_lora(model)(x), y)
    for path in (tmp_path / "folder", tmp_path / "file.safetensors"):
        save_lora(model, path)
        other = inject_lora_file(mlp(), path)
        assert torch.equal(other(x), y)
        assert all(p.requires_grad for p in adapter_parameters(other).values())
        assert torch.equal(
            load_lora(inject_lora(mlp(), 4, 8, dora=True, target_names=["0", "2"]), path)(x), y
        )
        frozen = load_lora(mlp(), path)
        assert torch.equal(frozen(x), y)
        assert not any(p.requires_grad for p in frozen.parameters())
        with pytest.raises(TaskError, match="already"):
            inject_lora_file(frozen, path)


def test_defaults_and_two_names_of_alpha(mlp: Make) -> None:
    assert task_config(inject_lora(nn.Linear(9, 9)), "default") == AdapterConfig(r=8, alpha=16)
    assert task_config(inject_lora(mlp(), r=2, alpha=3), "default").alpha == 3
    assert task_config(inject_lora(mlp(), r=2, lora_alpha=3, alpha=3), "default").alpha == 3
    with pytest.raises(ConfigError, match="alpha=3 and lora_alpha=4"):
        inject_lora(mlp(), lora_alpha=4, alpha=3)
    with pytest.raises(TypeError, match="gate"):
        inject_lora(mlp(), gate=True)
    with pytest.raises(TypeError, match="inject_lora has no setting 'dropout'; did you mean 'lora_dropout'"):
        inject_lora(mlp(), dropout=0.1)
    config = task_config(inject_lora(mlp(), r=2, init="gaussian", bias="all", save_modules="3"), "default")
    assert config == AdapterConfig(r=2, alpha=16, init="gaussian", bias="all", save_modules=("3",))


def test_exclude_and_single_names(mlp: Make) -> None:
    model = inject_lora(mlp(), r=3, target_names="re:.*", exclude_names="0")
    assert {name.split(".")[0] for name in adapter_parameters(model)} == {"2", "3"}


def test_which_task_is_meant(mlp: Make, tmp_path: Path) -> None:
    model = inject_lora(mlp(), r=3, name="only")
    save_lora(model, tmp_path / "a")
    inject_lora(model, name="second", r=2)
    save_lora(model, tmp_path / "b")  # the current one
    assert inject_lora_file(mlp(), tmp_path / "b")[0].slots()["default"].up.r == 2
    set_route(model, None)
    with pytest.raises(TaskError, match=r"say which task by name=: the model has \['only', 'second'\]"):
        save_lora(model, tmp_path / "c")
    save_lora(model, tmp_path / "c", name="only")
    assert not (tmp_path / "d").exists()


def test_freeze_backbone_only(mlp: Make) -> None:
    model = nn.ModuleDict({"body": mlp(), "overhead": nn.Linear(3, 3), "head": nn.Linear(3, 2)})
    inject(model, AdapterConfig(r=2, targets=("body",)), "a")
    inject(model, AdapterConfig(r=2, targets=("body",)), "b")
    set_trainable(model, "a", False)
    model["overhead"].requires_grad_(True)
    assert freeze_backbone_only(model, unlock_head_keywords=["head"]) is model
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {"head.weight", "head.bias", *adapter_parameters(model)}
    with pytest.raises(TargetError, match=r"'heads' names none of .* parameters; did you mean 'head'\?"):
        freeze_backbone_only(model, "heads")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trains
    freeze_backbone_only(model)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(adapter_parameters(model))
    plain = freeze_backbone_only(mlp(), "3")
    assert tasks(plain) == ()
    assert {name for name, p in plain.named_parameters() if p.requires_grad} == {"3.weight", "3.bias"}
