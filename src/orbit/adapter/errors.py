"""What goes wrong with adapters, by kind. Every message names the value, the rule and the way out."""

from __future__ import annotations


class AdapterError(Exception):
    """Base of every error that `orbit.adapter` raises on purpose; the model is then as it was before."""


class ConfigError(AdapterError, ValueError):
    """An adapter's settings contradict themselves, or a field cannot be honoured."""


class TargetError(AdapterError, ValueError):
    """A target names no adaptable layer."""


class GraftError(AdapterError, TypeError):
    """A layer or model cannot carry adapters in its present state."""


class TaskError(AdapterError, ValueError):
    """A task is unknown, already there, or badly named."""


class RouteError(AdapterError, RuntimeError):
    """A route cannot be taken: merged weights, another thread's route, or a replay that cannot be pinned."""


class ScalingsError(RouteError):
    """Scalings per token do not fit what a layer was given.

    Attributes:
        layer: the layer.
    """

    def __init__(self, message: str, layer: object) -> None:
        super().__init__(message, layer)
        self.layer = layer

    def __str__(self) -> str:
        return str(self.args[0])


class MergeError(AdapterError, RuntimeError):
    """Weights cannot be merged or unmerged."""


class GradientError(AdapterError, RuntimeError):
    """A routed, trainable adapter received no gradient."""


class StateError(AdapterError, RuntimeError):
    """A state_dict of a task lacks tensors, has others, or they have other shapes."""


class AdapterFileError(AdapterError, ValueError):
    """An adapter's file is incomplete, damaged, or does not belong to this model."""
