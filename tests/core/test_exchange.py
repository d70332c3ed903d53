"""What torch does not exchange between ranks by itself, and what a sharded model is asked for besides a step."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from orbit.core.ranks import shards
from tests.core import exchange_cases as cases
from tests.core.parallel_cases import engine
from tests.ranks import on_ranks

WAYS = ["ddp", "fsdp"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks("tests.core.exchange_cases:all_of", 2, str(tmp_path_factory.mktemp("own")))


def same(seen: list[dict[str, Any]], name: str, alone: dict[str, Any]) -> bool:
    """Bit for bit on both ranks, and up to rounding what one process has."""
    one, other = (rank[name] for rank in seen)
    for key, value in alone.items():
        a, b = (torch.as_tensor(found[key]).double() for found in (one, other))
        assert torch.equal(a, b), f"{key} differs between the ranks"
        torch.testing.assert_close(a, torch.as_tensor(value).double(), rtol=0, atol=2e-6, msg=key)
    return one.keys() == alone.keys()


@pytest.mark.parametrize("kind", ["blocks", "head", "nothing"])
def test_what_the_users_function_leaves_unwrapped_is_averaged(seen: list[dict[str, Any]], kind: str) -> None:
    assert same(seen, f"half {kind}", cases.steps(engine(None, [])))


@pytest.mark.parametrize("way", WAYS)
def test_a_criterion_that_learns_begins_and_stays_the_same(seen: list[dict[str, Any]], way: str) -> None:
    alone = cases.criterion(way)
    assert same(seen, f"criterion {way}", alone)
    assert alone["unused"].tolist() == [1.0, 1.0]  # without a gradient anywhere it is not decayed


@pytest.mark.parametrize("way", WAYS)
def test_a_mean_over_nothing_on_one_rank_contributes_nothing(seen: list[dict[str, Any]], way: str) -> None:
    for rank in seen:
        assert all(value.isfinite().all() for value in rank[f"without weight {way}"].values())
    assert same(seen, f"without weight {way}", seen[0][f"without weight {WAYS[0]}"])


@pytest.mark.parametrize("way", WAYS)
def test_lr_find_after_an_evaluation(seen: list[dict[str, Any]], way: str) -> None:
    assert same(seen, f"finds {way}", cases.finds_after_evaluation(way))


def test_ranks_evaluate_and_save_one_model(tmp_path: Path) -> None:
    ranks = on_ranks("tests.core.exchange_cases:normed_all", 2, str(tmp_path))
    for way in WAYS:
        whole, _, resumed = ranks[0][way]
        for key, value in whole.items():
            for other in (resumed, ranks[1][way][0], ranks[1][way][2]):
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), (way, key)


def test_state_dict_options_of_a_sharded_model(seen: list[dict[str, Any]]) -> None:
    assert [rank["own state"] for rank in seen] == [{"pieces": True, "whole": True}] * 2


def test_the_best_state_is_whole_where_that_is_asked_for(seen: list[dict[str, Any]]) -> None:
    assert [rank["whole best"] for rank in seen] == [("checkpoint_step_4.pt", True)] * 2


def test_tasks_with_an_optimizer_each_go_on_in_shards(seen: list[dict[str, Any]], tmp_path: Path) -> None:
    assert same(seen, "tasks 8", cases.tasks("alone", str(tmp_path), 8))  # it was resumed at 5


def test_averages_of_a_model_that_the_user_sharded(seen: list[dict[str, Any]]) -> None:
    assert same(seen, "averages", cases.own_averages())


def test_a_sampler_without_length_says_what_to_do(seen: list[dict[str, Any]]) -> None:
    assert all("Endless has no len()" in rank["without length"] for rank in seen)


def test_a_rank_whose_batches_are_left_over_is_told(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["unequal"] == []
    assert "ended after 2 batches" in seen[1]["unequal"][0]


def test_each_rank_counts_its_own_rows(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        whole, _, resumed = rank["rows"]
        assert resumed == whole
    assert seen[0]["rows"] != seen[1]["rows"]


def test_a_piece_that_is_lost_is_the_same_error_everywhere(seen: list[dict[str, Any]]) -> None:
    for rank in seen:
        kind, text = rank["lost"]
        assert kind == "CheckpointError"
        assert "is not finite" in text


def test_a_counter_stays_what_it_counted() -> None:
    assert shards.whole({"milestones": Counter({3: 2})}, everywhere=True) == {"milestones": {3: 2}}
