"""Running text in chunks of one length: `PretrainingDataset`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from orbit.data.base import text
from orbit.data.package import leading
from orbit.data.rows import DataError, require_columns
from orbit.data.sources import read_rows
from orbit.data.template import encode


class PretrainingDataset(Dataset[dict[str, Tensor]]):
    """The rows' texts one after the other, each between BOS (if the tokenizer puts it there) and EOS, cut into chunks.

        BOS a a a EOS BOS b | b b b EOS BOS c c | c EOS

    Every token is in exactly one chunk and is supervised; the last chunk is shorter (one of a single token, which could
    predict nothing, is left out). Texts in one chunk see each other, as is usual in pretraining; for texts apart take
    `CompletionDataset(prefix_key=None)` with packing. All text is tokenised at once, here.

    Args:
        hf_args, tokenizer: as in `QADataset`.
        template_args: not read.
        text_key: the column.
        max_length: a chunk's length.

    Raises:
        DataError: no such column, a cell that holds no text, nothing to learn in all the rows.
        ValueError: `max_length` is below 2.
    """

    tokenised_once = True

    def __init__(
        self,
        hf_args: Mapping[str, Any],
        template_args: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        text_key: str = "text",
        max_length: int = 2048,
    ) -> None:
        if tokenizer is None:
            raise TypeError("PretrainingDataset needs a tokenizer")
        if max_length < 2:
            raise ValueError(
                f"max_length={max_length}: a chunk needs two tokens, one to see and one to predict"
            )
        rows = read_rows(**hf_args)
        require_columns(rows, text_key)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stream: list[int] = []
        for i, row in enumerate(rows):
            try:
                ids = encode(tokenizer, text(row, text_key))
            except DataError as error:
                raise DataError(f"{rows.where}, row {i}: {error}") from error
            stream += [*leading(tokenizer, ids), *ids, *eos]
        if len(stream) < 2:
            raise DataError(f"{rows.where} holds {len(stream)} tokens in {len(rows)} rows: nothing to learn")
        self.tokens = torch.tensor(stream, dtype=torch.int64)
        if len(stream) % max_length == 1:
            self.tokens = self.tokens[:-1]
        self.max_length = max_length

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.max_length)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        idx = range(len(self))[idx]
        ids = self.tokens[idx * self.max_length : (idx + 1) * self.max_length]
        return {
            "input_ids": ids.clone(),
            "attention_mask": torch.ones_like(ids),
            "labels": ids.clone(),
            "index": torch.tensor(idx),
        }
