"""Gates: what decides how much of a signal passes, and which way it goes."""

from orbit.model.gate.context import ContextGate
from orbit.model.gate.glu import GLUGate
from orbit.model.gate.sigmoid import SigmoidGate
from orbit.model.gate.softmax import SoftmaxGate
from orbit.model.gate.tanh import TanhGate
from orbit.model.gate.top_k import Routing, TopKGate, load_balancing_loss, router_z_loss

__all__ = [
    "ContextGate",
    "GLUGate",
    "Routing",
    "SigmoidGate",
    "SoftmaxGate",
    "TanhGate",
    "TopKGate",
    "load_balancing_loss",
    "router_z_loss",
]
