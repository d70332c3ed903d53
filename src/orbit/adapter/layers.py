"""Document 000's layers: a layer of torch that is adapted from the start, its own weights frozen.

>>> import torch
>>> layer = LinearLoRA(16, 32, r=4)
>>> isinstance(layer, torch.nn.Linear), [name for name, p in layer.named_parameters() if p.requires_grad]
(True, ['lora_A.default.weight', 'lora_B.default.weight'])

Each is torch's class with one task injected, and everything about tasks, routes, merging and files holds for it and
for models that are built of it. `inject` does the same to layers that are there already.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from orbit.adapter.config import AdapterConfig
from orbit.adapter.inject import inject


class LinearLoRA(nn.Linear):
    """`nn.Linear` with a low-rank task: (…, in_features) -> (…, out_features).

    Args:
        in_features, out_features, bias, options: as of `nn.Linear`.
        r, lora_alpha: rank and numerator of the scale lora_alpha/r of ΔW = s·B·A.
        lora_dropout: dropout before the branch.
        dora: learn a magnitude too. gated: learn one factor of ΔW. rslora: scale lora_alpha/√r.
        task: the task's name.

    Raises:
        ConfigError: a setting out of its range; a rank above min(in_features, out_features).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        dora: bool = False,
        gated: bool = False,
        bias: bool = True,
        *,
        rslora: bool = False,
        task: str = "default",
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, **options)
        inject(self, AdapterConfig(r, lora_alpha, lora_dropout, dora, rslora, gated), task)


class _ConvLoRA(nn.Module):
    """The constructor that the convolutions share."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        r: int = 8,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        dora: bool = False,
        gated: bool = False,
        *,
        rslora: bool = False,
        task: str = "default",
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        inject(self, AdapterConfig(r, lora_alpha, lora_dropout, dora, rslora, gated), task)


class Conv1dLoRA(_ConvLoRA, nn.Conv1d):
    """`nn.Conv1d` with a low-rank task, (N, in, L) -> (N, out, L'). Arguments: `LinearLoRA`, and nn.Conv1d's by name.

    Raises:
        ConfigError: a rank above min(out_channels, in_channels/groups·∏kernel_size).
    """


class Conv2dLoRA(_ConvLoRA, nn.Conv2d):
    """`nn.Conv2d` with a low-rank task, (N, in, H, W) -> (N, out, H', W'); see `Conv1dLoRA`."""


class EmbeddingLoRA(nn.Embedding):
    """`nn.Embedding` with a low-rank task: (…) -> (…, embedding_dim).

    Args and errors are those of `LinearLoRA`, without dropout: an index cannot be dropped. nn.Embedding's own by name.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        r: int = 8,
        lora_alpha: float = 16.0,
        dora: bool = False,
        gated: bool = False,
        *,
        rslora: bool = False,
        task: str = "default",
        **options: Any,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, **options)
        inject(self, AdapterConfig(r, lora_alpha, 0.0, dora, rslora, gated), task)
