"""The next token from its logits: likeliest, or drawn after temperature, top-k and top-p.

    z' = z/ρ if z > 0 else z·ρ    for tokens that were there already (repetition penalty ρ, Keskar et al. 2019)
    z' = z/τ                      (temperature)
    z' = −∞                       but for the k largest (top-k, Fan et al. 2018)
    z' = −∞                       but for the fewest that together have probability p (top-p, Holtzman et al. 2020)
    token ~ softmax(z')

In this order, which is transformers', so that both draw the same tokens from the same seed. B batch, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from orbit.model.errors import SettingError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Args:
        draw: draw it; else the likeliest.
        temperature, top_k, top_p: of the draw; None, and 0 for top_k, change nothing.
        repetition_penalty: above 1, tokens that were there become less likely; 1 is none.

    Raises:
        SettingError: a value outside its range, or one that would do nothing.
    """

    draw: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        given = [name for name in ("temperature", "top_k", "top_p") if getattr(self, name) is not None]
        if given and not self.draw:
            raise SettingError(
                f"{given[0]} changes nothing while no token is drawn: leave it out, or do_sample=True"
            )
        rules = (
            (
                "temperature",
                lambda v: v > 0 and math.isfinite(v),
                "above 0; do_sample=False takes the likeliest",
            ),
            ("top_k", lambda v: isinstance(v, int) and v >= 0, "a whole number from 0 up; 0 is all tokens"),
            ("top_p", lambda v: 0 < v <= 1, "above 0 and up to 1"),
            ("repetition_penalty", lambda v: v > 0 and math.isfinite(v), "above 0; 1 is none"),
        )
        for name, fits, rule in rules:
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise SettingError(f"{name} {value!r} must be {rule}")

    def choose(
        self, logits_BV: Tensor, ids_BS: Tensor, real_BS: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        """The next token of each row (B,).

        Args:
            logits_BV: of the next token.
            ids_BS: the text so far.
            real_BS: which of it is no padding; None is all.
            generator: to draw from; None is torch's own.
        """
        scores = logits_BV.float()
        if self.repetition_penalty != 1:
            scores = _penalised(scores, ids_BS, real_BS, self.repetition_penalty)
        if not self.draw:
            return scores.argmax(-1)
        if self.temperature is not None and self.temperature != 1:
            scores = scores / self.temperature
        if self.top_k:
            scores = _top_k(scores, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            scores = _top_p(scores, self.top_p)
        return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _penalised(scores_BV: Tensor, ids_BS: Tensor, real_BS: Tensor | None, penalty: float) -> Tensor:
    there = torch.zeros_like(scores_BV, dtype=torch.bool)
    if real_BS is None:
        there.scatter_(1, ids_BS, True)
    else:  # counted, since a padding token's id may stand for a real token too
        there = there.int().scatter_add_(1, ids_BS, real_BS.int()) > 0
    return torch.where(there, torch.where(scores_BV < 0, scores_BV * penalty, scores_BV / penalty), scores_BV)


def _top_k(scores_BV: Tensor, k: int) -> Tensor:
    least = scores_BV.topk(min(k, scores_BV.shape[-1]))[0][:, -1:]
    return scores_BV.masked_fill(scores_BV < least, -math.inf)


def _top_p(scores_BV: Tensor, p: float) -> Tensor:
    ascending, order = scores_BV.sort(-1)
    drop = ascending.softmax(-1).cumsum(-1) <= 1 - p  # the tail that is not needed to reach p
    drop[:, -1] = False
    return scores_BV.masked_fill(torch.zeros_like(drop).scatter_(1, order, drop), -math.inf)
