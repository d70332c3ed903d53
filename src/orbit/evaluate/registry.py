"""Metrics and suites of metrics by name."""

from __future__ import annotations

from orbit.core.components import Components

METRIC_REGISTRY = Components("metric")
SUITE_REGISTRY = Components("suite")
