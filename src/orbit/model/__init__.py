"""What works on any `nn.Module`. So far: initialisation by layer kind."""

from orbit.model.init import auto_initialize

__all__ = ["auto_initialize"]
