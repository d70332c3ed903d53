"""Metrics and suites of metrics by name."""

from __future__ import annotations

from orbit.core.components import Components

METRIC_REGISTRY = Components(
    "metric",
    {
        "exact_match": "orbit.evaluate.metrics:ExactMatch",
        "loss": "orbit.evaluate.metrics:Loss",
        "perplexity": "orbit.evaluate.metrics:Perplexity",
        "rouge": "orbit.evaluate.metrics:Rouge",
    },
)
SUITE_REGISTRY = Components("suite")
