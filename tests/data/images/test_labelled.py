"""Statistics of bytes, and what is made of them for a model."""

from __future__ import annotations

import pytest
import torch

from orbit.data.images import LabelledImages


def images(count: int = 40) -> LabelledImages:
    pixels = torch.randint(256, (count, 3, 8, 7), dtype=torch.uint8)
    pixels[:, 1] //= 3
    return LabelledImages(pixels, torch.arange(count) % 2, ("no", "yes"))


def test_statistics_are_those_of_the_numbers() -> None:
    some = images()
    numbers = some.pixels.double() / 255
    mean, deviation = some.statistics()
    torch.testing.assert_close(mean, numbers.mean(dim=(0, 2, 3)).float())
    torch.testing.assert_close(deviation, numbers.std(dim=(0, 2, 3), correction=0).float())


def test_others_are_normalised_by_given_statistics() -> None:
    train, test = images(), images(10)
    mean, deviation = train.statistics()
    wanted = (test.pixels.double() / 255 - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(test.normalised((mean, deviation)), wanted.float(), atol=1e-5, rtol=1e-5)
    assert test.pixels.dtype is torch.uint8


def test_some_of_them() -> None:
    every = images()
    rows = torch.tensor([3, 0, 5])
    assert torch.equal(every[rows].pixels, every.pixels[rows])
    assert every[rows].labels.tolist() == [1, 0, 1]
    assert len(every[:7]) == 7
    assert len(every[every.labels == 1]) == 20


def test_a_channel_that_never_varies() -> None:
    some = images()
    some.pixels[:, 2] = 9
    with pytest.raises(ValueError, match="a channel never varies"):
        some.normalised()
