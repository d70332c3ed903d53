"""Several processes: what ranks tell each other, how a model is spread over them, and tensors that lie in pieces."""

from orbit.core.ranks.team import Team, everyones, on_all, on_main

__all__ = ["Team", "everyones", "on_all", "on_main"]
