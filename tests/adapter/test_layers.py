"""Document 000's layers: torch's, adapted from the start."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orbit.model
from orbit.adapter import (
    ConfigError,
    TaskError,
    base_state_dict,
    load_lora,
    merge_lora,
    remove,
    save_lora,
    set_route,
    task_config,
    tasks,
    unmerge_lora,
)
from orbit.adapter.layers import Conv1dLoRA, Conv2dLoRA, EmbeddingLoRA, LinearLoRA

LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[int, ...], dict[str, Any], Tensor]] = {
    "Linear": (LinearLoRA, nn.Linear, (9, 8), {"bias": False}, torch.ones(2, 9)),
    "Conv1d": (Conv1dLoRA, nn.Conv1d, (4, 6, 3), {"dilation": 2}, torch.ones(2, 4, 8)),
    "Conv2d": (Conv2dLoRA, nn.Conv2d, (4, 6, (3, 2)), {"padding": 1}, torch.ones(2, 4, 5, 5)),
    "Embedding": (EmbeddingLoRA, nn.Embedding, (9, 8), {"padding_idx": 0}, torch.arange(9)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_is_torchs_layer_with_one_task_and_a_frozen_base(kind: str, fill: Any) -> None:
    ours, torchs, sizes, options, x = LAYERS[kind]
    torch.manual_seed(7)
    plain = torchs(*sizes, **options)
    torch.manual_seed(7)
    layer = ours(*sizes, r=2, dora=True, gated=True, **options)
    assert isinstance(layer, (ours, torchs))
    assert tasks(layer) == ("default",)
    assert torch.equal(layer(x), plain(x))
    assert base_state_dict(layer).keys() == plain.state_dict().keys()
    assert not any(p.requires_grad for name, p in layer.named_parameters() if "lora_" not in name)
    assert [owner is None for owner in layer.slots()["default"]] == [False] * 4 + [True]
    assert sum(p.requires_grad for p in layer.parameters()) == 4
    layer.load_state_dict(plain.state_dict())
    fill(layer)
    y = layer(x)
    assert not torch.equal(y, plain(x))
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
    merge_lora(layer)
    torch.testing.assert_close(layer.eval()(x), y)
    unmerge_lora(layer)
    remove(layer, "default")
    assert type(layer) is ours
    assert torch.equal(layer(x), plain(x))


def test_a_model_of_such_layers_trains_and_merges(fill: Any, tmp_path: Any) -> None:
    model = nn.Sequential(
        LinearLoRA(6, 8, r=2, lora_dropout=0.5), nn.ReLU(), LinearLoRA(8, 4, r=2, lora_dropout=0.5)
    )
    x = torch.randn(3, 6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    y = model.eval()(x)
    save_lora(model, tmp_path / "a")
    merge_lora(model)
    torch.testing.assert_close(model(x), y)


def test_layers_of_several_ranks_are_one_task(fill: Any, tmp_path: Any) -> None:
    def make() -> nn.Module:
        torch.manual_seed(7)
        return nn.Sequential(
            Conv1dLoRA(4, 6, 3, r=4, lora_alpha=3),
            LinearLoRA(6, 8, r=2),
            nn.Sequential(LinearLoRA(8, 8, r=5)),
        )

    model, x = make(), torch.randn(2, 4, 8)
    merge_lora(model[2])  # united from the inside first
    unmerge_lora(model[2])
    fill(model)
    y = model(x)
    config = task_config(model, "default")
    assert [(config.rank_of(path), config.alpha_of(path)) for path in ("0", "1", "2.0")] == [
        (4, 3),
        (2, 16),
        (5, 16),
    ]
    set_route(model, None)
    assert not torch.equal(model(x), y)
    set_route(model, "default")
    merge_lora(model)
    torch.testing.assert_close(model.eval()(x), y, rtol=1e-4, atol=1e-5)
    for other in ({"dora": True}, {"lora_dropout": 0.5}):
        with pytest.raises(
            TaskError, match=f"{next(iter(other)).removeprefix('lora_')} .*in parts of this model"
        ):
            merge_lora(nn.Sequential(LinearLoRA(8, 8), LinearLoRA(8, 8, **other)))


def test_bad_settings_are_refused_when_it_is_made() -> None:
    with pytest.raises(ConfigError, match="rank above 4, and r is 8"):
        LinearLoRA(4, 6)
    with pytest.raises(ConfigError, match="r must be"):
        Conv2dLoRA(4, 6, 3, r=0)
    with pytest.raises(TypeError, match="lora_dropout"):
        EmbeddingLoRA(20, 20, lora_dropout=0.1)


def test_orbit_model_lists_them_and_imports_them_when_asked() -> None:
    assert orbit.model.LinearLoRA is LinearLoRA
    assert set(orbit.model.__all__) <= set(dir(orbit.model))
    with pytest.raises(AttributeError, match="LinearLora"):
        _ = orbit.model.LinearLora
    code = (
        "import sys, orbit.model; assert 'orbit.adapter.layers' not in sys.modules\n"
        "from orbit.model import Conv2dLoRA; assert 'orbit.adapter.layers' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_net_with_dropout_is_one_task(tmp_path: Path) -> None:
    """An embedding has no dropout to differ in."""
    net = nn.Sequential(EmbeddingLoRA(9, 8, r=2), LinearLoRA(8, 6, r=3, lora_dropout=0.5))
    assert task_config(net, "default").dropout == 0.5
    save_lora(net, tmp_path / "a")
    load_lora(net, tmp_path / "a")
