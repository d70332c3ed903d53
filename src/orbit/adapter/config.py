"""An adapter's settings, and their translation from and to PEFT's `adapter_config.json`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from orbit.adapter.errors import ConfigError
from orbit.adapter.patterns import Pattern


@dataclass(frozen=True)
class LayerConfig:
    """An AdapterConfig's settings for one layer."""

    r: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False
    rslora: bool = False
    gated: bool = False


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
        targets: which layers, as dotted suffixes ("q_proj", "mlp.up_proj"), globs ("layers.*.q_proj") or
            regular expressions ("re:.*[qv]_proj", matched against the whole name). A target that names a
            container means every adaptable layer below it. None: every linear layer but the head, and no
            convolutions or embeddings (`adapter/targets.py`).
        exclude: layers to leave out, in the same grammar.
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
    targets: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

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
        if self.targets is not None:
            object.__setattr__(self, "targets", _names("targets", self.targets))
            if not self.targets:
                raise ConfigError("targets is empty: name some layers, or leave it None for all but the head")
        object.__setattr__(self, "exclude", _names("exclude", self.exclude or ()))
        for key in (*self.rank_pattern, *self.alpha_pattern):
            _layer_pattern(key)
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))

    def at(self, layer: str) -> LayerConfig:
        """What holds for the layer of this dotted name."""
        return LayerConfig(
            r=self.rank_of(layer),
            alpha=self.alpha_of(layer),
            dropout=self.dropout,
            dora=self.dora,
            rslora=self.rslora,
            gated=self.gated,
        )

    def rank_of(self, layer: str) -> int:
        """The rank for the layer of this dotted name."""
        return _lookup(self.rank_pattern, layer, self.r)

    def alpha_of(self, layer: str) -> float:
        """alpha for the layer of this dotted name."""
        return _lookup(self.alpha_pattern, layer, self.alpha)

    def to_peft(self, target_modules: Sequence[str] | str | None = None) -> dict[str, Any]:
        """The fields of PEFT's `LoraConfig`.

        Args:
            target_modules: the layers as PEFT is to find them; by default this config's own targets.

        Raises:
            ConfigError: if a glob, or a regular expression among several targets, would have to be written:
                PEFT knows neither. (`save` passes the adapted layers' names instead.)
        """
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_dora": self.dora,
            "use_rslora": self.rslora,
            "target_modules": _peft_targets(self.targets) if target_modules is None else target_modules,
            "exclude_modules": _peft_targets(self.exclude)
            if target_modules is None and self.exclude
            else None,
            "rank_pattern": dict(self.rank_pattern),
            "alpha_pattern": dict(self.alpha_pattern),
            "bias": "none",
            "fan_in_fan_out": False,
            "init_lora_weights": True,
            "modules_to_save": None,
            "inference_mode": True,
        }

    @classmethod
    def from_peft(cls, fields: Mapping[str, Any], layers: Sequence[str] | None = None) -> AdapterConfig:
        """The config that PEFT's fields describe.

        Args:
            fields: the content of an `adapter_config.json`.
            layers: full names of the adapted layers, if known; they then replace PEFT's targets.

        Raises:
            ConfigError: naming the field, if one of them cannot be honoured.
        """
        if fields.get("peft_type") != "LORA":
            raise ConfigError(f"peft_type is {fields.get('peft_type')!r}; only 'LORA' can be loaded")
        for key, value in fields.items():
            if key not in _HONOURED and not (value in _IGNORABLE.get(key, ()) or _empty(value)):
                raise ConfigError(f"{key}={value!r} cannot be honoured here")
        if layers is None and not _empty(fields.get("layers_to_transform")):
            raise ConfigError(
                f"layers_to_transform={fields['layers_to_transform']!r} is only resolved with the weights"
            )
        try:
            config = cls(
                r=fields.get("r", 8),
                alpha=fields.get("lora_alpha", 8),
                dropout=fields.get("lora_dropout", 0.0),
                dora=fields.get("use_dora", False),
                rslora=fields.get("use_rslora", False),
                targets=_own_targets(fields.get("target_modules")),
                exclude=_own_targets(fields.get("exclude_modules")) or (),
                rank_pattern=fields.get("rank_pattern") or {},
                alpha_pattern=fields.get("alpha_pattern") or {},
            )
        except (TypeError, AttributeError) as error:
            raise ConfigError(f"adapter_config.json is malformed: {error}") from None
        if layers is None:
            return config
        return replace(config, targets=tuple(layer or "re:" for layer in layers), exclude=())


_HONOURED = {
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "target_modules",
        "exclude_modules",
    ),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"),
    # These describe the file or PEFT's own run, and say nothing about ΔW.
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *(
        "megatron_core",
        "ephemeral_gpu_offload",
        "eva_config",
        "loftq_config",
        "runtime_config",
        "qalora_group_size",
    ),
}
# Values of other fields that leave the meaning of the saved tensors alone. The remaining ways of initialising
# (PiSSA, OLoRA, CorDA, LoftQ) change the base weights, so that their files do not fit the original model.
_IGNORABLE: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


def _empty(value: Any) -> bool:
    return (
        value is None
        or value is False
        or value == ""
        or (isinstance(value, (list, dict, tuple)) and not value)
    )


def _names(label: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Sequence) or not all(isinstance(name, str) and name for name in value):
        raise ConfigError(f"{label} must be a name or a list of non-empty names, got {value!r}")
    return tuple(value)


def _lookup(pattern: Mapping[str, Any], layer: str, default: Any) -> Any:
    for key, value in pattern.items():
        if _layer_pattern(key).fullmatch(layer):
            return value
    return default


@functools.lru_cache(maxsize=256)
def _layer_pattern(key: str) -> Pattern:
    return Pattern(rf"(?:.*\.)?(?:{key})", "rank_pattern or alpha_pattern")


def _own_targets(value: Any) -> tuple[str, ...] | None:
    if _empty(value):
        return None
    if isinstance(value, str):
        return None if value.lower() == "all-linear" else (f"re:{value}",)
    return tuple(sorted(name or "re:" for name in value))  # "": the model itself is the layer


def _peft_targets(targets: tuple[str, ...] | None) -> list[str] | str:
    if targets is None:
        return "all-linear"
    if len(targets) == 1 and targets[0].startswith("re:"):
        return targets[0][3:]
    for target in targets:
        if target.startswith("re:") or any(mark in target for mark in "*?["):
            raise ConfigError(
                f"PEFT has no way to write the target {target!r} beside others; pass target_modules="
            )
    return list(targets)
