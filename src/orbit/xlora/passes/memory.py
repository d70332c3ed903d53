"""The scaling pass of a text is run once, not once an epoch: `with remember(model):`.

With a scaling pass value of 0 and a frozen base that drops nothing at random, the last hidden state of a text is
the same in every epoch. It is kept for every row of a batch, on the CPU, under a digest of what the row holds, its
tokens, mask and positions, and of the mode (a hook may act in train mode only). A batch whose rows are all known
makes no scaling pass. A row that is padded to another length counts as another text; pad to one length (or to a few)
to find it again.

A row takes seq · hidden numbers: 1,000 texts of 512 tokens are 4 GiB for a hidden size of 4,096 in bf16.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orbit.adapter.owners import Tasks
from orbit.xlora.errors import XLoRAError
from orbit.xlora.passes.decoder import decoder_of
from orbit.xlora.passes.shared import droppers, drops

if TYPE_CHECKING:
    from orbit.xlora.model import xLoRAModel

_CONTENT = ("input_ids", "attention_mask", "position_ids")  # a pass on anything else is not kept


class Memory:
    """Last hidden states (seq, hidden) of rows, the least recently used dropped first.

    Attributes:
        max_bytes: how much is kept.
        n_bytes: how much there is.
        hits: forwards that needed no scaling pass.
        misses: forwards that ran one.
    """

    def __init__(self, model: xLoRAModel, max_bytes: int) -> None:
        self.max_bytes, self.n_bytes, self.hits, self.misses = max_bytes, 0, 0, 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._droppers = list(droppers(decoder_of(model)))
        self._base: list[tuple[weakref.ref[Tensor], Any]] = []

    def hidden(
        self, model: xLoRAModel, passed: Mapping[str, Any], scaling_pass: Callable[[], Tensor]
    ) -> Tensor:
        """The hidden states (batch, seq, hidden) for the arguments of a scaling pass, which is run if a row is new.

        Raises:
            XLoRAError: the pass is not the same every time.
        """
        self.check(model)
        base = _state_of_base(model)
        if len(base) != len(self._base) or any(
            ref is not old or state != before
            for (ref, state), (old, before) in zip(base, self._base, strict=True)
        ):
            self._rows.clear()
            self.n_bytes, self._base = 0, base
        keys = _keys(passed, model.training)
        found = [self._rows[key] for key in keys if key in self._rows]
        if keys and len(found) == len(keys):
            self.hits += 1
            for key in keys:
                self._rows.move_to_end(key)
            return torch.stack(found)
        self.misses += 1
        before = _random_state(base)
        hidden = scaling_pass()
        if any(not torch.equal(a, b) for a, b in zip(before, _random_state(base), strict=True)):
            raise XLoRAError(
                "the scaling pass draws random numbers (a hook that adds noise to the embeddings, say), and is not "
                "the same every time; take that away, or remember nothing"
            )
        self._keep(keys, hidden.detach())
        return hidden

    def _keep(self, keys: list[bytes], hidden: Tensor) -> None:
        for key, row in zip(keys, hidden if keys else (), strict=True):
            old = self._rows.pop(key, None)
            self.n_bytes += row.nbytes - (0 if old is None else old.nbytes)
            self._rows[key] = row.to("cpu", copy=True)
        while self.n_bytes > self.max_bytes:
            self.n_bytes -= self._rows.popitem(last=False)[1].nbytes

    def check(self, model: xLoRAModel) -> None:
        """XLoRAError unless the scaling pass of a text is the same every time."""
        value = model.xlora_config.scaling_pass_value
        if value:
            raise XLoRAError(
                f"the scaling pass has scaling_pass_value={value:g}, and the experts may change what it gives; "
                "remember it under model.set_scaling_pass_value(0) only"
            )
        trains = next((name for name, t in _base_tensors(model) if t.requires_grad), None)
        if trains is not None:
            raise XLoRAError(
                f"{trains} trains, and with it what the scaling pass gives; freeze the base, or remember nothing"
            )
        dropper = next((d for d in self._droppers if drops(*d)), None)
        if dropper is not None:
            module, name = dropper
            raise XLoRAError(
                f"the base drops at random: a {type(module).__name__} with {name}={getattr(module, name):g} is in "
                "train mode; set it to 0 or that module to eval(), or remember nothing"
            )


@contextmanager
def remember(model: xLoRAModel, max_bytes: int = 2**30) -> Iterator[Memory]:
    """`with xlora.remember(model): trainer.train()` runs the scaling pass of every text once, not once an epoch.

    It serves forwards without a cache, on `input_ids`, `attention_mask` and `position_ids` alone; others run as ever.
    A hit gives the bits that the first pass gave. All is forgotten where the base's weights are written to or moved
    (writing through `parameter.data` or by a fused optimizer leaves no mark and is not seen), and in the end.

    Args:
        max_bytes: what is kept at most, on the CPU.

    Raises:
        XLoRAError: the pass is not the same every time, because the base trains, draws random numbers, or the scaling
            pass value is not 0. Asked at every forward.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < 1:
        raise XLoRAError(f"remember(max_bytes={max_bytes!r}): it must be an integer ≥ 1")
    memory = Memory(model, max_bytes)
    memory.check(model)
    before = model.xlora_memory
    model.xlora_memory = memory
    try:
        yield memory
    finally:
        model.xlora_memory = before


def _base_tensors(model: xLoRAModel) -> Iterator[tuple[str, Tensor]]:
    """The parameters and buffers of the decoder that belong to no task, by name."""
    left: list[tuple[str, nn.Module]] = [("", decoder_of(model))]
    while left:
        path, module = left.pop()
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}{name}", tensor
        left.extend((f"{path}{n}.", c) for n, c in module.named_children() if not isinstance(c, Tasks))


def _state_of_base(model: xLoRAModel) -> list[tuple[weakref.ref[Tensor], Any]]:
    """What changes with the base's weights, and with the precision in which they are used."""
    tensors = [t for _, t in _base_tensors(model)]
    kind = tensors[0].device.type
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return [
        (weakref.ref(t), (None if t.is_inference() else t._version, t.dtype, t.device, autocast))
        for t in tensors
    ]


def _random_state(base: list[tuple[weakref.ref[Tensor], Any]]) -> list[Tensor]:
    """The state of the random numbers of the CPU and of the CUDA devices on which the base lies."""
    devices = {t.device for ref, _ in base if (t := ref()) is not None and t.is_cuda}
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in sorted(devices, key=str))]


def _keys(passed: Mapping[str, Any], training: bool) -> list[bytes]:
    """A digest of the mode and every row of a scaling pass's arguments; none if there are others than of content."""
    content = {name: value for name, value in passed.items() if value is not None}
    tokens = content.get("input_ids")
    if tokens is None or not all(
        name in _CONTENT and isinstance(t, Tensor) and len(t) in (1, len(tokens))
        for name, t in content.items()
    ):
        return []
    if "position_ids" in content and content["position_ids"].dim() != 2:  # of images: (3, batch, seq)
        return []
    digests = [hashlib.sha256(b"train" if training else b"eval") for _ in tokens]
    for name in _CONTENT:
        if name not in content:
            continue
        rows = content[name].detach().cpu()
        rows = rows if len(rows) == len(tokens) else rows.expand(len(tokens), *rows.shape[1:])
        for digest, row in zip(digests, rows, strict=True):
            digest.update(f"{name} {row.dtype} {tuple(row.shape)} ".encode())
            digest.update(row.contiguous().view(torch.uint8).numpy().tobytes())
    return [digest.digest() for digest in digests]
