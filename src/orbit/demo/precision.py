"""Which number format is faster here: measured, since it depends on the processor and not on its name.

A CPU with bfloat16 instructions multiplies matrices in bf16 up to twice as fast as in fp32, one without them
several times slower.
"""

from __future__ import annotations

import time

import torch


def fastest_dtype(device: torch.device, rounds: int = 5) -> torch.dtype:
    """bfloat16 where a matrix product in it takes at most 0.8 of fp32's time on `device`, else float32.

    Both are timed in turn, `rounds` times, and the best time of each counts. Takes some 50 ms.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    best = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    factors = {dtype: torch.ones(512, 512, device=device, dtype=dtype) for dtype in best}
    for _ in range(rounds + 1):
        for dtype, factor in factors.items():
            began = time.perf_counter()
            (factor @ factor).sum().item()  # .item() waits for the device
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return torch.bfloat16 if best[torch.bfloat16] <= 0.8 * best[torch.float32] else torch.float32
