"""Adapters: named tasks on any model, grafted in place, chosen per call, merged and saved exactly."""

from orbit.adapter.algebra import CombineReport, LayerCombination, combine
from orbit.adapter.config import AdapterConfig
from orbit.adapter.diagnose import Diagnosis, Finding, LayerDiagnosis, LoRADiagnoser
from orbit.adapter.errors import (
    AdapterError,
    AdapterFileError,
    ConfigError,
    GradientError,
    GraftError,
    MergeError,
    RouteError,
    StateError,
    TargetError,
    TaskError,
)
from orbit.adapter.eva import init_eva
from orbit.adapter.files import load, save
from orbit.adapter.functions import (
    freeze_backbone_only,
    inject_lora,
    inject_lora_file,
    load_lora,
    merge_lora,
    save_lora,
    unmerge_lora,
)
from orbit.adapter.groups import param_groups
from orbit.adapter.inject import (
    InjectReport,
    adapter_parameters,
    base_state_dict,
    check_gradients,
    inject,
    remove,
    rename,
    set_trainable,
    task_config,
    task_layers,
    tasks,
)
from orbit.adapter.kinds.attention import AttentionGraft
from orbit.adapter.kinds.conv import Conv1dGraft, Conv2dGraft, Conv3dGraft
from orbit.adapter.kinds.conv1d import Conv1DGraft
from orbit.adapter.kinds.embedding import EmbeddingGraft
from orbit.adapter.kinds.linear import LinearGraft
from orbit.adapter.kinds.modules import register_base_module_wrapper
from orbit.adapter.kinds.registry import register_forward, register_kind
from orbit.adapter.merge import merge, merged, merged_state_dict, unmerge
from orbit.adapter.optimizers import TaskOptimizers, per_task_loss
from orbit.adapter.routes.plan import PerRow, Route, Scaled, Together
from orbit.adapter.routes.route import current_route, route, set_route

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterFileError",
    "AttentionGraft",
    "CombineReport",
    "ConfigError",
    "Conv1DGraft",
    "Conv1dGraft",
    "Conv2dGraft",
    "Conv3dGraft",
    "Diagnosis",
    "EmbeddingGraft",
    "Finding",
    "GradientError",
    "GraftError",
    "InjectReport",
    "LayerCombination",
    "LayerDiagnosis",
    "LinearGraft",
    "LoRADiagnoser",
    "MergeError",
    "PerRow",
    "Route",
    "RouteError",
    "Scaled",
    "StateError",
    "TargetError",
    "TaskError",
    "TaskOptimizers",
    "Together",
    "adapter_parameters",
    "base_state_dict",
    "check_gradients",
    "combine",
    "current_route",
    "freeze_backbone_only",
    "init_eva",
    "inject",
    "inject_lora",
    "inject_lora_file",
    "load",
    "load_lora",
    "merge",
    "merge_lora",
    "merged",
    "merged_state_dict",
    "param_groups",
    "per_task_loss",
    "register_base_module_wrapper",
    "register_forward",
    "register_kind",
    "remove",
    "rename",
    "route",
    "save",
    "save_lora",
    "set_route",
    "set_trainable",
    "task_config",
    "task_layers",
    "tasks",
    "unmerge",
    "unmerge_lora",
]
