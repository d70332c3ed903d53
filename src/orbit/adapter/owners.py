"""The small modules that own a task's tensors, and the container that holds them by task name.

    q_proj.lora_A.<task>.weight          (r, in)    Down
    q_proj.lora_B.<task>.weight          (out, r)   Up, which also carries the scale s
    q_proj.lora_magnitude.<task>.weight  (out,)     Magnitude, DoRA only
    q_proj.lora_gate.<task>.weight       ()         Gate, gated LoRA only
    q_proj.lora_bias.<task>.weight       (out,)     Bias, of a task that trains biases (`bias.py`)
    embed_tokens.lora_tokens.<task>.weight (n, dim) TokenRows, of a task that trains some rows (`tokens.py`)

A task that starts from the weight itself (`init.py`) keeps where it started, A₀ and B₀, as buffers beside A and B:

    q_proj.lora_A.<task>.start.weight    q_proj.lora_B.<task>.start.weight

Routes hand out these modules and never bare Parameters: `load_state_dict(assign=True)` and `fully_shard`
replace the Parameter of a module, and whoever kept the old one would go on training a dead copy.

A task may have any non-empty name. Module names may not contain a dot nor shadow an attribute ("train"), so
the container stores such names percent-escaped and shows them as they were given.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar
from urllib.parse import quote, unquote

import torch
from torch import Tensor, nn

from orbit.adapter.errors import TaskError
from orbit.core.tree import Attached


class Owner(nn.Module):
    """Holds one tensor of one task as `weight`."""

    weight: nn.Parameter

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Whether an absent tensor is missing is for the adapted layer to say, which sees the whole task.
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, [], unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        return "x".join(map(str, self.weight.shape))


class Beside(nn.Module, Attached):
    """A module that stands beside the base model and is part neither of it nor of a task: a router, say.

    No target reaches into it, the base's state dict leaves it out and freezing the base leaves it alone. A state
    dict without any of its tensors, such as the base's, leaves it as it is.
    """

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not any(key.startswith(prefix) for key in state_dict):
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Down(Owner):
    """A (r, in), the dropout probability of its input, and perhaps its start."""

    start: Down | None

    def __init__(self, weight: Tensor, dropout: float = 0.0) -> None:
        super().__init__(weight)
        self.dropout = dropout
        self.start = None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dropout={self.dropout}" if self.dropout else super().extra_repr()


class Up(Owner):
    """B (out, r), and the scale s = alpha/r or alpha/sqrt(r); of n experts (out, r·n), and the same scale.

    The scale is a 0-d tensor, so that a compiled graph takes it as an input instead of a constant. It keeps
    at least float32 whatever `model.to(dtype)` does to B: 11.3137 is not a bf16 number.
    """

    scale: Tensor
    start: Up | None

    def __init__(self, weight: Tensor, alpha: float, rslora: bool = False, experts: int = 1) -> None:
        super().__init__(weight)
        self.start = None
        self.alpha, self.rslora, self.experts = float(alpha), rslora, experts
        self.register_buffer("scale", self._exact_scale(), persistent=False)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, alpha={self.alpha:g}{', rslora' if self.rslora else ''}"

    @property
    def r(self) -> int:
        return self.weight.shape[1] // self.experts

    def _exact_scale(self) -> Tensor:
        value = self.alpha / (math.sqrt(self.r) if self.rslora else self.r)
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return torch.tensor(value, dtype=dtype, device=self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Up:
        super()._apply(fn, recurse)
        if not self.weight.is_meta:
            self.scale = self._exact_scale()
        return self


class Magnitude(Owner):
    """m (out,): the row norms that DoRA learns."""


class Gate(Owner):
    """g (), a learned factor of the layer's whole update."""


class Bias(Owner):
    """b_t (out,): what the task uses in the place of the layer's bias."""


