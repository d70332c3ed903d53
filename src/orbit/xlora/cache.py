"""One cache object for the two passes of a mixture.

Both passes are causal, and so is the classifier, which sees one token at a time: the scalings of a token depend on
nothing that comes after it. So the keys and values of either pass may be kept, and a new token costs one
token in each. `generate` knows one cache. It makes an empty one and hands it to the first forward, which pairs it
with a companion for the scaling pass; from then on `generate` carries the pair, and reorders, crops and repeats both.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from orbit.xlora.errors import CacheError


class TwinCache:
    """The caches of the main pass, `main`, and of the scaling pass, `scaling`, which always have the same length.

    It answers questions as `main` does, and does to both whatever is done to it. It is no subclass of transformers'
    Cache, which would have to be imported for it: no model sees it, each pass is given its own of the two.
    """

    def __init__(self, main: Any, scaling: Any) -> None:
        self.main, self.scaling = main, scaling

    @classmethod
    def of(cls, cache: Any) -> TwinCache:
        """The pair of a cache: itself if it is one, else an empty cache and its copy.

        Raises:
            CacheError: the cache is neither.
        """
        if isinstance(cache, cls):
            return cache
        if not hasattr(cache, "get_seq_length"):
            raise CacheError(
                f"past_key_values is a {type(cache).__name__}, and a mixture needs a transformers Cache, of "
                "which it makes two; pass use_cache=False to run without"
            )
        length = int(cache.get_seq_length())
        if length:
            raise CacheError(
                f"past_key_values holds {length} tokens of another model or pass, whose scaling pass is unknown; start "
                "from an empty cache, or go on with the past_key_values that this model returned"
            )
        return cls(cache, copy.deepcopy(cache))

    def __getattr__(self, name: str) -> Any:
        if name == "main":  # a copy that is being made has nothing yet
            raise AttributeError(name)
        return getattr(self.main, name)

    def __len__(self) -> int:
        return len(self.main)

    def __repr__(self) -> str:
        return f"TwinCache({self.main!r})"

    def reset(self) -> None:
        self.main.reset()
        self.scaling.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.main.reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        self.main.crop(tokens_to_remove)
        self.scaling.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.main.batch_repeat_interleave(repeats)
        self.scaling.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.main.batch_select_indices(indices)
        self.scaling.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        self.main.activate_past_recording()
        self.scaling.activate_past_recording()

    @property
    def is_compileable(self) -> bool:
        """False: `generate` would compile the forward as one graph, and the two passes switch routes between them."""
        return False
