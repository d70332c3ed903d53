"""A reply while it is made: tokens go in, pieces of text come out.

`generate` calls `put` with the prompt and then with every token, and asks `is_over` after each. A token may end in the
middle of a letter, so text comes out once it is whole letters: the tokens since the last piece are decoded together
with those of that piece, because decoders treat the first token of a text differently. White space at the reply's
beginning and end does not come out, so that the pieces are exactly the reply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from orbit.chat.stopping import StopStrings

_PART_OF_A_LETTER = "\ufffd"


class Reply:
    """A streamer for `generate`, of transformers or of `orbit.model`, one row at a time.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens=)`.
        stop: strings that end the reply.
        on_text: called with each piece.

    Attributes:
        text: the reply so far.
    """

    def __init__(
        self, tokenizer: Any, stop: Sequence[str] = (), on_text: Callable[[str], object] | None = None
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._stop = StopStrings(stop)
        self._ids: list[int] = []
        self._said = (0, 0)  # the tokens of the last piece
        self._space = ""  # that comes out if anything follows it
        self._prompted = False

    def put(self, ids: Tensor) -> None:
        """Take the prompt, at the first call, or new tokens."""
        if not self._prompted:
            self._prompted = True
            return
        for token in ids.flatten().tolist():
            self._ids.append(token)
            self._say(self._decoded(whole_letters=True))

    def end(self) -> None:
        """There are no more tokens."""
        self._say(self._decoded(whole_letters=False))
        self._say_stripped(self._stop.flush())

    def is_over(self, ids: Tensor, scores: Any = None, **_: Any) -> Tensor:
        """Has a stop string come? A stopping criterion of `generate`: one truth value per row."""
        return torch.full((ids.shape[0],), self._stop.found, dtype=torch.bool, device=ids.device)

    def _decoded(self, whole_letters: bool) -> str:
        """The text that has come since the last piece, or nothing while its last letter is not whole."""
        start, end = self._said
        before, now = self._text_of(self._ids[start:end]), self._text_of(self._ids[start:])
        if len(now) <= len(before) or (whole_letters and now.endswith(_PART_OF_A_LETTER)):
            return ""
        self._said = (end, len(self._ids))
        return now[len(before) :]

    def _text_of(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _say(self, text: str) -> None:
        if not self._stop.found:
            self._say_stripped(self._stop.feed(text))

    def _say_stripped(self, text: str) -> None:
        if not self.text:
            text = text.lstrip()
        text = self._space + text
        piece = text.rstrip()
        self._space = text[len(piece) :]
        if piece:
            self.text += piece
            if self._on_text is not None:
                self._on_text(piece)
