"""The random number generators of a run: seed them, photograph them, put them back.

A snapshot holds plain values and tensors only, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

from orbit.core import deterministic as algorithms


def seed_everything(seed: int = 42, deterministic: bool | str = False) -> int:
    """Seed Python, NumPy and PyTorch (all devices); returns the seed.

    The workers of a DataLoader follow: torch seeds the same three in each of them, every epoch anew, from the generator
    that is seeded here. Generators that a dataset keeps for itself are another matter: `seed_worker`.

    Args:
        seed: 0 <= seed < 2**32 (NumPy's range).
        deterministic: also choose deterministic algorithms from now on, for the whole process: True raises where an
            operation has none, "warn" warns. Call it before CUDA starts. False leaves the choice as it is. A trainer's
            `deterministic=` does the same while its loops run.

    Raises:
        ValueError: the seed is no whole number or outside its range, or `deterministic` is none of the three.
        RuntimeError: CUDA has started without `CUBLAS_WORKSPACE_CONFIG`, which deterministic algorithms need.
        Nothing was changed then.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise ValueError(f"seed {seed!r} is a {type(seed).__name__}: give a whole number, 0 <= seed < 2**32")
    seed = operator.index(seed)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed {seed} is outside 0 <= seed < 2**32, the range that NumPy accepts")
    algorithms.switch_on(deterministic)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed


def seed_worker(worker: int) -> None:
    """Give each worker of a DataLoader its own course of the generators that the dataset keeps:
    `DataLoader(..., worker_init_fn=seed_worker)`.

    A dataset that draws from a generator of its own, `self.rng = np.random.default_rng(0)` say, reaches every worker as
    a copy: all workers draw the same numbers, and the same again in every epoch. Here such generators are seeded from
    the seed that torch gives the worker. They are looked for in the attributes of the dataset, and of the objects in
    these (wrapped datasets, transforms, lists of them).

    Args:
        worker: the worker's number, from 0.

    Raises:
        RuntimeError: called outside of a worker.
    """
    info = get_worker_info()
    if info is None:
        raise RuntimeError(
            f"seed_worker({worker}) works inside of a DataLoader's worker: pass it as worker_init_fn=seed_worker"
        )
    for number, generator in enumerate(_kept_generators(info.dataset)):
        seed = int(np.random.SeedSequence([info.seed, number]).generate_state(1)[0])
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = type(generator.bit_generator)(seed).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        else:
            generator.seed(seed)


_Kept = random.Random | np.random.RandomState | np.random.Generator | torch.Generator
_NO_PARTS = (type, ModuleType, torch.Tensor, torch.nn.Module)
_MOST = 100  # longer lists hold samples, not parts of a dataset


def _kept_generators(dataset: Any) -> Iterator[_Kept]:
    left, seen = [dataset], set()
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, _NO_PARTS):
            continue
        seen.add(id(value))
        if isinstance(value, _Kept):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            left += (value.values() if isinstance(value, dict) else value) if len(value) <= _MOST else ()
        else:
            left += getattr(value, "__dict__", {}).values()


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
