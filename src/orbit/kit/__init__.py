"""Ready-made tools under document 000's path. An index: nothing is defined here."""

from orbit.chat import ChatInterface

__all__ = ["ChatInterface"]
