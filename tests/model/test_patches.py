"""Patches of images: where each pixel goes, and that it comes back."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from orbit import utils
from orbit.model import (
    PatchEmbedding,
    pad_to_patch_size,
    patchify,
    reconstruct_from_patches,
    split_to_patches,
    unpatchify,
)
from orbit.model.errors import SettingError, ShapeError

SIZES = [(2, (4, 6)), ((3, 2), (6, 8)), ((1, 5), (4, 10)), ((4, 6), (4, 6))]


@pytest.mark.parametrize(("patch", "size"), SIZES)
@pytest.mark.parametrize("rows", [(), (2,), (2, 3)])
def test_pixels_go_where_the_equation_says(patch, size, rows) -> None:
    p, q = (patch, patch) if isinstance(patch, int) else patch
    height, width = size
    image = torch.randn(*rows, 3, height, width)
    vectors = patchify(image, patch)
    grid = (height // p, width // q)
    assert vectors.shape == (*rows, grid[0] * grid[1], 3 * p * q)
    patches = vectors.unflatten(-1, (3, p, q))
    for n in range(grid[0] * grid[1]):
        top, left = p * (n // grid[1]), q * (n % grid[1])
        assert torch.equal(patches[..., n, :, :, :], image[..., top : top + p, left : left + q])
    assert torch.equal(unpatchify(vectors, patch, grid, channels=3), image)


@pytest.mark.parametrize(("patch", "size"), SIZES)
def test_vectors_are_unfold_s(patch, size) -> None:
    image = torch.randn(2, 3, *size)
    assert torch.equal(patchify(image, patch), F.unfold(image, patch, stride=patch).transpose(1, 2))


@pytest.mark.parametrize("size", [(4, 6), (5, 6), (4, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("rows", [(), (2,), (2, 3)])
def test_any_size_is_padded_and_comes_back(size, rows) -> None:
    image = torch.rand(*rows, 3, *size) + 1
    padded = pad_to_patch_size(image, (2, 3))
    height, width = padded.output.shape[-2:]
    assert (height % 2, width % 3) == (0, 0)
    assert height - size[0] < 2
    assert width - size[1] < 3
    assert padded.num_patches == (height // 2, width // 3)
    assert torch.equal(padded.mask.expand_as(padded.output), padded.output > 0)
    assert padded.mask.dtype is torch.bool

    cut = split_to_patches(image, (2, 3))
    assert torch.equal(cut.output.flatten(-3), patchify(padded.output, (2, 3)))
    assert torch.equal(cut.mask.flatten(-3), patchify(padded.mask, (2, 3)))
    assert torch.equal(reconstruct_from_patches(cut.output, cut.num_patches), padded.output)
    assert torch.equal(reconstruct_from_patches(cut.output, cut.num_patches, cut.mask), image)


def test_gradients_come_back_too() -> None:
    image = torch.randn(2, 3, 5, 7, requires_grad=True)
    cut = split_to_patches(image, 3)
    weight = torch.randn(2, 3, 5, 7)
    (reconstruct_from_patches(cut.output, cut.num_patches, cut.mask) * weight).sum().backward()
    assert torch.equal(image.grad, weight)


def test_an_embedding_is_linear_in_the_vectors() -> None:
    embedding, image = PatchEmbedding(3, 7, (2, 3)), torch.randn(2, 3, 4, 9)
    wanted = F.linear(patchify(image, (2, 3)), embedding.proj.weight.flatten(1), embedding.proj.bias)
    torch.testing.assert_close(embedding(image), wanted)
    assert PatchEmbedding(3, 7, 2, bias=False).proj.bias is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: patchify(torch.randn(1, 3, 5, 8), 4),
            r"5 × 8 has no whole .* pad_to_patch_size\(image, \(4, 4\)",
        ),
        (lambda: patchify(torch.randn(8, 8), 4), r"an image is \(..., C, H, W\) with pixels, not \(8, 8\)"),
        (lambda: split_to_patches(torch.randn(1, 3, 0, 8), 4), r"with pixels, not \(1, 3, 0, 8\)"),
        (lambda: unpatchify(torch.randn(2, 6, 12), 2, (2, 2), 3), r"are \(..., 4, 12\), not \(2, 6, 12\)"),
        (lambda: unpatchify(torch.randn(2, 4, 12), 2, 2, 1), r"are \(..., 4, 4\), not \(2, 4, 12\)"),
        (
            lambda: reconstruct_from_patches(torch.randn(5, 3, 2, 2), (2, 2)),
            r"\(..., 4, C, p, q\), not \(5, ",
        ),
        (
            lambda: reconstruct_from_patches(torch.randn(4, 3, 2, 2), 2, torch.ones(4, 3, 2, 2)),
            r"a mask of \(4, 3, 2, 2\) is not of patches",
        ),
        (lambda: PatchEmbedding(3, 8, 4)(torch.randn(1, 3, 8, 9)), r"a multiple of 4\), not \(1, 3, 8, 9\)"),
        (lambda: PatchEmbedding(3, 8, 4)(torch.randn(1, 1, 8, 8)), r"takes \(B, 3, a multiple of 4"),
    ],
)
def test_inputs_that_do_not_fit(call, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        call()


@pytest.mark.parametrize("patch", [0, (2, 0), (2, 2, 2), -1])
def test_sizes_that_no_patch_has(patch) -> None:
    for call in (patchify, split_to_patches, pad_to_patch_size):
        with pytest.raises(SettingError, match="patch_size=.* must be one or two numbers of at least 1"):
            call(torch.randn(1, 3, 8, 8), patch)
    with pytest.raises(SettingError, match="patch_size="):
        PatchEmbedding(3, 8, patch)


def test_the_helpers_stand_under_utils() -> None:
    image = torch.randn(1, 3, 6, 6)
    cut = utils.split_to_patches(image, 4)
    assert torch.equal(utils.reconstruct_from_patches(cut.output, cut.num_patches, cut.mask), image)
    assert torch.equal(
        utils.patchify(utils.pad_to_patch_size(image, 4).output, 4),
        utils.split_to_patches(image, 4).output.flatten(2),
    )
    assert torch.equal(utils.unpatchify(utils.patchify(image, 2), 2, 3, 3), image)
