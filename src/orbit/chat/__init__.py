"""Chat with a model in a terminal or from a program."""

from orbit.chat.errors import ChatError
from orbit.chat.interface import ChatInterface
from orbit.chat.settings import Settings

__all__ = ["ChatError", "ChatInterface", "Settings"]
