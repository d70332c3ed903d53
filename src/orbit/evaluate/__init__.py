"""What a model can do: metrics by name, suites of them, and the passes over a dataset that they share."""

from orbit.evaluate.metrics import ExactMatch, Loss, Metric, Perplexity, Rouge
from orbit.evaluate.passes import EvaluationError, Reply, SampleScore, generate_pass, score_pass
from orbit.evaluate.registry import METRIC_REGISTRY, SUITE_REGISTRY

__all__ = [
    "METRIC_REGISTRY",
    "SUITE_REGISTRY",
    "EvaluationError",
    "ExactMatch",
    "Loss",
    "Metric",
    "Perplexity",
    "Reply",
    "Rouge",
    "SampleScore",
    "generate_pass",
    "score_pass",
]
