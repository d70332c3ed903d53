"""Losses as small frozen objects: `objective(model, batch, ref=None) -> Outcome(loss, weight, records)`."""

from orbit.core.outcome import Outcome
from orbit.objective.causal_lm import CausalLM
from orbit.objective.registry import OBJECTIVE_REGISTRY

__all__ = ["OBJECTIVE_REGISTRY", "CausalLM", "Outcome"]
