"""A head that is tied to the embedding: one Parameter, two layers, each with tasks of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbit.adapter import (
    AdapterConfig,
    MergeError,
    adapter_parameters,
    base_state_dict,
    inject,
    inject_lora_file,
    merge,
    merged_state_dict,
    remove,
    save,
    task_layers,
    unmerge,
)

Make = Callable[..., nn.Module]
Fill = Callable[..., None]
TARGETS = {"head": ("lm_head",), "embedding": ("embed_tokens",), "both": ("lm_head", "embed_tokens")}
which = pytest.mark.parametrize("which", TARGETS)
dora = pytest.mark.parametrize("dora", [False, True])


@pytest.fixture
def adapted(llama: Make, fill: Fill) -> Callable[[str, bool], nn.Module]:
    def make(which: str, dora: bool) -> nn.Module:
        model = llama(tie_word_embeddings=True)
        torch.manual_seed(1)
        inject(model, AdapterConfig(r=2, alpha=4, dora=dora, targets=TARGETS[which]))
        fill(model)
        return model

    return make


def dense(model: nn.Module, untied: nn.Module) -> nn.Module:
    """An untied model with W' of each side written out."""
    W = model.model.embed_tokens.weight
    assert W is model.lm_head.weight
    untied.load_state_dict(base_state_dict(model))
    with torch.no_grad():
        for path, layer in task_layers(model, "default").items():
            slot = layer.slots()["default"]
            V = W.T if "embed" in path else W
            V = V + slot.up.scale * slot.up.weight @ slot.down.weight
            if slot.magnitude is not None:
                V = slot.magnitude.weight[:, None] * V / V.norm(dim=1, keepdim=True)
            untied.get_submodule(path).weight.copy_(V.T if "embed" in path else V)
    return untied


@dora
@which
def test_each_side_has_its_own_update(
    which: str, dora: bool, adapted: Callable[..., nn.Module], llama: Make, tokens: Tensor
) -> None:
    model = adapted(which, dora)
    true = dense(model, llama(tie_word_embeddings=False))
    torch.testing.assert_close(model(tokens).logits, true(tokens).logits)
    assert torch.equal(model(tokens, task=None).logits, llama(tie_word_embeddings=True)(tokens).logits)


@dora
@which
def test_training_keeps_the_shared_weight_and_the_tie(
    which: str, dora: bool, adapted: Callable[..., nn.Module], tokens: Tensor
) -> None:
    model = adapted(which, dora)
    shared = model.lm_head.weight.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    for _ in range(2):
        logits = model.train()(tokens).logits
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.lm_head.weight, shared)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


@dora
@which
def test_saved_as_a_base_and_as_a_task(
    which: str,
    dora: bool,
    adapted: Callable[..., nn.Module],
    llama: Make,
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    from transformers import LlamaForCausalLM

    model = adapted(which, dora)
    model.save_pretrained(tmp_path / "base", state_dict=base_state_dict(model))
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(base(tokens).logits, llama(tie_word_embeddings=True)(tokens).logits)
    inject_lora_file(base, save(model, tmp_path / "task"))
    assert torch.equal(base(tokens).logits, model(tokens).logits)


@dora
@which
def test_merging_is_refused_unless_untied(
    which: str,
    dora: bool,
    adapted: Callable[..., nn.Module],
    llama: Make,
    tokens: Tensor,
    tmp_path: Path,
) -> None:
    from transformers import LlamaForCausalLM

    model = adapted(which, dora)
    before, shared = model(tokens).logits, model.lm_head.weight
    with pytest.raises(MergeError, match="untie=True"):
        merge(model)
    with pytest.raises(MergeError, match="untie=True"):
        merged_state_dict(model)
    assert torch.equal(model(tokens).logits, before)

    state = merged_state_dict(model, untie=True)
    untied = llama(tie_word_embeddings=False)
    untied.load_state_dict(state)
    torch.testing.assert_close(untied(tokens).logits, before)
    untied.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(tokens).logits, before)

    merge(model, untie=True)
    torch.testing.assert_close(model(tokens).logits, before)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    unmerge(model)
    assert model.lm_head.weight is shared
    assert model.model.embed_tokens.weight is shared
    assert torch.equal(model(tokens).logits, before)
    remove(model, "default")
    assert type(model.lm_head) is nn.Linear


@which
def test_tying_again_is_harmless(which: str, adapted: Callable[..., nn.Module], tokens: Tensor) -> None:
    """transformers ties whenever it loads, resizes or moves a model."""
    model = adapted(which, True)
    before = model(tokens).logits
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model(tokens).logits, before)
    model.to(torch.float64)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (model(tokens).logits - before).abs().max() < 1e-4
