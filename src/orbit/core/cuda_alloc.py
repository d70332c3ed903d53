"""How PyTorch's caching allocator cuts up CUDA memory, chosen before CUDA starts.

The allocator reads its settings once, at its first use, from an environment variable of the form `key:value,key:value`:
`PYTORCH_ALLOC_CONF`, or `PYTORCH_CUDA_ALLOC_CONF`, its older name. Two of them help against fragmentation, the state
in which enough memory is free and no piece of it is large enough:

    max_split_size_mb      blocks larger than this are never split, so that large tensors find them whole again
    expandable_segments    segments grow in place instead of new ones being added; mostly the better cure

https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf
"""

from __future__ import annotations

import os

import torch

_NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
_LEAST = 20  # MiB, the allocator's own limit


def cuda_alloc(size: int | None = 128, expandable_segments: bool | None = None) -> str:
    """Set `max_split_size_mb` and `expandable_segments` of CUDA's allocator for this process and those it starts.

    Other settings in the variable stay. Without CUDA it does no harm.

    Args:
        size: `max_split_size_mb`, the largest block in MiB that may be split; None leaves it as it is.
        expandable_segments: whether segments may grow; None leaves it as it is.

    Returns:
        All settings, as they stand in the variable. Where both names are set, both get the new settings, and the older
        one is what CUDA goes by.

    Raises:
        ValueError: the size is below 20 MiB or no whole number; or nothing is to be set.
        RuntimeError: CUDA has started, and would not look at them any more. The variable is as it was.
    """
    if size is None and expandable_segments is None:
        raise ValueError("cuda_alloc(size=None) sets nothing: give a size in MiB, or expandable_segments=")
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < _LEAST):
        raise ValueError(f"size={size!r}: max_split_size_mb is a whole number of MiB, and at least {_LEAST}")
    if torch.cuda.is_initialized():
        raise RuntimeError(
            "cuda_alloc() comes too late: CUDA has started and has read its settings; call it before the first tensor "
            f"or model is on the GPU, or start the program with {_NAMES[0]}=max_split_size_mb:... python ..."
        )
    new = {
        "max_split_size_mb": None if size is None else str(size),
        "expandable_segments": None if expandable_segments is None else str(bool(expandable_segments)),
    }
    settings = {key: value for key, value in new.items() if value is not None}
    text = ""
    for name in [name for name in _NAMES if os.environ.get(name)] or [_NAMES[0]]:
        # A list in brackets is cut up too, and put together again: none of its items begins like a setting.
        entries = [entry.strip() for entry in os.environ.get(name, "").split(",") if entry.strip()]
        others = [entry for entry in entries if entry.partition(":")[0].strip() not in settings]
        text = ",".join([*others, *(f"{key}:{value}" for key, value in settings.items())])
        os.environ[name] = text
    return text
