"""Rotary frequencies for contexts longer than the trained one, in the vocabulary of a model's config.json.

A pair of dimensions 2i turns by fᵢ = base^(−2i/d) per position. With a scaling factor s and the trained length L:

    linear    fᵢ/s: positions are pressed together                                                     [1]
    ntk       base' = base·s^(d/(d−2)): the slowest pair is interpolated by s, the fastest not at all   [2]
    dynamic   the same with s' = s·n/L − (s − 1) for the n > L positions at hand, 1 up to L             [2]
    yarn      fᵢ·(1 − rᵢ) + fᵢ/s·rᵢ with a ramp r from 0 (pairs that turn more than β_fast times in L)  [3]
              to 1 (less than β_slow times); cos and sin are multiplied by 0.1·ln s + 1
    llama3    fᵢ for wavelengths below L/high, fᵢ/s above L/low, a blend between                       [4]

    d rotated dimensions of a head.

[1] Chen et al. 2023, https://arxiv.org/abs/2306.15595   [2] r/LocalLLaMA 2023, "NTK-aware scaled RoPE"
[3] Peng et al. 2023, https://arxiv.org/abs/2309.00071   [4] Llama 3.1's rope_scaling
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from orbit.model.errors import SettingError


def powers(base: float | Tensor, dim: int, device: torch.device | None) -> Tensor:
    """base^(−2i/dim) for the dim/2 pairs, in float32."""
    return 1.0 / base ** (torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)


@dataclass(frozen=True, kw_only=True)
class Default:
    """No scaling. Also what every scaling below answers to."""

    @property
    def needs_length(self) -> bool:
        """Whether frequencies depend on the positions at hand."""
        return False

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by."""
        return 1.0

    def frequencies(
        self, base: float, dim: int, device: torch.device | None, length: Tensor | None
    ) -> Tensor:
        """(dim/2,) in float32; `length` is a scalar tensor, the greatest position + 1, where it is needed."""
        return powers(base, dim, device)


@dataclass(frozen=True, kw_only=True)
class Linear(Default):
    factor: float

    def frequencies(
        self, base: float, dim: int, device: torch.device | None, length: Tensor | None
    ) -> Tensor:
        return powers(base, dim, device) / self.factor


@dataclass(frozen=True, kw_only=True)
class NTK(Default):
    factor: float

    def frequencies(
        self, base: float, dim: int, device: torch.device | None, length: Tensor | None
    ) -> Tensor:
        return powers(base * self.factor ** (dim / (dim - 2)), dim, device)


@dataclass(frozen=True, kw_only=True)
class Dynamic(Default):
    factor: float
    original_max_position_embeddings: int

    @property
    def needs_length(self) -> bool:
        return True

    def frequencies(
        self, base: float, dim: int, device: torch.device | None, length: Tensor | None
    ) -> Tensor:
        assert length is not None
        trained = self.original_max_position_embeddings
        stretch = self.factor * length.float().clamp(min=trained) / trained - (self.factor - 1)
        return powers(base * stretch ** (dim / (dim - 2)), dim, device)


@dataclass(frozen=True, kw_only=True)
class Yarn(Default):
    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def amplitude(self) -> float:
        def gain(mscale: float) -> float:
            return 0.1 * mscale * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return gain(self.mscale) / gain(self.mscale_all_dim)
        return gain(1.0)

    def frequencies(
        self, base: float, dim: int, device: torch.device | None, length: Tensor | None
    ) -> Tensor:
        def pair_that_turns(times: float) -> float:
            turn = self.original_max_position_embeddings / (times * 2 * math.pi)
            return dim * math.log(turn) / (2 * math.log(base))

        low, high = pair_that_turns(self.beta_fast), pair_that_turns(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        pair = torch.arange(dim // 2, device=device, dtype=torch.float32)
        ramp = ((pair - low) / (high - low)).clamp(0, 1)
        own = powers(base, dim, device)
        return own / self.factor * ramp + own * (1 - ramp)


@dataclass(frozen=True, kw_only=True)
class Llama3(Default):
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def frequencies(
        self, base: float, dim: int, device: torch.device | None, length: Tensor | None
    ) -> Tensor:
        own = powers(base, dim, device)
        turns = self.original_max_position_embeddings * own / (2 * math.pi)
        blend = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * own / self.factor + blend * own


KINDS: dict[str, type[Default]] = {
    "default": Default,
    "linear": Linear,
    "ntk": NTK,
    "dynamic": Dynamic,
    "yarn": Yarn,
    "llama3": Llama3,
}


def read_scaling(scaling: Mapping[str, Any] | None) -> Default:
    """The scaling that a mapping such as `{"rope_type": "linear", "factor": 2.0}` describes.

    Raises:
        SettingError: an unknown `rope_type`, a key too many or too few, a factor below 1.
    """
    if scaling is None:
        return Default()
    settings = dict(scaling)
    name = settings.pop("rope_type", None)
    if name not in KINDS:
        raise SettingError(f"rope_type {name!r} is unknown: choose one of {', '.join(KINDS)}")
    kind = KINDS[name]
    known = {field.name for field in fields(kind)}
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    if extra := sorted(settings.keys() - known):
        raise SettingError(
            f"rope_type {name!r} takes no {', '.join(extra)}: only {', '.join(sorted(known)) or 'nothing'}"
        )
    if missing := sorted(needed - settings.keys()):
        raise SettingError(f"rope_type {name!r} needs {', '.join(missing)} too")
    for key in ("factor", "original_max_position_embeddings"):
        if key in settings and not settings[key] >= 1:
            raise SettingError(f"{key} {settings[key]} is below 1: a context is lengthened, not shortened")
    if name == "llama3" and not settings["low_freq_factor"] < settings["high_freq_factor"]:
        raise SettingError(
            f"low_freq_factor {settings['low_freq_factor']} is not below "
            f"high_freq_factor {settings['high_freq_factor']}: Llama 3.1 has 1 and 4"
        )
    return kind(**settings)
