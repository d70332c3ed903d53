"""The cache of a scaling pass that is not run for every token, under an approximation (`approximating.py`).

Tokens that reuse an older token's scalings wait. When the pass runs again it is given those that wait and the new
ones together, so that its keys and values are those of the exact pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from orbit.xlora.errors import CacheError


class Lagging:
    """A scaling pass's cache, the tokens that it has yet to see, and the predictions that were used so far.

    Attributes:
        cache: of the scaling pass.
        settings: of the approximation that fills it.
        waiting: those arguments of a forward that have a value per token, (batch, n, …), for the n tokens that wait.
        used: the predictions, (batch, tokens, layers or 1, experts), or None before any; a cropped text goes on with
            that of its last token.
    """

    def __init__(self, cache: Any, settings: tuple[int | None, ...]) -> None:
        self.cache, self.settings = cache, settings
        self.waiting: dict[str, Tensor] = {}
        self.used: Tensor | None = None

    def get_seq_length(self) -> int:
        return int(self.cache.get_seq_length()) + self.n_waiting

    @property
    def n_waiting(self) -> int:
        """How many tokens wait."""
        return next((values.shape[1] for values in self.waiting.values()), 0)

    def add(self, tokens: Mapping[str, Tensor], used: Tensor, *, seen: bool) -> None:
        """These tokens used these predictions; the scaling pass has `seen` them and all before, or they wait."""
        self.used = used if self.used is None else torch.cat([self.used, used], 1)
        self.waiting = {} if seen else self.with_waiting(tokens)

    def with_waiting(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tokens that wait and these.

        Raises:
            CacheError: they were given otherwise, as embeddings or without positions.
        """
        if not self.waiting:
            return dict(tokens)
        if set(self.waiting) != set(tokens):
            raise CacheError(
                f"the tokens before were given by {sorted(self.waiting)} and these by {sorted(tokens)}; under "
                "xlora.approximate give all of a text alike"
            )
        return {name: torch.cat([self.waiting[name], values], 1) for name, values in tokens.items()}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.waiting = {name: change(values) for name, values in self.waiting.items()}
        self.used = None if self.used is None else change(self.used)

    def reset(self) -> None:
        self.cache.reset()
        self.waiting, self.used = {}, None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.cache.reorder_cache(beam_idx)
        self._map(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        waiting = self.n_waiting
        self.cache.crop(-max(0, removed - waiting))
        kept = max(0, waiting - removed)
        self.waiting = {name: t[:, :kept] for name, t in self.waiting.items()} if kept else {}
        left = 0 if self.used is None else self.used.shape[1] - removed
        self.used = self.used[:, :left] if self.used is not None and left > 0 else None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.cache.batch_repeat_interleave(repeats)
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.cache.batch_select_indices(indices)
        self._map(lambda t: t[indices.to(t.device)])

    def activate_past_recording(self) -> None:
        self.cache.activate_past_recording()
