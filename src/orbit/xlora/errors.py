"""What goes wrong with mixtures. Every message names the value, the rule and the way out."""

from __future__ import annotations

from orbit.adapter.errors import AdapterError


class XLoRAError(AdapterError, ValueError):
    """A mixture's settings, experts or files contradict themselves or the model; the model is as it was before."""


class CacheError(AdapterError, RuntimeError):
    """A key-value cache cannot serve a mixture: it was filled by something else, or the model has none."""
