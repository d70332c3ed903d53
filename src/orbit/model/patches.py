"""Images as patches, and back.

    image   (..., C, H, W)                  C channels; the rows and columns of an image are those of its patches' grid:
    patches (..., N, C, p, q)               N = (H/p)·(W/q), the grid's rows one after another
    vectors (..., N, C·p·q)                 what a linear layer takes; = patches.flatten(-3)

    patches[n, c, i, j] = image[c, p·⌊n / (W/q)⌋ + i, q·(n mod W/q) + j]

`patchify` and `unpatchify` go to vectors and back, for sizes that fit. `split_to_patches` takes any size: it pads with
zeros at the right and the bottom and says where, so that `reconstruct_from_patches` can cut that off again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from orbit.model.errors import SettingError, ShapeError

Pair = int | Sequence[int]


class PatchOutput(NamedTuple):
    """What `pad_to_patch_size` and `split_to_patches` give.

    Attributes:
        output: the padded image, (..., C, H', W'), or its patches, (..., N, C, p, q).
        mask: bool, of the same shape but one channel: True where the image is, False where it was padded.
        patch_size: (p, q).
        num_patches: (rows, columns) of the grid; their product is N.
    """

    output: Tensor
    mask: Tensor
    patch_size: tuple[int, int]
    num_patches: tuple[int, int]


def patchify(image: Tensor, patch_size: Pair) -> Tensor:
    """(..., C, H, W) to the vectors of its patches, (..., N, C·p·q).

    Raises:
        SettingError: `patch_size` is not one or two positive numbers.
        ShapeError: no image, or the size is no multiple of the patch's.

    >>> patchify(torch.arange(8).reshape(1, 2, 4), 2)
    tensor([[0, 1, 4, 5],
            [2, 3, 6, 7]])
    """
    p, q = _pair(patch_size)
    _check_image(image)
    height, width = image.shape[-2:]
    if height % p or width % q:
        raise ShapeError(
            f"an image of {height} × {width} has no whole number of patches of {p} × {q}: "
            f"pad it with pad_to_patch_size(image, ({p}, {q})).output"
        )
    return _split(image, p, q).flatten(-3)


def unpatchify(vectors: Tensor, patch_size: Pair, num_patches: Pair, channels: int) -> Tensor:
    """The inverse of `patchify`: (..., N, C·p·q) to (..., C, H, W).

    Args:
        num_patches: (rows, columns) of the grid; one number means as many of both.
        channels: C.

    Raises:
        SettingError: a size is not positive.
        ShapeError: there are other vectors than these sizes make.
    """
    p, q = _pair(patch_size)
    rows, columns = _pair(num_patches, "num_patches")
    wanted = (rows * columns, channels * p * q)
    if vectors.dim() < 2 or vectors.shape[-2:] != wanted:
        raise ShapeError(
            f"{rows} × {columns} patches of {channels} channels and {p} × {q} pixels are "
            f"(..., {wanted[0]}, {wanted[1]}), not {tuple(vectors.shape)}"
        )
    return _join(vectors.unflatten(-1, (channels, p, q)), rows, columns)


def pad_to_patch_size(image: Tensor, patch_size: Pair) -> PatchOutput:
    """(..., C, H, W) with zeros at the right and the bottom, up to the next multiple of the patch's size.

    Raises:
        SettingError: `patch_size` is not one or two positive numbers.
        ShapeError: no image.
    """
    p, q = _pair(patch_size)
    _check_image(image)
    height, width = image.shape[-2:]
    more = (0, -width % q, 0, -height % p)
    inside = image.new_ones((*image.shape[:-3], 1, height, width), dtype=torch.bool)
    grid = (-(-height // p), -(-width // q))
    return PatchOutput(pad(image, more), pad(inside, more), (p, q), grid)


def split_to_patches(image: Tensor, patch_size: Pair) -> PatchOutput:
    """(..., C, H, W) padded and cut into patches, (..., N, C, p, q).

    Raises:
        SettingError: `patch_size` is not one or two positive numbers.
        ShapeError: no image.

    >>> image = torch.randn(2, 3, 10, 7)
    >>> cut = split_to_patches(image, 4)
    >>> cut.output.shape, cut.num_patches
    (torch.Size([2, 6, 3, 4, 4]), (3, 2))
    >>> torch.equal(reconstruct_from_patches(cut.output, cut.num_patches, cut.mask), image)
    True
    """
    padded, mask, (p, q), grid = pad_to_patch_size(image, patch_size)
    return PatchOutput(_split(padded, p, q), _split(mask, p, q), (p, q), grid)


def reconstruct_from_patches(patches: Tensor, num_patches: Pair, mask: Tensor | None = None) -> Tensor:
    """The inverse of `split_to_patches`: (..., N, C, p, q) to (..., C, H, W).

    Args:
        num_patches: (rows, columns) of the grid; one number means as many of both.
        mask: of `split_to_patches`, to cut off what was padded.

    Raises:
        SettingError: a size is not positive.
        ShapeError: there are no rows·columns patches, or the mask is not of these.
    """
    rows, columns = _pair(num_patches, "num_patches")
    if patches.dim() < 4 or patches.shape[-4] != rows * columns:
        raise ShapeError(
            f"{rows} × {columns} patches are (..., {rows * columns}, C, p, q), not {tuple(patches.shape)}"
        )
    image = _join(patches, rows, columns)
    if mask is None:
        return image
    if mask.shape != (*patches.shape[:-3], 1, *patches.shape[-2:]):
        raise ShapeError(
            f"a mask of {tuple(mask.shape)} is not of patches of {tuple(patches.shape)}: it has one channel and else "
            "their shape"
        )
    inside = _join(mask, rows, columns).flatten(0, -3).bool().any(dim=0)
    height, width = int(inside.any(dim=1).sum()), int(inside.any(dim=0).sum())
    return image[..., :height, :width]


class PatchEmbedding(nn.Module):
    """A linear layer over the vectors of an image's patches, computed as a convolution.

    Args:
        in_channels: C.
        hidden_size: D, the width of a token.
        patch_size: p and q; one number means squares.
        bias: of the linear layer.

    Shapes: (B, C, H, W) to (B, N, D).

    Raises:
        SettingError: `patch_size` is not one or two positive numbers.
        ShapeError (in forward): no image of C channels, or the size is no multiple of the patch's.

    >>> embedding, image = PatchEmbedding(3, 16, patch_size=4), torch.randn(2, 3, 8, 12)
    >>> weight, bias = embedding.proj.weight.flatten(1), embedding.proj.bias
    >>> torch.allclose(embedding(image), patchify(image, 4) @ weight.T + bias, atol=1e-6)
    True
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch_size: Pair,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.patch_size = _pair(patch_size)
        self.proj = nn.Conv2d(
            in_channels, hidden_size, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype
        )

    def forward(self, image: Tensor) -> Tensor:
        p, q = self.patch_size
        channels = self.proj.in_channels
        if image.dim() != 4 or image.shape[1] != channels or image.shape[2] % p or image.shape[3] % q:
            raise ShapeError(
                f"PatchEmbedding takes (B, {channels}, a multiple of {p}, a multiple of {q}), not "
                f"{tuple(image.shape)}: pad_to_patch_size makes such"
            )
        return self.proj(image).flatten(2).transpose(1, 2)


def _split(image: Tensor, p: int, q: int) -> Tensor:
    grid = image.unflatten(-1, (-1, q)).unflatten(-3, (-1, p))  # ..., C, rows, p, columns, q
    return grid.movedim((-4, -2), (-5, -4)).flatten(-5, -4)


def _join(patches: Tensor, rows: int, columns: int) -> Tensor:
    grid = patches.unflatten(-4, (rows, columns))  # ..., rows, columns, C, p, q
    return grid.movedim((-5, -4), (-4, -2)).flatten(-2).flatten(-3, -2)


def _check_image(image: Tensor) -> None:
    if image.dim() < 3 or 0 in image.shape[-2:]:
        raise ShapeError(f"an image is (..., C, H, W) with pixels, not {tuple(image.shape)}")


def _pair(size: Pair, name: str = "patch_size") -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise SettingError(f"{name}={size!r} must be one or two numbers of at least 1")
    return pair[0], pair[1]
