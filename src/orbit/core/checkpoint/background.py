"""Saving beside the training: the loop only waits until the state is copied.

    stage   in the loop: every storage of the state is copied once, into memory that is kept from save to save
            (pinned, and without waiting for each copy, where the state is on a GPU)
    write   in a thread: serialise, fsync, digest, rename

At most one save is under way; the next one waits for it. What goes wrong in the thread is raised in the loop by the
next call of `submit`, `check` or `wait`.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from orbit.core.checkpoint.plain import check_plain


class Staging:
    """CPU memory for copies of a state, used again by the next copy.

    A copy is valid until the next call of `copy`.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []  # bytes, in the order in which the storages come

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state with all tensors on the CPU in memory of this object; what shares memory there shares it here.

        Raises:
            CheckpointError: `state` holds something else than tensors and plain values.
        """
        check_plain(state)
        self._next, self._copies = 0, dict[tuple[int, torch.device], Tensor]()
        devices: set[torch.device] = set()
        staged = self._map(state, devices)
        del self._kept[self._next :]
        self._copies.clear()
        for device in devices:
            torch.accelerator.synchronize(device)
        return staged

    def _map(self, value: Any, devices: set[torch.device]) -> Any:
        if isinstance(value, Tensor):
            return self._tensor(value, devices)
        if isinstance(value, dict):
            items = {key: self._map(item, devices) for key, item in value.items()}
            return items if type(value) is dict else type(value)(items)
        if type(value) in (list, tuple):
            return type(value)(self._map(item, devices) for item in value)
        return value

    def _tensor(self, tensor: Tensor, devices: set[torch.device]) -> Tensor:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return tensor.detach().cpu().clone()  # it knows itself what it is made of
        storage = tensor.untyped_storage()
        place = (storage.data_ptr(), tensor.device)
        if place not in self._copies or not storage.nbytes():
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._copies[place] = self._buffer(source).copy_(source, non_blocking=tensor.is_cuda)
            if tensor.device.type != "cpu":
                devices.add(tensor.device)
        copied = torch.empty(0, dtype=tensor.dtype)
        return copied.set_(
            self._copies[place].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
        )

    def _buffer(self, source: Tensor) -> Tensor:
        """Kept memory of the size of `source`: storages come in the same order every time, and of the same sizes."""
        at, self._next = self._next, self._next + 1
        if at < len(self._kept) and self._kept[at].numel() == source.numel():
            return self._kept[at]
        fresh = torch.empty(source.numel(), dtype=torch.uint8, pin_memory=source.is_cuda)
        self._kept[at : at + 1] = [fresh]
        return fresh


class Background:
    """One thread's worth of work beside the loop."""

    def __init__(self) -> None:
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def submit(self, work: Callable[[], object]) -> None:
        """Begin `work()` in a thread, once what was under way is done. Raises what that raised."""
        self.wait()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # Not a daemon: the interpreter's end waits for it too.
        self._thread = Thread(target=run, name="orbit-checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raise what the work raised, if it is done; does not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Wait for the work under way. Raises what it raised, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
