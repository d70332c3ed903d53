"""Questions that the model is to stop answering: `QAwithIdk`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from orbit.data.base import Item, text
from orbit.data.draws import hashed
from orbit.data.fingerprint import fingerprint, saw
from orbit.data.qa import QADataset
from orbit.data.rows import DataError, Row


class QAwithIdk(QADataset):
    """A question with its answer and with an "I don't know": {"original": sample, "alternate": sample}.

    Which of the sentences a row gets follows from the seed and its number: workers, epochs and resumed runs agree.

    Args:
        hf_args, template_args, tokenizer, ...: as in `QADataset`.
        idk_path: a text file with a sentence a line; null: twenty that Orbit brings.
        return_original: False: the items are the alternate samples alone.
        seed: of the choice.

    Raises:
        DataError: also if the file cannot be read or holds no sentence.
        TemplateArgsError: as `TextDataset`.
    """

    tokenised_once = True

    def __init__(
        self,
        hf_args: Mapping[str, Any],
        template_args: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        question_key: str = "question",
        answer_key: str = "answer",
        max_length: int = 512,
        predict_with_generate: bool = False,
        few_shot_dataset_hf_args: Mapping[str, Any] | None = None,
        idk_path: str | None = None,
        return_original: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(
            hf_args,
            template_args,
            tokenizer,
            question_key,
            answer_key,
            max_length,
            predict_with_generate,
            few_shot_dataset_hf_args,
        )
        self.refusals, self.return_original, self.seed = read_refusals(idk_path), return_original, seed

    def encode(self, row: Row, idx: int) -> Item:
        refusal = self.refusals[hashed(self.seed, idx) % len(self.refusals)]
        alternate = self.answered(text(row, self.question_key), refusal)
        if not self.return_original:
            return alternate
        return {"original": super().encode(row, idx), "alternate": alternate}


def read_refusals(path: str | None = None) -> list[str]:
    """The sentences of a text file, or Orbit's own. DataError: unreadable, or none.

    >>> read_refusals()[0]
    "I don't know."
    """
    try:
        source = files("orbit.data").joinpath("refusals.txt") if path is None else Path(path)
        lines = [line.strip() for line in source.read_text("utf-8").splitlines()]
        saw(fingerprint(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"idk_path {path} cannot be read: {error}") from error
    if not any(lines):
        raise DataError(f"idk_path {path} holds no sentence")
    return [line for line in lines if line]
