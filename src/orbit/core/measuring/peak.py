"""The most floating-point operations a second that a device can do, as its maker states them.

Dense matrix products (no sparsity), in the units of the number format: NVIDIA's data sheets for tensor cores, AMD's for
matrix cores. Of several boards of one name, the name that torch reports tells which.
"""

from __future__ import annotations

import torch

# (part of the device's name, 16-bit, TF32, 32-bit) in TFLOP/s; the first match counts. None: it has no such unit.
_PEAKS: tuple[tuple[str, float, float | None, float], ...] = (
    ("B200", 2250.0, 1125.0, 75.0),
    ("GH200", 989.4, 494.7, 66.9),
    ("H200", 989.4, 494.7, 66.9),
    ("H100 PCIe", 756.0, 378.0, 51.0),
    ("H100 NVL", 835.5, 417.5, 60.0),
    ("H100", 989.4, 494.7, 66.9),
    ("A100", 312.0, 156.0, 19.5),
    ("A40", 149.7, 74.8, 37.4),
    ("A10G", 70.0, 35.0, 31.5),
    ("L40S", 362.1, 183.2, 91.6),
    ("L40", 181.1, 90.5, 90.5),
    ("L4", 121.0, 60.0, 30.3),
    ("RTX 4090", 165.2, 82.6, 82.6),
    ("RTX 3090", 71.0, 35.6, 35.6),
    ("V100", 125.0, None, 15.7),
    ("T4", 65.0, None, 8.1),
    ("MI300X", 1307.4, 653.7, 163.4),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of `device` in products of `dtype`; None where that is not known (every CPU).

    float32 counts as TF32 where PyTorch is allowed to use that.
    """
    if device.type != "cuda":
        return None
    return peak_of(
        torch.cuda.get_device_name(device), dtype, torch.get_float32_matmul_precision() != "highest"
    )


def peak_of(name: str, dtype: torch.dtype, tf32: bool) -> float | None:
    """The same by the device's name.

    >>> peak_of("NVIDIA H100 80GB HBM3", torch.bfloat16, False), peak_of("Tesla T4", torch.bfloat16, False)
    (989400000000000.0, None)
    """
    for part, half, tf32_peak, single in _PEAKS:
        if part in name:
            if dtype is torch.bfloat16 and tf32_peak is None:  # Volta and Turing know fp16 alone
                return None
            if dtype in (torch.float16, torch.bfloat16):
                return half * 1e12
            if dtype is torch.float32:
                return (tf32_peak if tf32 and tf32_peak is not None else single) * 1e12
            return None
    return None
