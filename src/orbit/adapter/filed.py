"""What a layer's tasks are in a file: the tensors, by the ends of their keys, in the shapes that PEFT's files have.

`files/` puts the layers' places before these ends. A kind overrides what differs: the shape of a convolution's
magnitude, the way in which experts are stacked, the reason why PEFT could not read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from orbit.adapter.kinds.registry import own_class
from orbit.adapter.owners import AnySlot, BiasSlot, ModuleSlot, Slot, TokenSlot

_TOKENS = "token_adapter.trainable_tokens_delta"  # what PEFT calls token rows
_TOKENS_BIAS = "token_adapter.base_layer.bias"  # and the bias of their layer


class Filed(nn.Module):
    """The part of every kind that concerns files.

    Attributes:
        FILE_NAMES: what PEFT's files call a tensor, where that is not its name here.
    """

    FILE_NAMES: ClassVar[Mapping[str, str]] = {
        "lora_magnitude.weight": "lora_magnitude_vector",
        "lora_bias.weight": "base_layer.bias",
    }

    if TYPE_CHECKING:
        BANKS: ClassVar[tuple[str, ...]]

        def slots(self) -> dict[str, AnySlot]: ...

        def owners(self, task: str) -> dict[str, nn.Module]: ...

    def file_tensors(self, task: str) -> dict[str, Tensor]:
        """A task's tensors, as views in the shapes that PEFT's files have, by the ends of their keys there."""
        slot = self.slots()[task]
        if self.holds_copy(task):  # it has the base's names
            return dict(slot.module.state_dict(keep_vars=True))  # type: ignore[union-attr]
        if isinstance(slot, BiasSlot):
            return {"bias": slot.bias.weight}
        if isinstance(slot, TokenSlot):
            bias = {} if slot.bias is None else {_TOKENS_BIAS: slot.bias.weight}
            return {_TOKENS: slot.rows.weight, **bias}
        return {
            self.FILE_NAMES.get(f"{bank}.{name}", f"{bank}.{name}"): self.file_view(bank, tensor)
            for bank, owner in self.owners(task).items()
            for name, tensor in owner.state_dict(keep_vars=True).items()
        }

    def file_view(self, bank: str, tensor: Tensor) -> Tensor:
        """A tensor of this container in the shape that PEFT's files have."""
        return tensor

    def only_ours(self, task: str) -> bool:
        """Does the task hold tensors that PEFT would drop or misread?"""
        slot = self.slots()[task]
        if isinstance(slot, ModuleSlot):
            return not self.holds_copy(task)
        return isinstance(slot, Slot) and (slot.gate is not None or slot.start is not None)

    def not_for_peft(self, task: str) -> str | None:
        """Why `peft_tensors` would not mean to PEFT what the task computes, or None."""
        slot = self.slots()[task]
        if isinstance(slot, ModuleSlot) and not self.holds_copy(task):
            return f"it is a module of your own, a {type(slot.module).__name__}"
        return None

    def peft_tensors(self, task: str) -> dict[str, Tensor]:
        """`file_tensors` as PEFT can hold them: the gate folded into B, a start as extra ranks."""
        found = self.file_tensors(task)
        slot = self.slots()[task]
        if not isinstance(slot, Slot):
            return found
        ends = {bank: self.FILE_NAMES.get(f"{bank}.weight", f"{bank}.weight") for bank in self.BANKS}
        down, up, _, gate, _ = self.BANKS
        if slot.start is not None:
            found[ends[down]], found[ends[up]] = self.stacked(slot, slot.start)
        if slot.gate is not None:
            found[ends[up]] = found[ends[up]] * slot.gate.weight
        return {end: t for end, t in found.items() if ".start." not in end and not end.startswith(gate)}

    def stacked(self, slot: Slot, start: Slot) -> tuple[Tensor, Tensor]:
        """[A; A₀] and [B, −B₀] in the shapes of the owners' tensors."""
        A = torch.cat([slot.down.weight, start.down.weight], 0)
        return A, torch.cat([slot.up.weight, -start.up.weight], 1)

    def holds_copy(self, task: str) -> bool:
        """Is the task here a copy of the module, trained whole?"""
        slot = self.slots().get(task)
        return isinstance(slot, ModuleSlot) and type(slot.module) is own_class(self)
