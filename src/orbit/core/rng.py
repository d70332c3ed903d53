"""The random number generators of a run: seed them, photograph them, put them back.

A snapshot holds plain values and tensors only, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int = 42, deterministic: bool = False) -> int:
    """Seed Python, NumPy and PyTorch (all devices); returns the seed.

    Args:
        seed: 0 <= seed < 2**32 (NumPy's range).
        deterministic: also choose deterministic algorithms (`torch.use_deterministic_algorithms`), which raise
            where an operation has none. `CUBLAS_WORKSPACE_CONFIG` must then be set before CUDA starts.

    Raises:
        ValueError: the seed is outside its range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0 <= seed < 2**32, the range that NumPy accepts")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return seed


def capture(generators: Sequence[torch.Generator] = ()) -> dict[str, Any]:
    """Snapshot of Python's, NumPy's, PyTorch's and the given generators."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def restore(state: dict[str, Any], generators: Sequence[torch.Generator] = ()) -> None:
    """Put a snapshot back. ValueError if it was taken with another number of generators or CUDA devices."""
    if len(state["generators"]) != len(generators):
        raise ValueError(
            f"the checkpoint knows {len(state['generators'])} data generators and this loader has {len(generators)}: "
            "build the loader with the same generator= arguments as before"
        )
    cuda = state["cuda"]
    if cuda and torch.cuda.is_available():
        if len(cuda) != torch.cuda.device_count():
            raise ValueError(
                f"the checkpoint holds RNG states of {len(cuda)} CUDA devices and {torch.cuda.device_count()} are "
                "visible: set CUDA_VISIBLE_DEVICES to as many, or start without the checkpoint's RNG"
            )
        torch.cuda.set_rng_state_all([part.cpu() for part in cuda])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    for generator, part in zip(generators, state["generators"], strict=True):
        generator.set_state(part.cpu())


@contextmanager
def preserved(generators: Sequence[torch.Generator] = ()) -> Iterator[None]:
    """Whatever is drawn inside leaves the generators as they were outside."""
    state = capture(generators)
    try:
        yield
    finally:
        restore(state, generators)
