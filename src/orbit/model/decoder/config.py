"""What a `Transformer` is made of, checked as far as it concerns more than one block, and read from a Llama's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from orbit.core.names import did_you_mean
from orbit.model.activation import activation_of
from orbit.model.attention.scaling import read_scaling
from orbit.model.errors import SettingError

__all__ = ["TransformerConfig"]

OURS = "orbit"  # the model_type of what Transformer.save_pretrained writes
_DIFFERENT: dict[str, tuple[str, ...]] = {  # the settings by which a family differs from Llama
    "llama": (),
    "mistral": ("window",),
    "qwen3": ("qk_norm",),
}
_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "swish": "silu",
}  # transformers' names


@dataclass(frozen=True)
class TransformerConfig:
    """The sizes and kinds of a decoder. Sizes left out are those of Llama for the others.

    Args:
        vocab_size: V.
        hidden_size: D, the width.
        num_layers: blocks.
        num_heads: H, of the queries.
        num_kv_heads: G, of keys and values, a divisor of H; default H.
        head_dim: default D/H.
        intermediate_size: inside the MLP; default 8/3·D, rounded up to a multiple of 64.
        max_length: the longest text; a longer one is refused. None is no limit, since rotary positions have none.
        rope_base: longest wavelength / 2π.
        rope_scaling: for texts longer than the trained ones (`RotaryPositionalEmbedding`).
        norm_eps: of the RMS norms.
        tie_embeddings: the head is the embedding's weight.
        window: a token sees so many, itself the last of them; None is all before it.
        qk_norm: RMS norm of every head's queries and keys.
        attention_bias, mlp_bias: their projections have one.
        attention_dropout: of the attention weights, in training.
        activation: of the gated MLP, as `MLP` takes it.
        num_experts: with a number, every MLP is an `MoE` of so many, each of `intermediate_size`.
        experts_per_token: how many of them see a token.
        balance_weight: of the experts' load-balancing loss in `output.loss`.
        init_std: of the first weights; those that write to the residual stream have init_std/√(2·num_layers).
        eos_token_id: ends a text in `generate`; one or several.
        pad_token_id: fills rows that have ended.

    Raises:
        SettingError: a size below 1, sizes that do not divide, or a value outside its range.

    >>> TransformerConfig(vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2).intermediate_size
    192
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    max_length: int | None = None
    rope_base: float = 10000.0
    rope_scaling: Mapping[str, Any] | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    window: int | None = None
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    activation: str = "silu"
    num_experts: int | None = None
    experts_per_token: int = 2
    balance_weight: float = 0.01
    init_std: float = 0.02
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        self._check()
        if self.num_kv_heads is None:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", -(-self.hidden_size * 8 // 3 // 64) * 64)

    def _check(self) -> None:
        """What the blocks do not check themselves, or under another name."""
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_length", "window", "num_experts", "experts_per_token"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value >= 1):
                raise SettingError(f"{name} {value!r} is no size: choose a whole number from 1 up")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            below = self.hidden_size // self.num_heads * self.num_heads
            fits = " or ".join(str(n) for n in (below, below + self.num_heads) if n)
            raise SettingError(
                f"hidden_size {self.hidden_size} is no multiple of num_heads {self.num_heads}: choose {fits}, or give "
                "head_dim="
            )
        if self.num_experts is not None and self.experts_per_token > self.num_experts:
            raise SettingError(
                f"experts_per_token {self.experts_per_token} exceeds num_experts {self.num_experts}: choose as "
                "many at most"
            )
        for name, least in (("norm_eps", 0), ("init_std", 0), ("balance_weight", 0)):
            if not getattr(self, name) >= least:
                raise SettingError(f"{name} {getattr(self, name)!r} is below {least}")
        read_scaling(self.rope_scaling)
        activation_of(self.activation)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as a tuple."""
        ids = self.eos_token_id
        return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)

    @classmethod
    def from_llama(cls, config: Any) -> TransformerConfig:
        """The settings of a Llama, or of a Mistral or Qwen3, which differ from it in what we have;
        or those that `Transformer.save_pretrained` wrote.

        Args:
            config: transformers' config object, what `config.json` holds, or the folder of that file.

        Raises:
            SettingError: another architecture, or a setting that would be lost. OSError: the folder has no config.

        >>> from transformers import LlamaConfig                                # doctest: +SKIP
        >>> TransformerConfig.from_llama(LlamaConfig(num_key_value_heads=8))    # doctest: +SKIP
        """
        given = read_config(config)
        kind = given.get("model_type", "llama")
        if kind == OURS:
            return cls._from_ours(given)
        if kind not in _DIFFERENT:
            raise SettingError(f"model_type {kind!r} is no Llama: {', '.join(_DIFFERENT)} can be read")
        base, scaling = _rope(given)
        _refuse_lost(given, kind)
        eos, pad = given.get("eos_token_id"), given.get("pad_token_id")
        return cls(
            vocab_size=given["vocab_size"],
            hidden_size=given["hidden_size"],
            num_layers=given["num_hidden_layers"],
            num_heads=given["num_attention_heads"],
            num_kv_heads=given.get("num_key_value_heads"),
            head_dim=given.get("head_dim"),
            intermediate_size=given["intermediate_size"],
            max_length=given.get("max_position_embeddings") if _states_its_reach(scaling) else None,
            rope_base=base,
            rope_scaling=scaling,
            norm_eps=given.get("rms_norm_eps", 1e-6),
            tie_embeddings=given.get("tie_word_embeddings", False),
            window=given.get("sliding_window") if "window" in _DIFFERENT[kind] else None,
            qk_norm="qk_norm" in _DIFFERENT[kind],
            attention_bias=given.get("attention_bias", False),
            mlp_bias=given.get("mlp_bias", False),
            attention_dropout=given.get("attention_dropout") or 0.0,
            activation=_ACTIVATIONS.get(act := given.get("hidden_act", "silu"), act),
            init_std=given.get("initializer_range", 0.02),
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            pad_token_id=pad if pad is not None and pad >= 0 else None,  # old Llamas write -1 for none
        )

    @classmethod
    def _from_ours(cls, given: Mapping[str, Any]) -> TransformerConfig:
        settings = given.get("settings")
        if not isinstance(settings, dict):
            raise SettingError("the config of a Transformer has no settings")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise SettingError(
                    f"there is no setting {name!r}{did_you_mean(name, known)}: a newer Orbit wrote it?"
                )
        missing = [
            field.name for field in fields(cls) if field.default is MISSING and field.name not in settings
        ]
        if missing:
            raise SettingError(f"the config of a Transformer needs {', '.join(missing)}")
        if isinstance(settings.get("eos_token_id"), list):
            settings = {**settings, "eos_token_id": tuple(settings["eos_token_id"])}
        try:
            return cls(**settings)
        except TypeError as error:  # a value of another kind
            raise SettingError(f"the config of a Transformer: {error}") from None


# -- reading transformers' settings --------------------------------------------------------------------------


def read_config(config: Any) -> Mapping[str, Any]:
    if isinstance(config, Mapping):
        return config
    if isinstance(config, (str, Path)):
        path = Path(config) / "config.json"
        try:
            found = json.loads(path.read_text("utf-8"))
        except (ValueError, RecursionError) as error:
            raise SettingError(f"{path} is not JSON: {error}") from None
        if not isinstance(found, dict):
            raise SettingError(f"{path} holds a {type(found).__name__}, and must hold an object")
        return found
    if hasattr(config, "to_dict"):
        return config.to_dict()
    raise SettingError(f"{type(config).__name__} is no config: give transformers' object, a dict or a folder")


def _rope(given: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, as transformers 5 writes them (rope_parameters) or as 4 did (rope_theta, rope_scaling)."""
    found = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    base = found.pop("rope_theta", None) or given.get("rope_theta") or 10000.0
    old_name = found.pop("type", "default")
    kind = found.setdefault("rope_type", old_name)
    if found.pop("partial_rotary_factor", 1.0) != 1.0:
        raise SettingError("partial_rotary_factor: heads that are rotated in part are no Llama's")
    if kind == "default":
        return base, None
    trained = given.get("max_position_embeddings")
    if kind == "dynamic":  # transformers stretches from here on, whatever else is said
        found["original_max_position_embeddings"] = trained
    elif kind == "yarn":
        found.setdefault("original_max_position_embeddings", trained)
    return base, found


def _states_its_reach(scaling: Mapping[str, Any] | None) -> bool:
    """Is max_position_embeddings the longest text, and not the one before scaling?"""
    return scaling is None or scaling["rope_type"] == "llama3"


def _refuse_lost(given: Mapping[str, Any], kind: str) -> None:
    """What would change the model's numbers and has no setting of ours."""
    missing = [
        name
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
        )
        if name not in given
    ]
    if missing:
        raise SettingError(f"the config of a {kind} needs {', '.join(missing)}")
    if kind == "qwen3" and (
        given.get("use_sliding_window") or "sliding_attention" in (given.get("layer_types") or ())
    ):
        raise SettingError("use_sliding_window: a window in some layers only cannot be honoured")
    if given.get("quantization_config") is not None:
        raise SettingError("quantization_config: the weights are packed; load the model they were made from")
