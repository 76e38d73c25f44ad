"""What the devices promise: dense bfloat16 operations in a second, the divisor of MFU."""

from __future__ import annotations

import torch

# TFLOP/s without sparsity, from NVIDIA's data sheets (where they print "with sparsity", half of it). More special names
# stand in front of those that they contain.
DENSE_BFLOAT16 = {
    "GB200": 2500.0,  # GB200 NVL72: 360 PFLOP/s with sparsity in 72 GPUs
    "B200": 2250.0,  # DGX B200: 72 PFLOP/s of FP8 in 8 GPUs, with sparsity, of which bfloat16 has half
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.5,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
}


def peak_tflops(name: str, dtype: str) -> float | None:
    """Return the peak of a device by its name, None for one that is not in the table or another dtype: no guess.

    Args:
        name: as `torch.cuda.get_device_name` gives it.
        dtype: of the products; the table is "bfloat16"'s.
    """
    if dtype != "bfloat16":
        return None
    return next((peak for part, peak in DENSE_BFLOAT16.items() if part in name), None)


def own_peak(device: torch.device, dtype: str) -> float | None:
    """Return the peak of a rank's device; a CPU has none in the table."""
    return peak_tflops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
