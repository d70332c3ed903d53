"""Chat with a model in a terminal or from a program."""

from orbit.chat.interface import ChatInterface

__all__ = ["ChatInterface"]
