"""An adapter's settings in PEFT's words: the fields of `adapter_config.json`.

What PEFT has no field for is written under "orbit", in a config whose `peft_type` is ORBIT: PEFT drops fields that it
does not know with no more than a warning, but refuses a type that it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orbit.adapter.config import STARTS_FROM_WEIGHT, AdapterConfig
from orbit.adapter.errors import ConfigError

OWN_TYPE = "ORBIT"
_OWN = ("gated", "init")

_READ = {
    *("peft_type", "orbit", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *(
        "rank_pattern",
        "alpha_pattern",
        "target_parameters",
        "modules_to_save",
        "bias",
        "trainable_token_indices",
    ),
    # These describe the file or PEFT's own run, or follow from the layer, and say nothing about ΔW.
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("megatron_core", "ephemeral_gpu_offload", "eva_config", "loftq_config", "runtime_config"),
    *("qalora_group_size", "fan_in_fan_out"),
}
# Ways of initialising after which the file means s·B·A. CorDA, LoftQ and the approximate PiSSA change the base weights
# in ways that cannot be repeated from the file.
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")


def to_peft(
    config: AdapterConfig,
    target_modules: Sequence[str] | str,
    target_parameters: Sequence[str] = (),
    modules_to_save: Sequence[str] = (),
    token_rows: Mapping[str, Sequence[int]] | None = None,
    *,
    fan_in_fan_out: bool = False,
    own: bool = False,
) -> dict[str, Any]:
    """The fields of PEFT's `LoraConfig`.

    Args:
        target_modules, target_parameters, modules_to_save: the layers, parameters and modules trained whole, as PEFT
            is to find them.
        token_rows: the indices of rows of layers that have such, by full name.
        fan_in_fan_out: whether weights are (in, out), as those of Conv1D are.
        own: write our own type, with the settings that PEFT has no field for.
    """
    return {
        "peft_type": OWN_TYPE if own else "LORA",
        **({"orbit": {name: getattr(config, name) for name in _OWN}} if own else {}),
        "r": config.r,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_dora": config.dora,
        "use_rslora": config.rslora,
        "target_modules": target_modules,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": config.bias,
        "fan_in_fan_out": fan_in_fan_out,
        "init_lora_weights": True,
        "target_parameters": list(target_parameters) or None,
        "modules_to_save": list(modules_to_save) or None,
        "trainable_token_indices": {name: list(rows) for name, rows in (token_rows or {}).items()} or None,
        "inference_mode": True,
    }


def from_peft(
    fields: Mapping[str, Any],
    layers: Sequence[str],
    parameters: Sequence[str] = (),
    copies: Sequence[str] = (),
    tokens: Mapping[str, Sequence[int]] | None = None,
) -> AdapterConfig:
    """The config that PEFT's fields describe.

    Args:
        fields: the content of an `adapter_config.json`.
        layers, parameters, copies: full names of the adapted layers and parameters and of the modules that are
            trained whole, which the file's keys tell; they replace PEFT's ways to name them.
        tokens: so too the layers that have token rows, with the indices.

    Raises:
        ConfigError: naming the field, if one of them cannot be honoured.
    """
    kind = fields.get("peft_type")
    if kind not in ("LORA", OWN_TYPE):
        raise ConfigError(f"peft_type is {kind!r}; only 'LORA' and {OWN_TYPE!r} can be loaded")
    for key, value in fields.items():
        if key not in _READ and not is_empty(value):
            raise ConfigError(f"{key}={value!r} cannot be honoured here")
    init = fields.get("init_lora_weights", True)
    if init not in (*_PLAIN_INITS, *STARTS_FROM_WEIGHT):
        raise ConfigError(
            f"init_lora_weights={init!r} changed the base weights in a way that the file does not tell; save it from "
            "PEFT with path_initial_model_for_weight_conversion"
        )
    try:
        config = AdapterConfig(
            r=fields.get("r", 8),
            alpha=fields.get("lora_alpha", 8),
            dropout=fields.get("lora_dropout", 0.0),
            dora=fields.get("use_dora", False),
            rslora=fields.get("use_rslora", False),
            init=init if init in STARTS_FROM_WEIGHT else "kaiming",
            targets=tuple(layer or "re:" for layer in layers),  # "": the model itself is the layer
            parameters=tuple(parameters),
            save_modules=tuple(copies),
            rank_pattern=fields.get("rank_pattern") or {},
            alpha_pattern=fields.get("alpha_pattern") or {},
            bias=fields.get("bias") or "none",
            tokens={layer or "re:": tuple(rows) for layer, rows in (tokens or {}).items()},
        )
        if kind == OWN_TYPE:
            if unknown := [name for name in fields["orbit"] if name not in _OWN]:
                raise ConfigError(
                    f"orbit={{{unknown[0]!r}: …}} cannot be honoured here: it is of a later version"
                )
            config = replace(config, **{name: fields["orbit"][name] for name in _OWN})
    except (TypeError, AttributeError, KeyError) as error:
        raise ConfigError(f"adapter_config.json is malformed: {error}") from None
    return config


def is_empty(value: Any) -> bool:
    """Is this one of the ways to leave a field out?"""
    return value is None or value is False or value == "" or (isinstance(value, (list, dict)) and not value)
