"""What goes wrong with checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file, the rule and the way out."""