class TokenRows(Owner):
    """Rows (n, dim) that the task uses in the place of the rows `indices` of a weight (num, dim)."""

    index: Tensor
    ascending: Tensor
    order: Tensor

    def __init__(self, weight: Tensor, indices: Sequence[int]) -> None:
        super().__init__(weight)
        self.indices = tuple(indices)
        self.register_buffer("index", torch.tensor(self.indices, device=weight.device), persistent=False)
        ascending, order = self.index.sort()
        self.register_buffer("ascending", ascending, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def find(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each index in `input` is one of these rows, and which (some row, if it is none)."""
        input = input.long()
        near = torch.searchsorted(self.ascending, input).clamp_max(self.ascending.shape[0] - 1)
        return self.ascending[near] == input, self.order[near]


class Slot(NamedTuple):
    """The owners that one layer uses for one task."""

    down: Down
    up: Up
    magnitude: Magnitude | None = None
    gate: Gate | None = None
    bias: Bias | None = None

    @property
    def coefficient(self) -> Tensor:
        """g·s of ΔW = g·s·B·A, a 0-d tensor."""
        return self.up.scale if self.gate is None else self.gate.weight * self.up.scale

    @property
    def start(self) -> Slot | None:
        """The slot of A₀ and B₀, under the same scale and gate, of ΔW = g·s·(B·A − B₀·A₀); None without them."""
        if self.down.start is None or self.up.start is None:
            return None
        return Slot(self.down.start, self.up.start, gate=self.gate)

    def start_here(self) -> None:
        """Make the present A and B the start, so that ΔW = 0 until they move."""
        self.down.start, self.up.start = _as_start(self.down), _as_start(self.up)


_O = TypeVar("_O", Down, Up)


def _as_start(owner: _O) -> _O:
    """A twin of an owner whose tensor is a buffer: saved and moved with the model, and never trained."""
    twin = copy.deepcopy(owner)
    weight = twin.weight.detach()
    del twin.weight
    twin.start = None
    twin.register_buffer("weight", weight)
    return twin


class ModuleSlot(NamedTuple):
    """A module that stands in for the whole layer under one task."""

    module: nn.Module


class BiasSlot(NamedTuple):
    """The bias of a layer of which the task changes nothing else."""

    bias: Bias


class TokenSlot(NamedTuple):
    """Some rows of the weight of a layer, and perhaps its bias, of which the task changes nothing else."""

    rows: TokenRows
    bias: Bias | None = None


class Whole(NamedTuple):
    """The owners that a module run as a whole uses for one task, by the name of the tensor that each changes."""

    slots: Mapping[str, Slot | BiasSlot]


AnySlot: TypeAlias = "Slot | ModuleSlot | BiasSlot | TokenSlot | Whole"

# The containers of those that are no low-rank update, in the order of their fields.
OTHERS: Mapping[type[tuple[Any, ...]], tuple[str, ...]] = {
    ModuleSlot: ("lora_module",),
    TokenSlot: ("lora_tokens", "lora_bias"),
    BiasSlot: ("lora_bias",),
}


class Tasks(nn.Module, Attached):
    """Owner modules by task name. Its storage names are escaped, its interface is not."""

    def get(self, task: str) -> Any:
        return self._modules.get(escape(task))

    def put(self, task: str, owner: nn.Module) -> None:
        self.add_module(escape(task), owner)

    def rename(self, old: str, new: str) -> None:
        """Call the owner of task `old` by the name `new`, in its place among the others."""
        key, other = escape(old), escape(new)
        self._modules = {other if k == key else k: owner for k, owner in self._modules.items()}

    def discard(self, task: str) -> None:
        self._modules.pop(escape(task), None)

    def __contains__(self, task: str) -> bool:
        return escape(task) in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter([unescape(key) for key in self._modules])

    def __len__(self) -> int:
        return len(self._modules)

    def __repr__(self) -> str:
        shown = nn.Module.__new__(Tasks)
        shown.__dict__.update(self.__dict__, _modules={unescape(k): m for k, m in self._modules.items()})
        return nn.Module.__repr__(shown)


def escape(task: str) -> str:
    """The module name under which a task is stored.

    >>> escape("math"), escape("a.b"), escape("train")
    ('math', 'a%2Eb', '%74rain')
    """
    check_task_name(task)
    key = quote(task, safe=" ").replace(".", "%2E")
    return f"%{ord(key[0]):02X}{key[1:]}" if hasattr(_EMPTY, key) else key


def unescape(key: str) -> str:
    """The task that is stored under a module name: `unescape(escape(task)) == task`."""
    return unquote(key)


def check_task_name(task: object) -> None:
    """Raise TaskError unless `task` is a non-empty string."""
    if not isinstance(task, str) or not task:
        raise TaskError(f"a task's name must be a non-empty string, got {task!r}")


_EMPTY = Tasks()
