"""ForgetRetainDataset: the anchor is walked through, partners change with the epoch and wear out evenly."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from orbit.core.components import ComponentError
from orbit.data.forget_retain import ForgetRetainDataset
from orbit.data.order import EpochOrder
from tests.tiny_llm import tiny_tokenizer

FORGET, RETAIN = ["f0", "f1", "f2"], [f"r{i}" for i in range(10)]


def walk(data: ForgetRetainDataset, epoch: int) -> list[tuple[str, str]]:
    data.set_epoch(epoch)
    return [(data[i]["forget"], data[i]["retain"]) for i in range(len(data))]


def test_the_anchor_is_walked_through_and_partners_change() -> None:
    data = ForgetRetainDataset(FORGET, RETAIN)
    epochs = [walk(data, epoch) for epoch in range(10)]
    assert all([forget for forget, _ in epoch] == FORGET for epoch in epochs)
    assert Counter(retain for epoch in epochs for _, retain in epoch) == dict.fromkeys(RETAIN, 3)
    assert walk(data, 4) == epochs[4], "an epoch's partners follow from its number"
    assert walk(ForgetRetainDataset(FORGET, RETAIN, seed=1), 0) != epochs[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_accelerates_loaders_tell_the_epoch_too(ranks: int) -> None:
    """On several ranks they tell the sampler alone, which passes it on."""
    data = ForgetRetainDataset(FORGET, RETAIN)
    loader = prepare_data_loader(
        DataLoader(data, sampler=EpochOrder(data)), num_processes=ranks, process_index=0, rng_types=[]
    )
    loader.set_epoch(2)
    assert [data[i]["retain"] for i in range(3)] == [
        retain for _, retain in walk(ForgetRetainDataset(FORGET, RETAIN), 2)
    ]


def test_the_other_anchor() -> None:
    data = ForgetRetainDataset(FORGET, RETAIN, anchor="retain")
    pairs = walk(data, 0)
    assert [retain for _, retain in pairs] == RETAIN
    assert sorted(Counter(forget for forget, _ in pairs).values()) == [3, 3, 4]
    assert len(data) == 10
    assert data[-1]["retain"] == "r9"


def test_nothing_to_retain() -> None:
    data = ForgetRetainDataset(FORGET)
    assert [data[i] for i in range(3)] == [{"forget": item} for item in FORGET]


def test_sides_from_a_config() -> None:
    section: dict[str, Any] = {
        "handler": "QADataset",
        "args": {"hf_args": {"rows": [{"question": "hello", "answer": "mali"}]}},
    }
    data = ForgetRetainDataset(section, section, template_args={}, tokenizer=tiny_tokenizer())
    assert data[0]["retain"]["labels"].shape == data[0]["forget"]["input_ids"].shape
    with pytest.raises(
        ComponentError, match="dataset 'retain' takes no argument 'hf_arg'; did you mean 'hf_args'"
    ):
        ForgetRetainDataset(["f0"], {"handler": "QADataset", "args": {"hf_arg": 1}})


def test_what_makes_no_pairs() -> None:
    with pytest.raises(ValueError, match="anchor='retain': one of forget"):
        ForgetRetainDataset(FORGET, anchor="retain")
    with pytest.raises(ValueError, match="retain holds no item"):
        ForgetRetainDataset(FORGET, [])
