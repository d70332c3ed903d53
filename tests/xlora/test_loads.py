"""The load of experts over a data set, counted by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orbit.xlora import Scalings, XLoRAError, entropy, expert_load
from tests.xlora.oracle import mixture, tokens


def batches() -> list[dict[str, torch.Tensor]]:
    """Padding on the right, on the left, and a batch without any."""
    ids, mask = tokens(), torch.ones(3, 9, dtype=torch.long)
    right, left = mask.clone(), mask.clone()
    right[0, 4:] = right[2, 7:] = 0
    left[1, :3] = 0
    return [
        {"input_ids": ids, "attention_mask": right, "labels": ids},
        {"input_ids": ids, "attention_mask": left},
        {"input_ids": tokens(2, 5)},
    ]


@pytest.mark.parametrize("layerwise", [False, True])
def test_the_load_is_what_counting_gives(layerwise: bool) -> None:
    mixed = mixture(layerwise_scalings=layerwise)
    kept = []
    for batch in batches():
        mixed(**batch)
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        kept += [
            mixed.get_latest_scalings()[row, at]  # (layers, experts)
            for row in range(len(mask))
            for at in range(mask.shape[1])
            if mask[row, at]
        ]
    counted = torch.stack(kept)
    load = expert_load(mixed, batches())
    assert load.tokens == len(counted) == 20 + 24 + 10
    assert load.experts == mixed.xlora_experts
    assert load.layers == tuple(mixed.xlora_layers())
    for k in range(4):
        largest = (counted.argmax(-1) == k).float().mean(0)
        assert torch.allclose(load.share[:, k], largest)
        assert torch.allclose(load.mean[:, k], counted[..., k].mean(0))
    assert load.entropy is not None
    assert torch.allclose(load.entropy, entropy(counted).mean(0))
    assert 0 < load.share.max() < 1  # the classifier decides by token
    assert mixed.get_scalings_log() == []


def test_what_padding_holds_does_not_count() -> None:
    mixed = mixture()
    one, two = batches()[0], batches()[0]
    two["input_ids"] = torch.where(two["attention_mask"].bool(), two["input_ids"], 7)
    loads = [expert_load(mixed, [batch]) for batch in (one, two)]
    assert torch.equal(loads[0].mean, loads[1].mean)


def test_ids_alone_and_a_table() -> None:
    mixed = mixture()
    load = expert_load(mixed, iter([tokens()]))
    text = Scalings.of(mixed, tokens()[0])
    assert torch.allclose(expert_load(mixed, [tokens()[:1]]).mean.mean(0), text.mean)
    lines = str(load).splitlines()
    assert [line.split()[0] for line in lines[1:5]] == list(mixed.xlora_experts)
    assert f"{float(load.share[:, 1].mean()):.1%}" in lines[2]
    assert f"{float(load.mean[:, 2].mean()):.3f}" in lines[3]
    assert lines[-1].startswith("27 tokens, 14 layers, entropy 0.")


def test_without_softmax_there_is_a_load_and_no_entropy() -> None:
    load = expert_load(mixture(enable_softmax=False), [tokens()])
    assert load.entropy is None
    assert "entropy" not in str(load)
    assert torch.allclose(load.share.sum(-1), torch.ones(14))


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ([], "no token"),
        ([{"input_ids": tokens(), "attention_mask": torch.zeros(3, 9)}], "no token"),
        ([[tokens()]], "was given list"),
        ([{"labels": tokens()}], r"was given \['labels'\]"),
    ],
)
def test_refusals(wrong: Any, why: str) -> None:
    with pytest.raises(XLoRAError, match=why):
        expert_load(mixture(), wrong)
