"""A mixture against PEFT's X-LoRA with the same weights, and against the equations where PEFT has no answer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orbit.adapter import load, save
from orbit.xlora import mix, xLoRAConfig
from tests.xlora.oracle import HIDDEN, decided, expert, llama, mixture, same_as_dense, tokens

SETTINGS: dict[str, dict[str, Any]] = {
    "one linear": {},
    "depth 3": {"xlora_depth": 3},
    "layerwise": {"layerwise_scalings": True},
    "depth 3 layerwise": {"xlora_depth": 3, "layerwise_scalings": True},
    "top 2": {"top_k_lora": 2},
    "top 1 layerwise": {"top_k_lora": 1, "layerwise_scalings": True},
    "top 2 softmax": {"top_k_lora": 2, "enable_softmax_topk": True},
    "top 3 softmax layerwise depth 3": {
        "top_k_lora": 3,
        "enable_softmax_topk": True,
        "layerwise_scalings": True,
        "xlora_depth": 3,
    },
    "softmax twice": {"enable_softmax_topk": True},
    "global weight": {"global_scaling_weight": 1.7},
    "global weight, top 2 softmax": {
        "global_scaling_weight": 0.6,
        "top_k_lora": 2,
        "enable_softmax_topk": True,
    },
    "scaling pass": {"scaling_pass_value": 0.3},
    "scaling pass, layerwise": {"scaling_pass_value": 0.3, "layerwise_scalings": True},
    "scaling pass, global weight": {"scaling_pass_value": 0.3, "global_scaling_weight": 1.5},
    "temperature": {"softmax_temperature": 0.4},
    "temperature, top 2": {"softmax_temperature": 3.0, "top_k_lora": 2, "xlora_depth": 2},
    "no softmax": {"enable_softmax": False},
    "no softmax, top 2": {"enable_softmax": False, "top_k_lora": 2, "layerwise_scalings": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Four experts on disk, under the only names that PEFT takes."""
    root, model = tmp_path_factory.mktemp("experts"), llama(initializer_range=0.1)
    for k in range(4):
        expert(model, str(k), seed=k, size=0.1)
        save(model, root / str(k), str(k))
    return {str(k): str(root / str(k)) for k in range(4)}


def ours_and_peft(folders: dict[str, str], settings: dict[str, Any]) -> tuple[Any, Any, list[Any]]:
    """Both mixtures with one set of weights, and PEFT's classifier's parameters."""
    import peft

    mine, theirs = llama(initializer_range=0.1), llama(initializer_range=0.1)
    for name, folder in folders.items():
        load(mine, folder, name)
    shared = {"hidden_size": HIDDEN, "xlora_size": 16, "xlora_dropout_p": 0.0, **settings}
    mine = decided(mix(mine, tuple(folders), xLoRAConfig(**shared)))
    theirs.config.use_cache = False  # which PEFT asks for
    theirs = peft.get_peft_model(theirs, peft.XLoraConfig(task_type="CAUSAL_LM", adapters=folders, **shared))
    parameters = []
    classifier = dict(theirs.base_model.internal_xlora_classifier.named_parameters())
    assert set(classifier) == set(dict(mine.xlora_classifier.named_parameters()))
    with torch.no_grad():
        for name, parameter in mine.xlora_classifier.named_parameters():
            parameters.append(classifier[name].copy_(parameter))
    return mine, theirs, parameters


def relative(mine: list[Tensor], theirs: list[Tensor]) -> float:
    ours, other = (torch.cat([t.flatten() for t in tensors]) for tensors in (mine, theirs))
    return float((ours - other).norm() / other.norm())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.filterwarnings("ignore:`enable_softmax_topk`:UserWarning")
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_mixture_is_that_of_peft(settings: dict[str, Any], folders: dict[str, str]):
    mine, theirs, parameters = ours_and_peft(folders, settings)
    ids = tokens()
    ours, other = mine(ids, labels=ids), theirs(input_ids=ids, labels=ids)
    assert (ours.logits - other.logits).abs().max() < 1e-5
    with mine.disable():
        assert (ours.logits - mine(ids).logits).abs().max() > 0.05  # the experts matter
    gradients = torch.autograd.grad(ours.loss, list(mine.xlora_classifier.parameters()))
    assert relative(gradients, torch.autograd.grad(other.loss, parameters)) < 1e-4


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_mixture_is_its_equations(settings: dict[str, Any]):
    same_as_dense(mixture(**settings), llama(), tokens())


# PEFT has no answer to these. In its scaling pass it also keeps top_k_lora experts, which of equal ones is
# for topk to say, where we scale every expert by scaling_pass_value; and its classifier always has biases and ReLUs.
@pytest.mark.parametrize(
    "settings",
    [
        {"top_k_lora": 2, "scaling_pass_value": 0.3},
        {
            "top_k_lora": 2,
            "enable_softmax_topk": True,
            "scaling_pass_value": 0.3,
            "global_scaling_weight": 1.5,
        },
        {"use_bias": False},
        {"use_bias": False, "xlora_depth": 3},
        {"enable_relu_and_dropout": False, "xlora_depth": 3},
        {"enable_relu_and_dropout": False, "use_bias": False, "xlora_depth": 2, "layerwise_scalings": True},
        {"enable_softmax": False, "top_k_lora": 2, "enable_softmax_topk": True},
        {"top_k_lora": 4, "enable_softmax_topk": True},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_peft_does_otherwise_or_not_is_its_equations(settings: dict[str, Any]):
    same_as_dense(mixture(**settings), llama(), tokens())


def test_a_scaling_pass_value_of_none_is_one_over_n():
    mixed = mixture(scaling_pass_value=0.3)
    mixed.set_scaling_pass_value(None)
    assert mixed.xlora_config.scaling_pass_value == 0.25
    same_as_dense(mixed, llama(), tokens())


@pytest.mark.parametrize(
    "settings", [{"top_k_lora": 2, "enable_softmax_topk": True}, {"layerwise_scalings": True}]
)
def test_a_token_does_not_see_the_other_rows_of_its_batch(settings: dict[str, Any]):
    mixed, ids = mixture(**settings).double(), tokens()
    whole = mixed(ids).logits
    for row in range(len(ids)):
        torch.testing.assert_close(mixed(ids[row : row + 1]).logits[0], whole[row], rtol=0, atol=1e-12)


def test_a_token_does_not_see_what_comes_after_it():
    mixed, ids = mixture(top_k_lora=2, layerwise_scalings=True).double(), tokens()
    whole = mixed(ids).logits
    torch.testing.assert_close(mixed(ids[:, :4]).logits, whole[:, :4], rtol=0, atol=1e-12)


def test_padding_changes_nothing_for_the_others():
    mixed, ids = mixture(top_k_lora=2).double(), tokens()
    padded, mask = torch.cat([torch.zeros_like(ids[:, :3]), ids], 1), torch.ones(3, 12, dtype=torch.long)
    mask[:, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = mixed(padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(got, mixed(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", ["one linear", "top 1 layerwise", "scaling pass"])
def test_it_generates_what_peft_does(kind: str, folders: dict[str, str]):
    mine, theirs, _ = ours_and_peft(folders, SETTINGS[kind])
    ids = tokens()
    steps = {"do_sample": False, "min_new_tokens": 16, "max_new_tokens": 16}
    given = {"attention_mask": torch.ones_like(ids), **steps}
    found = mine.eval().generate(ids, **given)
    assert torch.equal(found, theirs.eval().generate(input_ids=ids, use_cache=False, **given))
    with mine.disable():
        assert not torch.equal(found, mine.generate(ids, **given))
