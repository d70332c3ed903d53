"""Images with labels, as they are stored: bytes. What a model sees is made of them on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Statistics = tuple[Tensor, Tensor]


class ImageDataError(ValueError):
    """A file of images is damaged, or is not what its name says."""


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images of one size with a class each.

    Attributes:
        pixels: uint8, (N, C, H, W).
        labels: int64, (N,).
        classes: the names of the labels.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice | Tensor) -> LabelledImages:
        """Some of them: a slice, or indices, or a mask."""
        return LabelledImages(self.pixels[rows], self.labels[rows], self.classes)

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, pixels counted from 0 to 1: float32, (C,) both."""
        value = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack(
            [torch.bincount(channel.flatten(), minlength=256) for channel in self.pixels.unbind(1)]
        )
        share = counts.double() / counts.sum(dim=1, keepdim=True)
        mean = share @ value
        variance = (share * (value - mean[:, None]) ** 2).sum(dim=1)
        return mean.float(), variance.sqrt().float()

    def normalised(self, statistics: Statistics | None = None) -> Tensor:
        """The pixels less the mean, over the deviation: float32, (N, C, H, W).

        Args:
            statistics: mean and deviation as `statistics()` gives them; None means these images' own. Normalise a test
                set by the training set's.

        Raises:
            ValueError: a channel never varies.

        >>> pixels = torch.randint(256, (50, 3, 8, 8), dtype=torch.uint8)
        >>> images = LabelledImages(pixels, torch.zeros(50, dtype=torch.int64), ("noise",))
        >>> images.normalised().mean(dim=(0, 2, 3)).abs().max() < 1e-5
        tensor(True)
        """
        mean, deviation = self.statistics() if statistics is None else statistics
        if not (deviation > 0).all():
            raise ValueError(f"a channel never varies (deviations {deviation.tolist()}): leave it out")
        x = self.pixels.float().div_(255)
        return x.sub_(mean[:, None, None]).div_(deviation[:, None, None])


def labelled(
    pixels: Tensor, labels: Tensor, classes: tuple[str, ...], pixel_file: Path, label_file: Path
) -> LabelledImages:
    """The images of these files, if there is a known label for each."""
    if len(pixels) != len(labels):
        raise ImageDataError(
            f"{label_file} has {len(labels)} labels and {pixel_file} has {len(pixels)} images"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(classes):
        wrong = int(labels.max()) if int(labels.max()) >= len(classes) else int(labels.min())
        raise ImageDataError(f"{label_file}: label {wrong} is none of 0 ... {len(classes) - 1}")
    return LabelledImages(pixels, labels.long(), classes)
