"""What a conversation refuses; the conversation is then as it was before."""


class ChatError(ValueError):
    """A setting, a saved conversation or a command that a chat cannot use. The message says what it takes."""
