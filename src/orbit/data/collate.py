"""Batches of SFT samples: `SFTCollator` pads to the longest of the batch.

Padding is known by position, never by comparing ids with the padding token: in most chat models the padding
token is also the mark that ends a turn, which must stay supervised and attended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from orbit.data.sft import pad_token_id


@dataclass(frozen=True)
class SFTCollator:
    """Pad samples to one length; for a DataLoader's `collate_fn`.

    Args:
        tokenizer: its padding token (else EOS) fills `input_ids`.
        ignore_index: fills `labels`.
        padding_side: "right" for training; "left" for generation.
        pad_to_multiple_of: round the length up, for kernels that like it.

    >>> DataLoader(samples, batch_size=8, shuffle=True, collate_fn=SFTCollator(tokenizer))  # doctest: +SKIP
    """

    tokenizer: Any
    ignore_index: int = -100
    padding_side: Literal["left", "right"] = "right"
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r}: 'left' or 'right'")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} must be at least 1")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Stack samples of 1-D "input_ids", "labels" and, if they have it, "attention_mask".

        Returns:
            {"input_ids", "attention_mask", "labels"}, each (batch, length) int64.

        Raises:
            ValueError: no sample, a sample without ids or labels, with other keys, or of unequal lengths.
        """
        if not samples:
            raise ValueError("SFTCollator got an empty list of samples")
        rows = [self._row(i, sample) for i, sample in enumerate(samples)]
        longest = max(len(row["input_ids"]) for row in rows)
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        fill = {
            "input_ids": pad_token_id(self.tokenizer),
            "attention_mask": 0,
            "labels": self.ignore_index,
        }
        return {key: torch.stack([self._pad(row[key], length, fill[key]) for row in rows]) for key in fill}

    def _row(self, index: int, sample: Mapping[str, Any]) -> dict[str, Tensor]:
        known = {"input_ids", "attention_mask", "labels"}
        sample = {key: value for key, value in sample.items() if key != "index"}
        if not {"input_ids", "labels"} <= sample.keys() <= known:
            raise ValueError(
                f"sample {index} has keys {sorted(sample)}: SFTCollator takes 'input_ids', 'labels' and "
                "optionally 'attention_mask', as build_sft makes them; drop other columns first"
            )
        row = {key: torch.as_tensor(value, dtype=torch.int64) for key, value in sample.items()}
        row.setdefault("attention_mask", torch.ones_like(row["input_ids"]))
        lengths = {key: tuple(value.shape) for key, value in row.items()}
        if len(set(lengths.values())) != 1 or row["labels"].dim() != 1:
            raise ValueError(f"sample {index} must hold 1-D sequences of one length, got {lengths}")
        return row

    def _pad(self, values: Tensor, length: int, fill: int) -> Tensor:
        padding = values.new_full((length - len(values),), fill)
        return torch.cat([values, padding] if self.padding_side == "right" else [padding, values])
