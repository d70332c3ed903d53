"""Losses as small frozen objects: `objective(model, batch, ref=None) -> Outcome(loss, weight, records)`."""

from orbit.core.outcome import Outcome
from orbit.objective.causal_lm import CausalLM

__all__ = ["CausalLM", "Outcome"]
