"""Gates: what decides how much of a signal passes, and which way it goes."""

from orbit.model.gate.top_k import Routing, TopKGate, load_balancing_loss, router_z_loss

__all__ = ["Routing", "TopKGate", "load_balancing_loss", "router_z_loss"]
