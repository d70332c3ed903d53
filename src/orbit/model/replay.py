"""Is a forward the recomputation of an earlier one? Activation checkpointing runs it again inside the backward pass.

What a forward adds to something of the caller's (a cache, a stream's memory) would be added a second time, and what it
read there before is gone. So whatever is filled by forwards remembers the pass it was begun in.
"""

from __future__ import annotations

import torch

__all__ = ["current_pass"]


def current_pass() -> int:
    """The number of the backward pass that this thread is in; −1 in none, and while compiling."""
    return -1 if torch.compiler.is_compiling() else torch._C._current_graph_task_id()
