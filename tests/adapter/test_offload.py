"""Law 4: adapters on models that accelerate spreads over devices and brings back layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from orbit.adapter import (
    AdapterConfig,
    GraftError,
    MergeError,
    adapter_parameters,
    base_state_dict,
    inject,
    inject_lora_file,
    merge,
    remove,
    save,
)
from tests.laws.peft_oracle import KINDS
from tests.laws.test_adapters import OURS, config, outputs, refused

CPU = torch.device("cpu")


def everything_in_memory(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=CPU)


def everything_on_disk(model: nn.Module, folder: Path) -> nn.Module:
    from accelerate import disk_offload

    return disk_offload(model, str(folder / "weights"), execution_device=CPU)


def nothing(model: nn.Module, folder: Path) -> nn.Module:
    """Hooks that only move what comes in."""
    from accelerate import dispatch_model

    return dispatch_model(model, {"": "cpu"}, force_hooks=True)


ONE_OF_EACH = (
    "Linear",
    "Conv1D",
    "Embedding with padding_idx",
    "Conv1d",
    "Conv2d with groups",
    "MultiheadAttention",
    "Experts stored (in, out)",
    "Mixtral's experts",
)
CELLS = [
    (kind, variant)
    for kind in ONE_OF_EACH
    for variant in ("LoRA", "gated DoRA", "pissa")
    if refused(kind, variant) is None
]
cells = pytest.mark.parametrize(("kind", "variant"), CELLS)
offloads = pytest.mark.parametrize("offload", [everything_in_memory, everything_on_disk])
assert set(OURS) >= {"LoRA", "gated DoRA", "pissa"}


def adapted(model: nn.Module, kind: str, variant: str, fill: Callable[..., None]) -> nn.Module:
    torch.manual_seed(4)
    inject(model, config(kind, variant))
    fill(model)
    return model


def same(kind: str, model: nn.Module, true: nn.Module) -> None:
    """Equal outputs and gradients, to the bit."""
    for each in (model, true):
        outputs(kind, each).square().sum().backward()
    theirs = adapter_parameters(true)
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter.grad, theirs[name].grad), name
    assert torch.equal(outputs(kind, model), outputs(kind, true))


@cells
@offloads
def test_injected_into_an_offloaded_model(
    kind: str, variant: str, offload: Any, tmp_path: Path, fill: Callable[..., None]
) -> None:
    model = offload(KINDS[kind].make().eval(), tmp_path)
    if kind == "MultiheadAttention":  # which accelerate cannot run so, adapted or not
        with pytest.raises(RuntimeError, match="device"):
            outputs(kind, model)
        with pytest.raises(GraftError, match="out_proj is offloaded by itself"):
            inject(model, config(kind, variant))
        return
    before = outputs(kind, model)
    where = {name: p.device for name, p in model.named_parameters()}
    adapted(model, kind, variant, fill)
    plain = adapted(KINDS[kind].make().eval(), kind, variant, fill)
    same(kind, model, plain)
    assert {name: p.device for name, p in base_state_dict(model, keep_vars=True).items()} == where
    twin = inject_lora_file(KINDS[kind].make().eval(), save(model, tmp_path / "task"))
    assert torch.equal(outputs(kind, twin), outputs(kind, plain))
    with pytest.raises(MergeError, match="offloaded"):
        merge(model)
    remove(model, "default")
    assert torch.equal(outputs(kind, model), before)


@cells
def test_hooks_that_offload_nothing_before_and_after(
    kind: str, variant: str, tmp_path: Path, fill: Callable[..., None]
) -> None:
    plain = adapted(KINDS[kind].make().eval(), kind, variant, fill)
    before = adapted(nothing(KINDS[kind].make().eval(), tmp_path), kind, variant, fill)
    same(kind, before, plain)
    plain.zero_grad()
    after = nothing(adapted(KINDS[kind].make().eval(), kind, variant, fill), tmp_path)
    same(kind, after, plain)
    merge(after)
    merge(plain)
    assert torch.equal(outputs(kind, after), outputs(kind, plain))


@cells
@offloads
def test_offloading_afterwards_is_refused_at_the_first_call(
    kind: str, variant: str, offload: Any, tmp_path: Path, fill: Callable[..., None]
) -> None:
    """The hooks would take away the tensors that train, and an optimizer would be left with dead ones."""
    model = adapted(KINDS[kind].make().eval(), kind, variant, fill)
    offload(model, tmp_path)
    with pytest.raises(GraftError, match="offload the model before injecting"):
        outputs(kind, model)


def test_a_layer_that_comes_back_with_the_module_above_it_is_refused(mlp: Callable[[], nn.Module]) -> None:
    from accelerate import cpu_offload

    model = cpu_offload(nn.ModuleList([mlp(), mlp()]), CPU, preload_module_classes=["Sequential"])
    with pytest.raises(GraftError, match=r"'0\.0' is offloaded with all of '0' \(preload_module_classes\)"):
        inject(model, AdapterConfig(r=2))
    assert type(model[0][0]) is nn.Linear


@pytest.mark.filterwarnings("ignore:.*offload.*:UserWarning")
def test_a_device_map(
    llama: Callable[..., nn.Module], tokens: torch.Tensor, fill: Callable[..., None], tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    mapped = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", device_map=where, offload_folder=str(tmp_path / "disk"), dtype=torch.float32
    ).eval()
    assert mapped.model.layers[1].self_attn.q_proj.weight.is_meta
    plain = llama()
    for model in (mapped, plain):
        torch.manual_seed(0)
        inject(
            model, AdapterConfig(r=2, dora=True, targets=("q_proj", "down_proj", "lm_head", "embed_tokens"))
        )
        fill(model)
        model(tokens, labels=tokens).loss.backward()
    true = adapter_parameters(plain)
    for name, parameter in adapter_parameters(mapped).items():
        torch.testing.assert_close(parameter.grad, true[name].grad)
    with torch.no_grad():
        assert torch.equal(mapped(tokens).logits, plain(tokens).logits)
        assert torch.equal(
            mapped.generate(tokens[:1], max_new_tokens=3), plain.generate(tokens[:1], max_new_tokens=3)
        )
    mapped.save_pretrained(tmp_path / "again", state_dict=base_state_dict(mapped))
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in llama().state_dict().items())
