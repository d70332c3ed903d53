"""freeze_layers and unfreeze_layers: what a target means, also with adapters, tied weights and wrappers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel

from orbit.adapter import AdapterConfig, inject, set_trainable
from orbit.model import freeze_layers, get_trainable_params, unfreeze_layers
from orbit.model.errors import TargetError


class Net(nn.Module):
    """An encoder of two layers with a norm, and a head tied to its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        layer = {"q_proj": nn.Linear(4, 4), "eq_proj": nn.Linear(4, 4, bias=False), "act": nn.ReLU()}
        self.encoder = nn.ModuleList(nn.ModuleDict(copy.deepcopy(layer)) for _ in range(2))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


LAYER = ["q_proj.weight", "q_proj.bias", "eq_proj.weight"]


@pytest.mark.parametrize(
    ("targets", "meant"),
    [
        ("encoder", [f"encoder.{i}.{n}" for i in (0, 1) for n in LAYER]),
        (["encoder.1"], [f"encoder.1.{n}" for n in LAYER]),
        (["q_proj"], [f"encoder.{i}.q_proj.{n}" for i in (0, 1) for n in ("weight", "bias")]),
        (["*.bias"], ["encoder.0.q_proj.bias", "encoder.1.q_proj.bias", "norm.bias"]),
        (["encoder.[1-9]", "norm.weight"], [*(f"encoder.1.{n}" for n in LAYER), "norm.weight"]),
        ([r"re:encoder\.\d\.e?q_proj\.weight"], [f"encoder.{i}.{n}q_proj.weight" for i in (0, 1) for n in ("", "e")]),
        (("head",), ["embed.weight"]),
        ("*", None),
    ],
)  # fmt: skip
def test_what_a_target_means(targets, meant) -> None:
    model = Net()
    everything = list(dict(model.named_parameters()))
    assert freeze_layers(model, targets) == (meant or everything)
    assert trains(model) == set(everything) - set(meant or everything)
    assert freeze_layers(model, targets) == []
    assert unfreeze_layers(model, targets) == (meant or everything)
    assert trains(model) == set(everything)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["norm", "encodr"], r"target 'encodr' matches nothing in Net; did you mean 'encoder'\?"),
        (["q_porj"], r"did you mean 'q_proj'\?"),
        (
            ["re:zzz.*"],
            "matches nothing in Net; its names begin with 'embed', 'encoder', 'head', 'norm'",
        ),
        (["proj"], "matches nothing"),
        (["act"], r"names 2 module\(s\) \(ReLU\) without parameters"),
        (["re:("], "is not a regular expression"),
        ([], 'no target was given: name layers, or say "\\*"'),
        ([""], 'no target was given: name layers, or say "\\*"'),
        ([3], "target 3 is a int: targets are names"),
    ],
)
@pytest.mark.parametrize("change", [freeze_layers, unfreeze_layers])
def test_a_target_that_matches_nothing_changes_nothing(change, targets, says) -> None:
    model = Net()
    freeze_layers(model, "encoder.0")
    before = trains(model)
    with pytest.raises(TargetError, match=says):
        change(model, ["norm", *targets] if targets else targets)
    assert trains(model) == before


def test_no_names_are_no_names() -> None:
    for targets in ("", None, 3):
        model = Net()
        with pytest.raises(TargetError, match=r"no target was given|targets are names"):
            freeze_layers(model, targets)
        assert all(p.requires_grad for p in model.parameters())


def test_a_frozen_layer_does_not_move_by_the_gradient_that_it_had() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    freeze_layers(model, "0")
    before = copy.deepcopy(model.state_dict())
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"1.weight", "1.bias"}


def test_names_mean_the_model_and_not_the_adapters_that_hang_on_it() -> None:
    model = Net()
    inject(model, AdapterConfig(r=2, targets=("q_proj",)), "math")
    inject(model, AdapterConfig(r=2, targets=("q_proj",)), "law")
    set_trainable(model, "law", False)
    before = trains(model)
    assert all(".math." in name for name in before)

    base = unfreeze_layers(model, ["encoder", "norm"])
    assert not any("lora" in name for name in base)
    assert trains(model) == before | set(base)
    assert freeze_layers(model, ["*"]) == base
    assert trains(model) == before

    assert freeze_layers(model, "encoder.1.q_proj.lora_A") == ["encoder.1.q_proj.lora_A.math.weight"]
    assert set(unfreeze_layers(model, "*.lora_?.law")) == {
        f"encoder.{i}.q_proj.lora_{n}.law.weight" for i in (0, 1) for n in "AB"
    }


def test_a_layer_with_two_names_is_found_by_both() -> None:
    model = Net()
    model.final_norm = model.norm
    assert freeze_layers(model, "final_norm") == ["norm.weight", "norm.bias"]


def test_wrapped_models_are_seen_through() -> None:
    inner = Net()
    inner.encoder = torch.compile(inner.encoder, backend="eager")  # its names gain a segment
    model = torch.compile(DataParallel(inner), backend="eager")
    assert freeze_layers(model, r"re:encoder\.0\.eq_proj\.weight") == ["encoder._orig_mod.0.eq_proj.weight"]
    assert freeze_layers(model, "encoder.0.q_proj.bias") == ["encoder._orig_mod.0.q_proj.bias"]


def test_a_quantised_weight_cannot_train() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    freeze_layers(model, "*")
    model[1].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TargetError, match=r"1\.weight holds torch\.uint8 .*cannot train.*inject"):
        unfreeze_layers(model, "*")
    assert trains(model) == set()


def test_trainable_parameters_come_once_and_in_order() -> None:
    model = Net()
    freeze_layers(model, "encoder.0")
    params = get_trainable_params(model)
    assert [id(p) for p in params] == [id(p) for p in model.parameters() if p.requires_grad]
    assert len({id(p) for p in params}) == len(params) == 6
    torch.optim.SGD(params, lr=0.1)
