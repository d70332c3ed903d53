"""EvenDraws: every row as often as any other, whatever an epoch's size."""

from __future__ import annotations

import pytest
import torch

from orbit.data.draws import EvenDraws, hashed


@pytest.mark.parametrize(("rows", "per_epoch"), [(7, 3), (7, 7), (3, 8), (1, 5), (5, 1)])
def test_no_row_is_more_than_once_ahead(rows: int, per_epoch: int) -> None:
    draws = EvenDraws(rows, per_epoch, "seed")
    for epochs in range(1, 12):
        course = torch.cat([draws.epoch(epoch) for epoch in range(epochs)])
        assert len(course) == epochs * per_epoch
        counts = course.bincount(minlength=rows)
        assert counts.max() - counts.min() <= 1


def test_the_course_follows_from_the_seed() -> None:
    assert torch.equal(EvenDraws(50, 50, "a").epoch(3), EvenDraws(50, 50, "a").epoch(3))
    assert not torch.equal(EvenDraws(50, 50, "a").epoch(3), EvenDraws(50, 50, "b").epoch(3))
    assert not torch.equal(EvenDraws(50, 50, "a").epoch(3), EvenDraws(50, 50, "a").epoch(4))


def test_the_hash_is_the_same_in_every_process() -> None:
    assert hashed(0, 1) == 8566881351708354045
