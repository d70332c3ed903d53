"""What training keeps in memory, in bytes.

    peak = P + B + O + x + max(A + 2a + [G], G + T)

P parameters, B buffers, O the optimizer's state, x the micro-batch, A what its forward keeps for its backward, a the
largest tensor of these (the backward holds the gradients of an operation's result and of its input at once), G
gradients (beside A only where a window has several micro-batches: the first ones' are there while the next is
computed), T what the optimizer's step needs for itself. While the backward runs A falls and G rises: the larger end
counts.

A is measured, not computed: autograd tells of every tensor that it saves (`saved_tensors_hooks`). Of a sharded model
everything is this rank's share.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

from orbit.core.nested import map_nested_tensor
from orbit.core.ranks.shards import local

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Memory:
    """The parts of the equation above in bytes, and what they were measured with.

    Attributes:
        backward, working: 2a and T.
        samples: rows of the micro-batch that `activations`, `backward` and `batch` are of.
        accumulates: windows have several micro-batches.
    """

    parameters: int
    buffers: int
    gradients: int
    optimizer: int
    activations: int
    backward: int
    batch: int
    working: int
    samples: int
    accumulates: bool

    @property
    def fixed(self) -> int:
        """What is there whatever the batch: P + B + O."""
        return self.parameters + self.buffers + self.optimizer

    @property
    def peak(self) -> int:
        held = self.gradients if self.accumulates else 0
        computing = self.activations + self.backward + held
        return self.fixed + self.batch + max(computing, self.gradients + self.working)


class Saved(saved_tensors_hooks):
    """Counts the bytes that autograd saves inside, each storage once, until the first backward begins.

    Nothing is changed or copied. Parameters and what is in `besides` (buffers, the batch) do not count: they are there
    anyway. Strided tensors only.

    >>> x = torch.ones(1000, requires_grad=True)
    >>> with Saved() as saved:
    ...     y = x.exp().sin()
    >>> saved.bytes  # exp keeps its result, which is also what sin keeps
    4000
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, self._unpack)
        self.sizes: list[int] = []  # of the storages, in the order they were saved
        self._seen = {_place(tensor) for tensor in besides if _counts(tensor)}
        self._over = False

    @property
    def bytes(self) -> int:
        return sum(self.sizes)

    def __enter__(self) -> Saved:  # type: ignore[override]
        super().__enter__()
        return self

    def add(self, tensor: Tensor) -> Tensor:
        """Count a tensor that is held besides what autograd saves."""
        if _counts(tensor) and not isinstance(tensor._base, nn.Parameter):
            place = _place(tensor)
            if place not in self._seen:
                self._seen.add(place)
                self.sizes.append(local(tensor).untyped_storage().nbytes())
        return tensor

    def _pack(self, tensor: Tensor) -> Tensor:
        return tensor if self._over else self.add(tensor)

    def _unpack(self, tensor: Tensor) -> Tensor:
        self._over = True  # what is saved from now on replaces what the backward frees
        return tensor


def _counts(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not isinstance(tensor, nn.Parameter)


def _place(tensor: Tensor) -> int:
    return local(tensor).untyped_storage().data_ptr()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of different tensors on this rank.

    >>> size_of([torch.zeros(3), torch.zeros(2, dtype=torch.int64)])
    28
    """
    own = {id(tensor): local(tensor) for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in own.values())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nested value."""
    found: list[Tensor] = []
    map_nested_tensor(lambda tensor: found.append(tensor), value)
    return found


def optimizer_size(optimizer: Optimizer) -> int | None:
    """Bytes of the optimizer's state; before its first step those that it will have, None if that cannot be told.

    To tell, a step is done with parameters that have shapes and no storage.

    >>> layer = nn.Linear(9, 1)
    >>> optimizer_size(torch.optim.AdamW(layer.parameters()))  # two moments of 10 floats, two steps
    88
    """
    if not optimizer.state:
        try:
            optimizer = _stepped_on_meta(optimizer)
        except Exception:  # whatever a third party's step cannot do without storage
            return None
    return size_of(tensors_in({str(i): dict(state) for i, state in enumerate(optimizer.state.values())}))


def _stepped_on_meta(optimizer: Optimizer) -> Optimizer:
    twin = copy(optimizer)
    twin.state = defaultdict(dict)
    twin.param_groups = []
    for group in optimizer.param_groups:
        parameters = []
        for p in group["params"]:
            shaped = nn.Parameter(torch.empty_like(local(p), device="meta"), requires_grad=p.requires_grad)
            shaped.grad = torch.empty_like(shaped) if p.requires_grad else None
            parameters.append(shaped)
        plain: dict[str, Any] = {name: False for name in ("foreach", "fused", "capturable") if name in group}
        twin.param_groups.append({**group, **plain, "params": parameters})
    twin.__dict__["_optimizer_step_pre_hooks"] = {}
    twin.__dict__["_optimizer_step_post_hooks"] = {}
    with torch.no_grad():
        type(twin).step(twin)
    return twin


def working_size(optimizer: Optimizer) -> int:
    """Bytes that a step needs for itself: a copy of all it updates where groups are updated at once (`foreach`, the
    default on CUDA), two of the largest parameter where they go one by one, nothing in a fused kernel."""
    together, largest = 0, 0
    for group in optimizer.param_groups:
        own = [p for p in group["params"] if p.requires_grad]
        if group.get("fused") or not own:
            continue
        if group.get("foreach") or (
            "foreach" in group and group["foreach"] is None and own[0].device.type == "cuda"
        ):
            together += size_of(own)
        else:
            largest = max(largest, *(2 * size_of([p]) for p in own))
    return together + largest


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may use on a device: on CUDA what is free and what it holds already, on the CPU the
    machine's or the container's memory.

    Raises:
        ValueError: there is no way to know here.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        raise ValueError(f"the memory of {device} is not known on this system: give limit= in bytes")
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, _CGROUP_LIMITS):
        text = path.read_text().strip() if path.exists() else ""
        limits += [int(text)] if text.isdigit() else []
    return min(limits)
