"""What named accelerators can do: the published figures that plans and meters divide by."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from fastmllm.train.peaks import DENSE_BFLOAT16


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """An accelerator and how it is wired.

    Args:
        name: for tables.
        memory: bytes.
        flops: dtype -> dense operations a second, a multiply-add as two.
        bandwidth: of its memory, bytes a second.
        link: to the others in its machine, bytes a second in one direction.
        network: of its share of the machine's network cards, bytes a second in one direction.
        host: to the memory of the machine, bytes a second in one direction.
        source: of the figures.
    """

    name: str
    memory: float
    flops: Mapping[str, float]
    bandwidth: float
    link: float
    network: float
    host: float
    source: str


def _peaks(name: str, float32: float) -> dict[str, float]:
    return {"bfloat16": 1e12 * DENSE_BFLOAT16[name], "float32": float32}


DEVICES: Mapping[str, Device] = {
    "a100": Device(
        name="A100 SXM 80 GB", memory=80e9, flops=_peaks("A100", 19.5e12), bandwidth=2.039e12,
        link=300e9, network=25e9, host=32e9, source="NVIDIA A100 datasheet 2021-06; DGX A100: 200 Gb/s a GPU",
    ),
    "h100": Device(
        name="H100 SXM 80 GB", memory=80e9, flops=_peaks("H100", 66.9e12), bandwidth=3.35e12,
        link=450e9, network=50e9, host=64e9, source="NVIDIA H100 datasheet 2023; DGX H100: 400 Gb/s a GPU",
    ),
    "h200": Device(
        name="H200 SXM 141 GB", memory=141e9, flops=_peaks("H200", 66.9e12), bandwidth=4.8e12,
        link=450e9, network=50e9, host=64e9, source="NVIDIA H200 datasheet 2024; DGX H200: 400 Gb/s a GPU",
    ),
    "b200": Device(
        name="B200 SXM 180 GB", memory=180e9, flops=_peaks("B200", 75e12), bandwidth=7.7e12,
        link=900e9, network=50e9, host=64e9, source="NVIDIA HGX B200 datasheet 2025; DGX B200: 400 Gb/s a GPU",
    ),
}  # fmt: skip
KINDS = (*DEVICES, "cpu")


def cpu_device(flops: float, bandwidth: float, dtype: str) -> Device:
    """Describe this machine: its memory, and rates that the caller measured; ranks share both, and speak through it.

    Args:
        flops: operations a second in `dtype`.
        bandwidth: bytes a second of a copy.
        dtype: of the training.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        name="this CPU", memory=memory, flops={dtype: flops}, bandwidth=bandwidth, link=bandwidth, network=bandwidth,
        host=bandwidth, source="measured now: a matrix product and a copy",
    )  # fmt: skip
