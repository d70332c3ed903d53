"""LengthGrouped: transformers' order, drawn from torch's generator and found again in the middle of an epoch."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers.trainer_pt_utils import get_length_grouped_indices

from orbit.core.feeding.feed import Feed
from orbit.data.batching import LengthGrouped


@pytest.mark.parametrize(
    ("count", "batch_size", "pool"), [(1, 1, None), (103, 4, None), (900, 3, None), (50, 8, 2)]
)
def test_the_order_is_that_of_transformers(count, batch_size, pool):
    torch.manual_seed(count)
    lengths = torch.randint(1, 40, (count,)).tolist()
    torch.manual_seed(1)
    wanted = get_length_grouped_indices(lengths, batch_size, pool)
    torch.manual_seed(1)
    sampler = LengthGrouped(lengths, batch_size, pool)
    assert list(sampler) == wanted
    assert len(sampler) == count
    assert sorted(wanted) == list(range(count))
    generator = torch.Generator().manual_seed(1)
    assert list(LengthGrouped(lengths, batch_size, pool, generator)) == wanted


def test_less_is_padded_and_epochs_differ():
    torch.manual_seed(0)
    lengths = torch.randint(1, 500, (400,))

    def padded(order):
        return sum(int(lengths[part].max()) * len(part) for part in torch.tensor(order).split(8))

    sampler = LengthGrouped(lengths, 8)
    one, two = list(sampler), list(sampler)
    assert one != two
    assert lengths[one[0]] == lengths.max()
    assert (
        padded(one)
        < 1.1 * int(lengths.sum())
        < 1.5 * int(lengths.sum())
        < padded(torch.randperm(400).tolist())
    )


def test_a_loop_goes_on_in_the_middle_of_an_epoch():
    lengths = torch.arange(40) % 7

    def loader():
        return DataLoader(range(40), batch_size=4, sampler=LengthGrouped(lengths, 4))

    torch.manual_seed(3)
    feed = Feed(loader())
    batches = feed.epoch(0)
    for _ in range(4):
        next(batches)
    position, rest = feed.position(), [batch.tolist() for batch, _ in batches]
    torch.manual_seed(99)
    again = Feed(loader())
    assert [batch.tolist() for batch, _ in again.epoch(0, position)] == rest


@pytest.mark.parametrize("settings", [([], 2), ([[1]], 2), ([1], 0), ([1], 1, 0)])
def test_settings_outside_their_range(settings):
    with pytest.raises(ValueError, match="needed"):
        LengthGrouped(*settings)
