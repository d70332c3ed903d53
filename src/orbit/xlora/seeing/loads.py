"""How a router shares a data set out among the experts.

    share    of tokens at which an expert has the largest scaling, by layer: an expert whose share is 0 sleeps
    mean     scaling of an expert, by layer
    entropy  of a token's scalings, its mean by layer in nats (`scalings.entropy`)

Every token counts once, also in long texts; padding does not count. A tie goes to the first expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orbit.xlora.errors import XLoRAError
from orbit.xlora.seeing.scalings import entropy, predict


@dataclass(frozen=True, eq=False)
class ExpertLoad:
    """The load of experts over a data set; `str()` is a table.

    Attributes:
        experts, layers: names.
        tokens: how many were counted.
        share: (layers, experts), every row sums to 1.
        mean: (layers, experts).
        entropy: (layers,) in nats; None of scalings below 0, which have none.
    """

    experts: tuple[str, ...]
    layers: tuple[str, ...]
    tokens: int
    share: Tensor
    mean: Tensor
    entropy: Tensor | None

    def __str__(self) -> str:
        wide = max(6, *map(len, self.experts))
        lines = [f"{'expert':<{wide}}  share of tokens  mean scaling"]
        for expert, share, mean in zip(
            self.experts, self.share.mean(0).tolist(), self.mean.mean(0).tolist(), strict=True
        ):
            lines.append(f"{expert:<{wide}}  {share:15.1%}  {mean:12.3f}")
        nats = "" if self.entropy is None else f", entropy {float(self.entropy.mean()):.3f} nats"
        lines.append(f"{self.tokens} tokens, {len(self.layers)} layers{nats}")
        return "\n".join(lines)


def expert_load(model: nn.Module, batches: Iterable[Tensor | Mapping[str, Any]]) -> ExpertLoad:
    """The load over batches of a mixture's inputs, by the scaling pass and the classifier alone, without dropout.

    Args:
        batches: input ids (batch, seq), or mappings with "input_ids" and, if there is padding, "attention_mask" (batch,
            seq); "labels" are passed over. Predictions are looked at before top-k and the global weight.

    Raises:
        XLoRAError: no mixture, a batch of another form, or not one token.
    """
    share = mean = nats = None
    tokens = 0
    for batch in batches:
        inputs = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
            has = sorted(inputs) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise XLoRAError(
                f"expert_load takes input ids, or mappings with 'input_ids', and was given {has}"
            )
        if inputs["input_ids"].dim() != 2:
            raise XLoRAError(
                f"expert_load takes batches of input ids (batch, seq), and was given {tuple(inputs['input_ids'].shape)}"
            )
        found = predict(model, {key: value for key, value in inputs.items() if key != "labels"})
        mask = inputs.get("attention_mask")
        real = torch.ones(found.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        counted = found[real.to(found.device)].double()  # (tokens, layers, experts)
        first = torch.zeros_like(counted).scatter_(-1, counted.argmax(-1, keepdim=True), 1.0)
        share = first.sum(0) if share is None else share + first.sum(0)
        mean = counted.sum(0) if mean is None else mean + counted.sum(0)
        if nats is None:
            nats = counted.new_zeros(counted.shape[1])
        nats = nats + (entropy(counted).sum(0) if not (counted < 0).any() else torch.nan)
        tokens += len(counted)
    if share is None or mean is None or nats is None or not tokens:
        raise XLoRAError("expert_load was given no token: the batches are empty, or padding alone")
    averages = [(total / tokens).float().cpu() for total in (share, mean, nats)]
    spread = None if bool(averages[2].isnan().any()) else averages[2]
    return ExpertLoad(
        model.xlora_experts,  # type: ignore[arg-type]
        tuple(model.xlora_layers()),  # type: ignore[operator]
        tokens,
        averages[0],
        averages[1],
        spread,
    )
