"""Learning from preferences: DPO, SimPO, ORPO, KTO, and the references that DPO and KTO compare with."""

from orbit.objective.preference.dpo import DPO
from orbit.objective.preference.kto import KTO
from orbit.objective.preference.orpo import ORPO
from orbit.objective.preference.reference import (
    AdapterOff,
    Cached,
    FrozenCopy,
    Reference,
    ReferenceModelError,
    choose,
)
from orbit.objective.preference.simpo import SimPO

__all__ = [
    "DPO",
    "KTO",
    "ORPO",
    "AdapterOff",
    "Cached",
    "FrozenCopy",
    "Reference",
    "ReferenceModelError",
    "SimPO",
    "choose",
]
