"""What blocks of convolutions are put together from: a norm and an activation by name, and checks of sizes.

    norm         statistics over                            modules
    "batch"      rows and positions, per channel            BatchNorm1d/2d/3d
    "group"      positions and channels of a group          GroupNorm, gcd(32, channels) groups [1]
    "instance"   positions, per row and channel             GroupNorm, as many groups as channels
    "layer"      channels, per row and position             ChannelLayerNorm, as in ConvNeXt
    None         nothing

What the names do not cover: a norm may be a function `norm(channels) -> module`; an activation, here as in `MLP`, any
function of a tensor, or a module, of which each place gets a copy.

[1] Wu & He 2018, https://arxiv.org/abs/1803.08494, where 32 groups were best
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from torch import Tensor, nn

from orbit.core.names import did_you_mean
from orbit.model.errors import SettingError, ShapeError

Norm: TypeAlias = str | Callable[[int], nn.Module] | None
Activation: TypeAlias = str | Callable[[Tensor], Tensor] | None
Size: TypeAlias = int | Sequence[int]

CONVS: dict[int, Callable[..., nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
AXES = ("T", "H, W", "D, H, W")


class ChannelLayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over dimension 1 instead of the last: every position of every row by itself.

    >>> import torch
    >>> ChannelLayerNorm(8)(torch.randn(2, 8, 5)).mean(dim=1).abs().max() < 1e-6
    tensor(True)
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


def make_norm(norm: Norm, channels: int, dim: int, **factory: Any) -> nn.Module:
    """The module of a norm; `factory` holds device and dtype."""
    if norm is None:
        return nn.Identity()
    if not isinstance(norm, str):
        return norm(channels)
    if norm == "batch":
        return BATCH_NORMS[dim](channels, **factory)
    if norm == "group":
        return nn.GroupNorm(math.gcd(32, channels), channels, **factory)
    if norm == "instance":
        return nn.GroupNorm(channels, channels, **factory)
    if norm == "layer":
        return ChannelLayerNorm(channels, **factory)
    raise SettingError(
        f"norm {norm!r} is none of batch, group, instance, layer, None or a function norm(channels) -> module"
        f"{did_you_mean(norm, ('batch', 'group', 'instance', 'layer'))}"
    )


def make_activation(activation: Activation) -> Callable[[Tensor], Tensor]:
    """What computes an activation."""
    if activation is None:
        return nn.Identity()
    if isinstance(activation, nn.Module):
        return copy.deepcopy(activation)
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return ACTIVATIONS[activation]()
    if isinstance(activation, (str, type)):
        raise SettingError(
            f"activation {activation!r} is none of {', '.join(ACTIVATIONS)}, None, a function of a tensor or a module"
            f"{did_you_mean(str(activation), ACTIVATIONS)}"
        )
    return activation


def check_dim(dim: int) -> None:
    if dim not in CONVS:
        raise SettingError(f"dim={dim!r}: a convolution runs over 1, 2 or 3 dimensions")


def check_channels(groups: int, **channels: int) -> None:
    """Every count of channels is positive and a multiple of `groups`."""
    for name, count in {**channels, "groups": groups}.items():
        if count < 1:
            raise SettingError(f"{name} {count} must be at least 1")
    for name, count in channels.items():
        if count % groups:
            below = count // groups * groups
            ways = f"{below} or {below + groups}" if below else str(groups)
            raise SettingError(f"{name} {count} is no multiple of groups {groups}: choose {ways}")


def each(name: str, size: Size, dim: int, least: int = 1) -> tuple[int, ...]:
    """One size per dimension, each at least `least`.

    >>> each("stride", 2, 3), each("kernel_size", (3, 1), 2)
    ((2, 2, 2), (3, 1))
    """
    sizes = (size,) * dim if isinstance(size, int) else tuple(size)
    if len(sizes) != dim or min(sizes) < least:
        many = f", or {dim} of them, one a dimension" if dim > 1 else ""
        raise SettingError(f"{name}={size!r} must be an int of at least {least}{many}")
    return sizes


def half(kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """The padding on both sides that keeps the size at stride 1, for odd kernels.

    >>> half((3, 5), (1, 2))
    (1, 4)
    """
    return tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))


def check_odd(kernel: Sequence[int], block: str) -> None:
    """`block` adds its input to its output, which only a kernel with a middle leaves of the same size."""
    if even := [k for k in kernel if k % 2 == 0]:
        raise SettingError(
            f"kernel_size {even[0]} is even, and {block} needs a middle: choose {even[0] - 1} or {even[0] + 1}"
        )


def check_input(x: Tensor, channels: int, dim: int, block: str) -> None:
    """(B, C, one size a dimension)."""
    if x.dim() != dim + 2 or x.shape[1] != channels:
        raise ShapeError(
            f"{block} takes a tensor of shape (B, {channels}, {AXES[dim - 1]}), not {tuple(x.shape)}"
        )


def make_dropout(dropout: float, kind: type[nn.Module] = nn.Dropout) -> nn.Module:
    """Dropout, or nothing where it would do nothing."""
    if not 0 <= dropout < 1:
        raise SettingError(f"dropout={dropout!r} is no probability: choose 0 <= dropout < 1")
    return kind(dropout) if dropout else nn.Identity()
