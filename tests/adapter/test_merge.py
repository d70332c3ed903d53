"""Merging: exact, reversible to the bit, and never twice."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from orbit.adapter import (
    AdapterConfig,
    MergeError,
    RouteError,
    current_route,
    inject,
    merge,
    merged,
    set_route,
    unmerge,
)

Make = Callable[..., nn.Module]
KINDS = [{}, {"dora": True}, {"rslora": True}]


@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_routed_and_unmerged_is_the_very_bits(
    kind: dict[str, bool], mlp: Make, fill: Callable[..., None]
) -> None:
    model, x = mlp().double().eval(), torch.randn(4, 6).double()
    inject(model, AdapterConfig(r=2, **kind), "a")
    inject(model, AdapterConfig(r=2), "b")
    fill(model)
    parameters = dict(model.named_parameters())
    bits = {name: p.clone() for name, p in parameters.items()}
    state = list(model.state_dict().items())
    routed = model(x, task="a")
    merge(model, "a")
    assert merged(model) == "a"
    torch.testing.assert_close(model(x), routed)
    assert [name for name, _ in state] == list(model.state_dict())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state)
    unmerge(model)
    assert current_route(model) == "b"
    assert dict(model.named_parameters()) == parameters
    assert all(torch.equal(p, bits[name]) for name, p in parameters.items())
    assert torch.equal(model(x, task="a"), routed)


def test_a_hundred_rounds_in_bf16_do_not_drift(mlp: Make, fill: Callable[..., None]) -> None:
    model = mlp().bfloat16().eval()
    inject(model, AdapterConfig(r=2))
    fill(model)
    before = model[0].weight.clone()
    for _ in range(100):
        merge(model)
        assert not torch.equal(model[0].weight, before)
        unmerge(model)
    assert torch.equal(model[0].weight, before)


def test_merged_layers_do_not_train(mlp: Make) -> None:
    model, x = mlp(), torch.randn(4, 6)
    inject(model, AdapterConfig(r=2))
    merge(model)
    with pytest.raises(RouteError, match="training would apply it twice"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)
    model.train()
    unmerge(model)
    model(x).sum().backward()


def test_refusals_change_nothing(mlp: Make) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2), "a")
    with pytest.raises(MergeError, match="nothing is merged"):
        unmerge(model)
    merge(model, "a")
    with pytest.raises(MergeError, match="'a' is merged already"):
        merge(model, "a")
    with pytest.raises(RouteError, match="unmerge before adding"):
        inject(model, AdapterConfig(r=2), "b")
    with pytest.raises(RuntimeError, match="merged into it; unmerge first"):
        model.load_state_dict(mlp().state_dict())
    unmerge(model)
    set_route(model, None)
    with pytest.raises(MergeError, match="no single task is current, so say which to merge: 'a'"):
        merge(model)
    assert merged(model) is None


def test_quantised_weights_are_refused_whole(mlp: Make) -> None:
    class Halved(nn.Module):
        def forward(self, W: torch.Tensor) -> torch.Tensor:
            return W / 2

    model = mlp()
    nn.utils.parametrize.register_parametrization(model[2], "weight", Halved())
    inject(model, AdapterConfig(r=2))
    first = model[0].weight
    with pytest.raises(MergeError, match="layer '2' cannot be merged"):
        merge(model)
    assert model[0].weight is first
    assert merged(model) is None


def test_tied_weights(llama: Make, fill: Callable[..., None], tokens: torch.Tensor) -> None:
    model = llama(tie_word_embeddings=True)
    inject(model, AdapterConfig(r=2, targets=("lm_head", "q_proj")))
    fill(model)
    routed, embeddings = model(tokens).logits, model.model.embed_tokens.weight
    with pytest.raises(
        MergeError, match=r"lm_head.weight shares its storage with model.embed_tokens.weight.*untie=True"
    ):
        merge(model)
    assert merged(model) is None
    merge(model, untie=True)
    assert model.model.embed_tokens.weight is embeddings
    torch.testing.assert_close(model(tokens).logits, routed, rtol=1e-4, atol=1e-5)
    unmerge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_merged_model_can_be_unmerged(
    how: Callable, mlp: Make, fill: Callable[..., None]
) -> None:  # type: ignore[type-arg]
    model, x = mlp().eval(), torch.randn(4, 6)
    inject(model, AdapterConfig(r=2))
    fill(model)
    routed, before = model(x), model[0].weight.clone()
    merge(model)
    twin = how(model)
    assert torch.equal(twin(x), model(x))
    unmerge(twin)
    assert torch.equal(twin[0].weight, before)
    assert torch.equal(twin(x), routed)
    assert merged(model) == "default"


def test_a_merged_model_that_was_cast_is_unmerged_to_the_cast_original(
    mlp: Make, fill: Callable[..., None]
) -> None:
    model = mlp()
    inject(model, AdapterConfig(r=2))
    fill(model)
    expected = model[0].weight.bfloat16()
    merge(model)
    model.bfloat16()
    unmerge(model)
    assert isinstance(model[0].weight, nn.Parameter)
    assert torch.equal(model[0].weight, expected)


def test_moving_a_merged_model_keeps_its_parameters() -> None:
    """The weights that are set aside move too, and stay the same Parameters, tied and trainable as they were."""
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    )
    model[2].weight = model[0].weight
    inject(model, AdapterConfig(r=2, targets=("0", "1", "2")), freeze_base=False)
    before = list(model.parameters())
    merge(model, untie=True)
    model.double()
    assert model[0].weight is not model[2].weight
    unmerge(model)
    assert all(now is then for now, then in zip(model.parameters(), before, strict=True))
    assert model[2].weight is model[0].weight
    assert all(p.requires_grad and p.dtype == torch.float64 and p.grad_fn is None for p in before)
