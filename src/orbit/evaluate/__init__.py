"""What a model can do: metrics by name, and suites of them."""

from orbit.evaluate.registry import METRIC_REGISTRY, SUITE_REGISTRY

__all__ = ["METRIC_REGISTRY", "SUITE_REGISTRY"]
