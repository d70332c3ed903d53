"""Adapted Conv1D of transformers, whose weight is transposed, against the dense oracle and PEFT."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from orbit.adapter import AdapterConfig, ConfigError, inject, merge, register_kind, remove, route, unmerge
from orbit.adapter.kinds.conv1d import Conv1DGraft
from orbit.adapter.kinds.registry import is_linear
from orbit.adapter.targets import resolve
from tests.adapter.oracle import VARIANTS, bare_copy, same_as_dense, trained


def make(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(7)
    layer = Conv1D(5, 6).to(dtype)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    return layer


def batch(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def delta(A: Tensor, B: Tensor) -> Tensor:
    return torch.einsum("or,ri->io", B, A)


def gpt2() -> nn.Module:
    torch.manual_seed(7)
    sizes = {"vocab_size": 32, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_is_the_layer_with_the_dense_weight(variant: str) -> None:
    layer = make()
    bare = bare_copy(layer)
    trained(layer, **VARIANTS[variant])
    assert isinstance(layer, (Conv1D, Conv1DGraft))
    same_as_dense(layer, bare, batch(), delta, out_axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_fresh_merged_and_removed(variant: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        layer, x = make(dtype), batch(dtype)
        before, weight = layer(x), layer.weight.clone()
        inject(layer, AdapterConfig(r=2, **VARIANTS[variant]))
        assert torch.equal(layer(x), before)
        remove(layer, "default")
        trained(layer.eval(), **VARIANTS[variant])
        routed = layer(x)
        assert not torch.equal(routed, before)
        merge(layer)
        tolerance = 0.1 if dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(layer(x), routed, rtol=tolerance, atol=tolerance)
        unmerge(layer)
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer(x), routed)
        remove(layer, "default")
        assert type(layer) is Conv1D


def test_rows_and_sums_are_the_tasks_own() -> None:
    layer, x = trained(trained(make(), "a"), "b", seed=1, dora=True), batch()
    one = {task: layer(x, task=task) for task in ("a", "b", None)}
    torch.testing.assert_close(
        layer(x, task=["b", None, "a"]), torch.stack([one["b"][0], one[None][1], one["a"][2]])
    )
    want = one[None] + 0.5 * (one["a"] - one[None]) - 2 * (one["b"] - one[None])
    torch.testing.assert_close(layer(x, tasks={"a": 0.5, "b": -2.0}), want)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_gpt2_is_pefts(kind: str) -> None:
    mine, theirs = gpt2().double(), gpt2().double()
    report = inject(mine, AdapterConfig(r=2, alpha=3, **VARIANTS[kind]))
    assert len(report.layers) == 8
    assert report.skipped == {"lm_head": "the head"}
    assert all(is_linear(mine.get_submodule(name)) for name in report.layers)
    names = ["c_attn", "c_proj", "c_fc"]
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=names, use_dora=kind == "dora", fan_in_fan_out=True
    )
    theirs = peft.get_peft_model(theirs, config)
    pairs = []
    with torch.no_grad():
        for path in report.layers:
            slot, twin = (
                mine.get_submodule(path).slots()["default"],
                theirs.base_model.model.get_submodule(path),
            )
            slot.up.weight.normal_(std=0.3)
            pairs += [
                (slot.down.weight, twin.lora_A["default"].weight),
                (slot.up.weight, twin.lora_B["default"].weight),
            ]
            if slot.magnitude is not None:
                slot.magnitude.weight.mul_(1.5)
                pairs.append((slot.magnitude.weight, twin.lora_magnitude_vector["default"].weight))
        for own, other in pairs:
            other.copy_(own)
    tokens = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    results = []
    for model, index in ((mine, 0), (theirs, 1)):
        loss = model(tokens, labels=tokens).loss
        results.append((loss, torch.autograd.grad(loss, [pair[index] for pair in pairs])))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def test_copies_and_subclasses() -> None:
    class Half(Conv1D):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x / 2)

    layer = Half(5, 6).double()
    bare = bare_copy(layer)
    trained(layer)
    same_as_dense(layer, bare, batch(), delta, out_axis=1)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(batch()), layer(batch()))
    with route(twin, None):
        torch.testing.assert_close(twin(batch()), bare(batch()))


def test_a_rank_above_the_matrix_is_refused() -> None:
    with pytest.raises(ConfigError, match="6 -> 5 "):
        inject(make(), AdapterConfig(r=6))


def test_kinds_known_by_path_wait_for_their_class(monkeypatch: pytest.MonkeyPatch) -> None:
    class Theirs(Conv1D):
        pass

    monkeypatch.setattr("orbit.adapter.kinds.registry._KINDS", {})
    monkeypatch.setattr("orbit.adapter.kinds.registry._KINDS_BY_PATH", {})
    assert not is_linear(Theirs(5, 6))
    register_kind("transformers.pytorch_utils.Conv1D", Conv1DGraft)
    assert list(resolve(Theirs(5, 6), None)[0]) == [""]


def test_a_pickled_layer_comes_back_in_a_process_that_knows_nothing_yet(tmp_path: Any) -> None:
    layer = trained(make(), dora=True)
    torch.save(layer, tmp_path / "layer.pt")
    torch.save((batch(), layer(batch())), tmp_path / "pair.pt")
    code = (
        "import sys, torch, orbit.adapter; assert 'transformers' not in sys.modules\n"
        "layer = torch.load(sys.argv[1] + '/layer.pt', weights_only=False)\n"
        "x, y = torch.load(sys.argv[1] + '/pair.pt')\n"
        "assert torch.equal(layer(x), y), type(layer)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
