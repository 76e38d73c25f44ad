"""The device that a plan is made for."""

from __future__ import annotations

import torch

from fastmllm.bench.roofline import measure_rates
from fastmllm.train.devices import DEVICES, KINDS, Device, cpu_device


def check_machine(name: str) -> None:
    """Refuse an unknown device.

    Raises:
        ValueError: with those that are known.
    """
    if name not in KINDS:
        raise ValueError(f"plan: unknown device {name!r}; choose one of {', '.join(KINDS)}")


def find_machine(name: str, dtype: str) -> Device:
    """Return a device's published figures, or this CPU's, measured now.

    Args:
        name: one of `KINDS`.
        dtype: that products are in.

    Raises:
        ValueError: an unknown name.
    """
    check_machine(name)
    if name != "cpu":
        return DEVICES[name]
    rates = measure_rates(getattr(torch, dtype))
    return cpu_device(rates.flops, rates.bytes, dtype)
