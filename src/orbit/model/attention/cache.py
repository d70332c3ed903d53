"""Keys and values of one attention layer's past, so that a new token costs one row and not the whole sequence.

    seen      [·····················]        `length` tokens, all that were ever appended
    held               [····:·······]        what the storage holds: all of them, or under a window w what the
                        w−1 : newest         newest tokens see: the w−1 before them and themselves
    storage   (B, H, capacity, D)            grows by half, so n tokens cost O(n) copies

    B batch, H key/value heads, T new tokens, S held ones, D dimensions of a head.

Without autograd new rows are written in place. With it they are joined to a new tensor on every call (quadratic, but
every earlier result keeps the tensor that its backward needs).

A forward that activation checkpointing runs again would add its tokens twice, so a cache takes none in a backward pass
unless it was made in that pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from orbit.model.errors import CacheError
from orbit.model.replay import current_pass

__all__ = ["KVCache"]

_LEAST_ROOM = 64  # free rows in a new storage


class KVCache:
    """The past of one layer; `MultiHeadAttention.make_cache()` makes a fitting one.

    Args:
        max_length: storage is allocated once for so many tokens, and more are refused. Grows as needed if None.
        window: keep only what a sliding window of this size can see.

    >>> cache = KVCache()
    >>> keys, values = cache.append(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    >>> keys, values = cache.append(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))
    >>> keys.shape, cache.length
    (torch.Size([1, 2, 4, 8]), 4)

    Raises:
        CacheError: a length or window below 1.
    """

    def __init__(self, max_length: int | None = None, *, window: int | None = None) -> None:
        for name, value in (("max_length", max_length), ("window", window)):
            if value is not None and value < 1:
                raise CacheError(f"{name} {value} keeps nothing: choose 1 or more, or None for no limit")
        self.max_length, self.window = max_length, window
        self.reset()

    def reset(self) -> None:
        """Forget everything, storage too."""
        self.length = 0
        self._storage: tuple[Tensor, Tensor] | None = None
        self._writable = False  # the storage is ours alone, and no backward needs it
        self._start = self._end = 0  # the held rows of the storage
        self._pass = current_pass()

    def append(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add T new tokens; gives keys and values (B, H, S, D) of all that they may see, themselves last.

        The results are views of the storage: use them before the next call, or under autograd whenever you like.

        Raises:
            CacheError: other batch, heads, width, dtype or device than before, more tokens than `max_length`, or
                tokens of a recomputation. The cache stays as it was.
        """
        self.check_recomputation()
        self._check(k_BHTD, v_BHTD)
        start, end, new = self._start, self._end, k_BHTD.shape[2]
        if self.window is not None:
            start = max(start, end - (self.window - 1))
        grows = torch.is_grad_enabled()
        if grows or self._storage is None or not self._has_room(self._storage[0], end + new):
            room = 0 if grows else self._room(end - start, new)
            self._storage = (
                self._joined(0, k_BHTD, start, end, room),
                self._joined(1, v_BHTD, start, end, room),
            )
            self._writable = not grows
            start, end = 0, end - start
        else:
            for storage, new_BHTD in zip(self._storage, (k_BHTD, v_BHTD), strict=True):
                storage[:, :, end : end + new] = new_BHTD
        self._start, self._end = start, end + new
        self.length += new
        return self.held()

    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, D) that the storage holds.

        Raises:
            CacheError: nothing was appended yet.
        """
        if self._storage is None:
            raise CacheError("the cache is empty: append keys and values first")
        keys, values = self._storage
        return keys[:, :, self._start : self._end], values[:, :, self._start : self._end]

    def crop(self, length: int) -> None:
        """Forget the tokens after the first `length`, as after rejected guesses.

        Raises:
            CacheError: more than there are, or a window has dropped what the next token would see.
        """
        if not 0 <= length <= self.length:
            raise CacheError(f"cannot crop to {length}: the cache has seen {self.length} tokens")
        dropped = self.length - (self._end - self._start)
        needed = 0 if self.window is None else max(0, length - (self.window - 1))
        if dropped > needed:
            raise CacheError(
                f"cannot crop to {length}: the window of {self.window} has dropped the first {dropped} tokens, and the "
                f"next one would see from {needed} on; reset() and run again"
            )
        self._end -= self.length - length
        self.length = length

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order, repeats allowed (beam search): rows (B',) of integers."""
        if self._storage is not None:
            keys, values = self._storage
            self._storage = keys.index_select(0, rows), values.index_select(0, rows)
            self._writable = self._writable and not torch.is_grad_enabled()

    def __repr__(self) -> str:
        return f"KVCache(length={self.length}, max_length={self.max_length}, window={self.window})"

    def check_recomputation(self) -> None:
        """Refuse tokens of a forward that activation checkpointing runs a second time.

        Raises:
            CacheError: this is a backward pass, and the cache is older.
        """
        if current_pass() not in (-1, self._pass):
            raise CacheError(
                f"the cache already holds these tokens ({self.length} in all): activation checkpointing runs the layer "
                "again in the backward pass, which would add them twice. Run checkpointed layers without cache=, or "
                "make and fill the cache inside the checkpointed function"
            )

    def _check(self, k_BHTD: Tensor, v_BHTD: Tensor) -> None:
        if self.max_length is not None and self.length + k_BHTD.shape[2] > self.max_length:
            raise CacheError(
                f"{self.length} tokens and {k_BHTD.shape[2]} new ones exceed max_length {self.max_length}: "
                f"make a longer cache, or leave max_length out and let it grow"
            )
        keys, values = self._storage or (None, None)
        for name, new, old in (("keys", k_BHTD, keys), ("values", v_BHTD, values)):
            if new.dim() != 4 or new.shape[:3] != k_BHTD.shape[:3]:
                raise CacheError(
                    f"{name} of shape {tuple(new.shape)}: (B, H, T, D) is needed, equal for both"
                )
            if old is not None and (
                (new.shape[0], new.shape[1], new.shape[3]) != (old.shape[0], old.shape[1], old.shape[3])
                or (new.dtype, new.device) != (old.dtype, old.device)
            ):
                raise CacheError(
                    f"{name} {tuple(new.shape)} of {new.dtype} on {new.device} do not continue a cache that holds "
                    f"{tuple(old.shape)} of {old.dtype} on {old.device} (B, H, ·, D): every layer and batch has its own"
                )

    def _has_room(self, storage: Tensor, end: int) -> bool:
        """Whether rows up to `end` may be written in place: into what is ours, and no tensor of inference mode."""
        if not self._writable or end > storage.shape[2]:
            return False
        # The compiler knows no inference mode.
        return (
            torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not storage.is_inference()
        )

    def _room(self, held: int, new: int) -> int:
        """Free rows in a new storage."""
        if self.window is None and self.max_length is not None:
            return self.max_length - held - new
        return max(_LEAST_ROOM, (held + new) // 2)

    def _joined(self, which: int, new_BHTD: Tensor, start: int, end: int, room: int) -> Tensor:
        """A new storage: the held rows, the new ones, free ones."""
        batch, heads, _, width = new_BHTD.shape
        parts = [] if self._storage is None else [self._storage[which][:, :, start:end]]
        parts.append(new_BHTD)
        if room:
            parts.append(new_BHTD.new_empty(batch, heads, room, width))
        return torch.cat(parts, 2)
