"""Scalings of a text: they are those of the forward, named, and looking leaves nothing behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from orbit.adapter import AdapterConfig, inject, set_route
from orbit.xlora import Scalings, XLoRAError, entropy, mix, xLoRAConfig
from tests.tiny_llm import tiny_llama, tiny_tokenizer
from tests.xlora.oracle import decided, llama, mixture, tokens


def test_a_text_has_the_scalings_of_its_forward() -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    for expert in ("facts", "chat"):
        inject(model, AdapterConfig(r=2), expert)
    mixed: Any = decided(mix(model, ("facts", "chat"), xLoRAConfig(32, layerwise_scalings=True)))
    text = "when did ghana become independent ?"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = Scalings.of(mixed, text, tokenizer)
    assert mixed.get_latest_scalings() is None
    mixed(ids)
    assert torch.equal(found.values, mixed.get_latest_scalings()[0])
    assert found.tokens == ("when", "did", "ghana", "become", "independent", "?")
    assert found.experts == ("facts", "chat")
    assert found.layers == tuple(mixed.xlora_layers())
    assert found.layers[0] == "model.layers.0.self_attn.q_proj"
    for same in (ids, ids[0], ids[0].tolist()):
        assert torch.equal(Scalings.of(mixed, same).values, found.values)
    assert Scalings.of(mixed, ids).tokens == tuple(map(str, ids[0].tolist()))


def test_what_the_layers_are_given_is_after_top_k_and_weight() -> None:
    mixed = mixture(top_k_lora=1, global_scaling_weight=3.0)
    whole = Scalings.of(mixed, tokens()[0])
    given = Scalings.of(mixed, tokens()[0], as_applied=True)
    largest = torch.nn.functional.one_hot(whole.values.argmax(-1), 4)
    assert torch.allclose(given.values, 3.0 * whole.values * largest)
    assert int((given.values > 0).sum()) == 9 * len(given.layers)


def test_looking_leaves_the_model_as_it_was() -> None:
    mixed = mixture(xlora_depth=2, xlora_dropout_p=0.5).train()
    mixed.model.layers[1].eval()
    modes = [module.training for module in mixed.modules()]
    mixed.enable_scalings_logging()
    first, second = Scalings.of(mixed, tokens()[0]), Scalings.of(mixed, tokens()[0])
    assert torch.equal(first.values, second.values)  # no dropout
    assert [module.training for module in mixed.modules()] == modes
    assert mixed.get_scalings_log() == []
    assert not first.values.requires_grad
    with pytest.raises(IndexError):
        Scalings.of(mixed, [10**6])
    assert [module.training for module in mixed.modules()] == modes


def test_a_route_that_somebody_chose_does_not_change_what_the_router_says() -> None:
    mixed = mixture()
    free = Scalings.of(mixed, tokens()[0])
    set_route(mixed, "chat")
    assert torch.equal(Scalings.of(mixed, tokens()[0]).values, free.values)
    chosen = mixed(tokens())
    assert torch.equal(chosen.logits, mixed(tokens(), task="chat").logits)


def test_mean_and_winner() -> None:
    values = torch.tensor([[[0.2, 0.7, 0.1], [0.3, 0.3, 0.4]], [[0.1, 0.5, 0.4], [0.8, 0.1, 0.1]]])
    s = Scalings(values, ("a", "b", "c"), ("0", "1"), ("x", "y"))
    assert s.mean.tolist() == pytest.approx([0.35, 0.4, 0.25])
    assert s.winner == "b"
    assert torch.allclose(s.entropy(), entropy(values))
    assert s.entropy().shape == (2, 2)


def test_a_bf16_prediction_with_a_gradient_is_taken_as_it_is() -> None:
    values = torch.rand(3, 2, 2, dtype=torch.bfloat16, requires_grad=True)
    s = Scalings(values, ("a", "b"), ("0", "1"), ("x", "y", "z"))
    assert s.values.dtype == torch.float32
    assert not s.values.requires_grad
    assert torch.equal(s.values, values.detach().float())


@pytest.mark.parametrize(
    ("shares", "nats"),
    [
        ([1.0, 0.0, 0.0, 0.0], 0.0),
        ([0.25] * 4, math.log(4)),
        ([2.0, 2.0, 0.0, 0.0], math.log(2)),
        ([0.0] * 4, 0.0),
        ([0.5, 0.25, 0.125, 0.125], 1.75 * math.log(2)),
    ],
)
def test_entropy(shares: list[float], nats: float) -> None:
    assert float(entropy(torch.tensor(shares))) == pytest.approx(nats)
    assert float(entropy(torch.tensor(shares), normalised=True)) == pytest.approx(nats / math.log(4))


def test_the_entropy_of_one_expert_is_none() -> None:
    assert entropy(torch.tensor([[0.3], [1.0]]), normalised=True).tolist() == [0.0, 0.0]


ONE = torch.full((2, 3, 2), 0.5)
NAMES: tuple[Any, ...] = (("a", "b"), ("0", "1", "2"), ("x", "y"))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        (lambda: Scalings(ONE[None], *NAMES), r"shape \(1, 2, 3, 2\) for 2 tokens, 3 layers and 2 experts"),
        (lambda: Scalings(ONE, ("a",), *NAMES[1:]), "1 experts"),
        (lambda: Scalings(ONE[:0], NAMES[0], NAMES[1], ()), "0 tokens"),
        (lambda: Scalings(ONE * torch.nan, *NAMES), "NaN or infinity"),
        (lambda: entropy(ONE - 1), r"a scaling is -0\.5"),
        (lambda: Scalings.of(llama(), [1]), "LlamaForCausalLM is no mixture"),
        (lambda: Scalings.of(mixture(), "text"), "no tokenizer"),
        (lambda: Scalings.of(mixture(), tokens()), r"one text .* ids of shape \(3, 9\)"),
        (lambda: Scalings.of(mixture(), []), "at least one token"),
    ],
)
def test_refusals(wrong: Callable[[], Any], why: str) -> None:
    with pytest.raises(XLoRAError, match=why):
        wrong()
