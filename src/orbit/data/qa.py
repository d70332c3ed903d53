"""Questions and answers: `QADataset` (document 002)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from orbit.data.sft import build_sft
from orbit.data.sources import read_rows, require_columns


class QADataset(Dataset[dict[str, Tensor]]):
    """One sample a question and answer; the answer and the mark that ends it are supervised.

    Args:
        hf_args: where the rows are (`read_rows`).
        template_args: how prompt and answer become text; the model's config has them.
        tokenizer: the model's.
        question_key, answer_key: the columns.
        max_length: longer samples lose their end.
    """

    def __init__(
        self,
        hf_args: Mapping[str, Any],
        template_args: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        question_key: str = "question",
        answer_key: str = "answer",
        max_length: int = 512,
    ) -> None:
        self.rows = read_rows(**hf_args)
        require_columns(self.rows, question_key, answer_key, where=str(hf_args.get("path", "rows")))
        self.tokenizer, self.max_length = tokenizer, max_length
        self.question_key, self.answer_key = question_key, answer_key

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        row = self.rows[idx]
        return build_sft(
            row[self.question_key], row[self.answer_key], self.tokenizer, max_length=self.max_length
        )
