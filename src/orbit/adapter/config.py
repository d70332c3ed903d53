"""An adapter's settings. `peft_config.py` translates them from and to PEFT's `adapter_config.json`."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orbit.adapter.errors import ConfigError
from orbit.core.patterns import Pattern, clean

INITS = ("kaiming", "gaussian", "orthogonal", "pissa", "olora")
STARTS_FROM_WEIGHT = ("pissa", "olora")
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True)
class LayerConfig:
    """An AdapterConfig's settings for one layer."""

    r: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    gated: bool = False
    init: str = "kaiming"
    bias: bool = False


@dataclass(frozen=True)
class AdapterConfig:
    """How to adapt a model.

    Attributes:
        r: rank of ΔW = s·B·A.
        alpha: numerator of the scale s = alpha/r.
        dropout: probability of dropping an input of the low-rank branch, in [0, 1). Embeddings, whose inputs
            are indices, do without.
        dora: learn a magnitude beside the direction (`adapter/dora.py`).
        rslora: s = alpha/√r instead of alpha/r.
        gated: learn one factor g of ΔW = g·s·B·A in every layer; it starts at 1.
        init: where A and B start: "kaiming", "gaussian", "orthogonal", "pissa" or "olora" (`adapter/init.py`).
        targets: which layers, as dotted suffixes ("q_proj", "mlp.up_proj"), globs ("layers.*.q_proj") or
            regular expressions ("re:.*[qv]_proj", matched against the whole name). A target that names a
            container means every adaptable layer below it. None: every linear layer but the head, and no
            convolutions or embeddings (`adapter/targets.py`).
            An empty tuple: none, where `parameters`, `save_modules`, `tokens` or `bias` name something.
        exclude: layers to leave out, in the same grammar.
        parameters: matrices, or stacks of them, that are parameters of a module of any kind, such as
            "experts.gate_up_proj", in the same grammar (`adapter/kinds/whole.py`; PEFT's target_parameters).
        save_modules: modules, a head say, of which the task gets a copy that is trained whole, in the same
            grammar (PEFT's modules_to_save).
        layers: adapt only those of the targets (and parameters) that lie in these layers of the model, by number: the
            first number among the segments of a name, 3 in "model.layers.3.mlp.up_proj" (PEFT's layers_to_transform).
        bias: which biases the task has of its own, in the place of the base's, which stay: "none"; "lora_only",
            those of the adapted layers; "all", every parameter of the model that is called `bias` (`adapter/bias.py`).
        tokens: rows of embeddings that the task trains, the others staying (`adapter/tokens.py`): a list of indices
            into the input embeddings, or a dict of such lists by name, in the grammar of targets (PEFT's
            trainable_token_indices). Layers that share the weight, a tied head, follow.
        rank_pattern, alpha_pattern: other values of r and alpha for layers whose name ends in a match of the
            key, a regular expression. The first key that matches counts, as in PEFT.

    Raises:
        ConfigError: if a value lies outside its range.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    gated: bool = False
    init: str = "kaiming"
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    save_modules: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    layers: tuple[int, ...] | None = None
    bias: str = "none"
    tokens: Mapping[str, tuple[int, ...]] | tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for label, rank in [
            ("r", self.r),
            *((f"rank_pattern[{k!r}]", v) for k, v in self.rank_pattern.items()),
        ]:
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"{label} must be a whole number >= 1, got {rank!r}")
        for label, alpha in [
            ("alpha", self.alpha),
            *((f"alpha_pattern[{k!r}]", v) for k, v in self.alpha_pattern.items()),
        ]:
            if (
                isinstance(alpha, bool)
                or not isinstance(alpha, (int, float))
                or not math.isfinite(alpha)
                or not alpha
            ):
                raise ConfigError(f"{label} must be a finite number other than 0, got {alpha!r}")
        if (
            isinstance(self.dropout, bool)
            or not isinstance(self.dropout, (int, float))
            or not 0 <= self.dropout < 1
        ):
            raise ConfigError(f"dropout must lie in [0, 1), got {self.dropout!r}")
        for label in ("dora", "rslora", "gated"):
            if not isinstance(getattr(self, label), bool):
                raise ConfigError(f"{label} must be True or False, got {getattr(self, label)!r}")
        if self.init not in INITS:
            raise ConfigError(
                f"init must be one of {', '.join(map(repr, INITS))}, got {self.init!r}; for 'eva', which needs "
                "data, inject first and call init_eva(model, batches)"
            )
        if self.bias not in BIASES:
            raise ConfigError(f"bias must be one of {', '.join(map(repr, BIASES))}, got {self.bias!r}")
        if not isinstance(self.tokens, int) and not self.tokens:
            object.__setattr__(self, "tokens", ())
        elif isinstance(self.tokens, Mapping):
            found = {name: _numbers(f"tokens[{name!r}]", rows) for name, rows in self.tokens.items()}
            object.__setattr__(
                self, "tokens", dict(zip(_names("tokens", list(found)), found.values(), strict=True))
            )
        else:
            object.__setattr__(self, "tokens", _numbers("tokens", self.tokens))
        if self.layers is not None:
            object.__setattr__(self, "layers", _numbers("layers", self.layers))
        for label in ("parameters", "save_modules"):
            object.__setattr__(self, label, _names(label, getattr(self, label) or ()))
        if self.targets is not None:
            object.__setattr__(self, "targets", _names("targets", self.targets))
            if not (
                self.targets or self.parameters or self.save_modules or self.tokens or self.bias == "all"
            ):
                raise ConfigError("targets is empty: name some layers, or leave it None for all but the head")
        object.__setattr__(self, "exclude", _names("exclude", self.exclude or ()))
        for key in (*self.rank_pattern, *self.alpha_pattern):
            _layer_pattern(key)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))

    @classmethod
    def of_layers(cls, layers: Mapping[str, LayerConfig]) -> AdapterConfig:
        """The config that gives each of these layers, by dotted name, its settings.

        Raises:
            ConfigError: they differ in more than rank and alpha.
        """
        first, *others = layers.values()
        for label in ("dropout", "dora", "rslora", "gated"):
            for other in others:
                if getattr(other, label) != getattr(first, label):
                    raise ConfigError(
                        f"{label} is {getattr(first, label)} in one layer and {getattr(other, label)} in another"
                    )
        # The first pattern that matches counts, and "0" matches "1.0" too: longer names first.
        settings = {clean(name): config for name, config in layers.items()}
        names = sorted(settings, key=len, reverse=True)
        return cls(
            r=first.r,
            alpha=first.alpha,
            dropout=first.dropout,
            dora=first.dora,
            rslora=first.rslora,
            gated=first.gated,
            bias="lora_only" if any(layer.bias for layer in layers.values()) else "none",
            targets=tuple(layers),
            rank_pattern={re.escape(name): settings[name].r for name in names},
            alpha_pattern={re.escape(name): settings[name].alpha for name in names},
        )

    def at(self, layer: str) -> LayerConfig:
        """What holds for the layer of this dotted name."""
        return LayerConfig(
            r=self.rank_of(layer),
            alpha=self.alpha_of(layer),
            dropout=self.dropout,
            dora=self.dora,
            rslora=self.rslora,
            gated=self.gated,
            init=self.init,
            bias=self.bias != "none",
        )

    def rank_of(self, layer: str) -> int:
        """The rank for the layer of this dotted name."""
        return _lookup(self.rank_pattern, layer, self.r)

    def alpha_of(self, layer: str) -> float:
        """alpha for the layer of this dotted name."""
        return _lookup(self.alpha_pattern, layer, self.alpha)

    def as_plain(self) -> AdapterConfig:
        """This config with ΔW = s·(B·A − B₀·A₀) written as s'·[B, −B₀]·[A; A₀], of twice the rank and s' = s.

        Itself, if its init has no start. `Graft.update` gives the factors.
        """
        if self.init not in STARTS_FROM_WEIGHT:
            return self
        factor = math.sqrt(2) if self.rslora else 2
        return replace(
            self,
            init="kaiming",
            r=2 * self.r,
            alpha=factor * self.alpha,
            rank_pattern={key: 2 * r for key, r in self.rank_pattern.items()},
            alpha_pattern={key: factor * alpha for key, alpha in self.alpha_pattern.items()},
        )


def _numbers(label: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        raise ConfigError(f"{label} must be a list of whole numbers, and not empty; got {value!r}")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ConfigError(f"{label} must hold whole numbers >= 0, and {number!r} is none")
    if len(set(value)) < len(value):
        double = next(number for number in value if list(value).count(number) > 1)
        raise ConfigError(f"{label} names {double} twice")
    return tuple(value)


def _names(label: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(f"{label} must be a name or a list of non-empty names, got {value!r}")
    return tuple(value)


def _lookup(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    for key, value in pattern.items():
        if _layer_pattern(key).fullmatch(clean(layer)):
            return value
    return default


@functools.lru_cache(maxsize=256)
def _layer_pattern(key: str) -> Pattern:
    return Pattern(rf"(?:.*\.)?(?:{key})", "rank_pattern or alpha_pattern", ConfigError)
