"""One cache object for the two passes of a mixture.

Both passes are causal, and so is the classifier, which sees one token at a time: the scalings of a token depend on
nothing that comes after it. So the keys and values of either pass may be kept, and a new token costs one token in
each. `generate` and its users know one cache. The first forward that is given it, empty, makes it a pair, in
place: its class becomes a generated subclass, and it holds a companion for the scaling pass, to which is done
whatever is done to it (reordered for beams, cropped, repeated). The object stays the one that its maker holds, so
`past_key_values=cache` goes on with a conversation, and `isinstance` finds the class that it had.

A pair counts its companion's tokens: whoever fills it under a task, or without the mixture, is told by the next
forward of the mixture, whose scalings would be wrong.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from orbit.xlora.errors import CacheError

if TYPE_CHECKING:
    from transformers import Cache
else:
    Cache = object  # transformers is imported by whoever makes a cache


class TwinCache(Cache):
    """What a pair is besides its own class, which is the main pass's cache.

    Attributes:
        scaling: the cache of the scaling pass.
    """

    scaling: Any
    _twin_original: type

    def reset(self) -> None:
        super().reset()
        self.scaling.reset()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.scaling.reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.scaling.crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.scaling.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.scaling.batch_select_indices(indices)

    def activate_past_recording(self) -> None:
        super().activate_past_recording()
        self.scaling.activate_past_recording()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self._twin_original,), self.__dict__


def twin(cache: Any) -> TwinCache:
    """`cache` as a pair: itself if it is one, else made one in place.

    Raises:
        CacheError: it is no cache of transformers, or holds tokens that the scaling pass has not seen.
    """
    if isinstance(cache, TwinCache):
        if (seen := cache.scaling.get_seq_length()) != (length := cache.get_seq_length()):
            raise CacheError(
                f"past_key_values holds {int(length)} tokens and the scaling pass has seen {int(seen)} of them: it "
                "was filled under a task or without the mixture, or a forward failed; start from an empty cache"
            )
        return cache
    if not hasattr(cache, "get_seq_length") or hasattr(cache, "cross_attention_cache"):
        raise CacheError(
            f"past_key_values is a {type(cache).__name__}, and a mixture needs a Cache of transformers for a decoder, "
            "of which it makes two; pass use_cache=False to run without"
        )
    if length := int(cache.get_seq_length()):
        raise CacheError(
            f"past_key_values holds {length} tokens of another model or pass, whose scaling pass is unknown; start "
            "from an empty cache, or go on with the past_key_values that this model returned"
        )
    stream = getattr(cache, "prefetch_stream", None)  # of an offloaded cache; a device's stream has no copies
    companion = copy.deepcopy(cache, {} if stream is None else {id(stream): stream})
    cache.__class__ = _twin_class(type(cache))
    cache.scaling = companion
    return cache


def _twin_class(cls: type) -> type:
    """The class of pairs whose own class is `cls`."""
    if cls not in _CLASSES:
        _CLASSES[cls] = type(cls.__name__, (TwinCache, cls), {"_twin_original": cls, "__doc__": cls.__doc__})
    return _CLASSES[cls]


_CLASSES: dict[type, type] = {}


def _rebuild(cls: type) -> Any:
    new: Any = _twin_class(cls)
    return new.__new__(new)
