"""What a forward changes by itself, as it was before: the running statistics of batch norm, and their like.

A window that is dropped must leave no trace, but its forwards have already moved the buffers: one NaN in a batch makes
a running mean NaN for good, and every later evaluation and checkpoint with it. So floating buffers (and single numbers,
the counts that go with them) are kept as they were when the window began, and put back if it is dropped.

Only those are copied that move: whose values the first window changed, or whose version counter says so later, with
the others of their module. (torch's batch norm writes its running mean without counting a version.)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Buffers:
    """The buffers of `model` that forwards may change.

    Masks and packed weights (integers of some size) are left out.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places = [
            (module._buffers, name)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and (buffer.is_floating_point() or buffer.ndim == 0)
        ]
        self._kept: list[Tensor] = []
        self._seen: list[tuple[Tensor, int]] = []  # each when it was kept, and its version then
        self._moving: set[int] | None = None  # None until a whole window has been seen
        self._dropped = False

    @torch.no_grad()
    def keep(self) -> None:
        """Remember how they are now."""
        if not self._places:
            return
        now = self._now()
        if not self._seen or self._reshaped(now):
            self._kept, self._moving = [buffer.clone() for buffer in now], None
        else:
            if self._moving is not None:
                self._moving = self._touched(now)
            elif not self._dropped:
                pairs = zip(self._kept, now, strict=True)
                self._moving = self._of_modules({i for i, pair in enumerate(pairs) if not torch.equal(*pair)})
            chosen = range(len(now)) if self._moving is None else sorted(self._moving)
            if chosen:
                torch._foreach_copy_([self._kept[i] for i in chosen], [now[i] for i in chosen])
        self._dropped, self._seen = False, [(buffer, buffer._version) for buffer in now]

    @contextmanager
    def put_back_after(self) -> Iterator[None]:
        """What runs inside leaves them as they were; it moves those that the window has moved."""
        before = self._now()
        moving = range(len(before)) if self._moving is None or not self._seen else self._touched(before)
        kept = [(i, before[i].clone()) for i in moving]
        try:
            yield
        finally:
            now = self._now()
            with torch.no_grad():
                for i, value in kept:
                    self._set(i, now[i], value)

    @torch.no_grad()
    def put_back(self) -> None:
        """Make them what they were at the last `keep()`, if there was one."""
        if not self._seen:
            return
        now = self._now()
        for i in range(len(now)) if self._moving is None else self._touched(now):
            self._set(i, now[i], self._kept[i])
        self._dropped = True

    def _set(self, i: int, now: Tensor, value: Tensor) -> None:
        if now.shape == value.shape:
            now.copy_(value)
        else:  # another tensor has taken its place
            place, name = self._places[i]
            place[name] = value.clone()

    def _now(self) -> list[Tensor]:
        nothing = torch.empty(0)
        return [nothing if place[name] is None else place[name] for place, name in self._places]  # type: ignore[misc]

    def _reshaped(self, now: list[Tensor]) -> bool:
        """Another tensor has taken the place of one, and has another shape."""
        pairs = zip(now, self._seen, self._kept, strict=True)
        return any(new is not old and new.shape != kept.shape for new, (old, _), kept in pairs)

    def _touched(self, now: list[Tensor]) -> set[int]:
        """Those that are known to move, and those that have by their versions."""
        assert self._moving is not None
        if len(self._moving) == len(self._places):
            return self._moving
        pairs = enumerate(zip(now, self._seen, strict=True))
        return self._moving | self._of_modules(
            {i for i, (new, (old, version)) in pairs if new is not old or new._version != version}
        )

    def _of_modules(self, some: set[int]) -> set[int]:
        """With the other buffers of their modules."""
        modules = {id(self._places[i][0]) for i in some}
        return {i for i, (place, _) in enumerate(self._places) if id(place) in modules} if some else some
