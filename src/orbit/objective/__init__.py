"""Losses as small frozen objects: `objective(model, batch, ref=None) -> Outcome(loss, weight, records)`."""

from orbit.core.outcome import Outcome
from orbit.objective.causal_lm import CausalLM
from orbit.objective.multitask import MultiTask
from orbit.objective.preference import DPO, KTO, ORPO, SimPO

__all__ = ["DPO", "KTO", "ORPO", "CausalLM", "MultiTask", "Outcome", "SimPO"]
