"""Biases that a task trains: `AdapterConfig(bias="lora_only")` or `"all"`.

    y = b_t + W·x + ΔW·x        b_t (out,): a copy of b for the task t, used in the place of b; DoRA: b_t + c∘(u − b)

PEFT trains the base's own biases instead, which changes the base under every other task, so that it allows one such
adapter in a model. Here the base's never move, and every task, and every row of a batch, has its own.

    "lora_only"   the biases of the adapted layers, among them those of which rows are trained (`tokens.py`)
    "all"         every parameter of the model that is called `bias`: of norms, heads, layers that are left out, …

As in PEFT, the projections' bias of an attention (`in_proj_bias`) is not among them, but that of its `out_proj` is.
An adapted layer keeps b_t with the task's other owners (`dense.py`, `linear.py`); another layer of a known kind has b_t
alone; any other module runs its own forward with b_t for `bias` (`whole.py`). A bias that several modules share, as
a head and the module around it may, is shared by the task too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from orbit.adapter.kinds.registry import refusal
from orbit.adapter.owners import AnySlot, Bias, BiasSlot, Slot, TokenSlot, Whole
from orbit.core.patterns import at_or_below
from orbit.core.tree import tree


def resolve_biases(model: nn.Module, taken: Sequence[str], skipped: dict[str, str]) -> dict[str, nn.Module]:
    """The modules whose bias a task can have of its own, by dotted name; of an `out_proj`, the attention.

    Args:
        taken: names of modules that the task replaces by modules of its own.
        skipped: where the reasons for what is left out go.
    """
    modules, parents = tree(model)
    found: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if module._parameters.get("bias") is None or at_or_below(path, taken):
            continue
        parent = parents[path]
        if isinstance(parent, nn.MultiheadAttention):
            path, module, parent = path.rpartition(".")[0], parent, parents[path.rpartition(".")[0]]
        why = refusal(module, parent, whole=True)
        if why is None:
            found[path] = module
        else:
            skipped[f"{path}.bias" if path else "bias"] = why
    return found


class SharedBiases:
    """Gives a task one owner for each bias, however many modules have it."""

    def __init__(self) -> None:
        self._owners: dict[int, Bias] = {}

    def of(self, layer: nn.Module, slot: AnySlot) -> AnySlot:
        """The slot with the owner that another module of the same bias has, if any."""
        if isinstance(slot, Whole):
            places = {name: self._home(layer, name) for name in slot.slots}
            return Whole({name: self.of(places[name], one) for name, one in slot.slots.items()})  # type: ignore[misc]
        if not isinstance(slot, (Slot, BiasSlot, TokenSlot)) or slot.bias is None:
            return slot
        owner = self._owners.setdefault(id(layer._parameters["bias"]), slot.bias)
        return slot._replace(bias=owner)

    def _home(self, layer: nn.Module, name: str) -> nn.Module:
        return layer.get_submodule(name.rpartition(".")[0])


def any_bias(slots: Iterable[AnySlot]) -> bool:
    """Does one of these hold a bias?"""
    return any(
        any_bias(slot.slots.values())
        if isinstance(slot, Whole)
        else isinstance(slot, (Slot, BiasSlot, TokenSlot)) and slot.bias is not None
        for slot in slots
    )
