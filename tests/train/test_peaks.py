from __future__ import annotations

import pytest
import torch

from fastmllm.train.peaks import own_peak, peak_tflops


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA GeForce RTX 4090", None),
    ],
)  # fmt: skip
def test_a_device_has_its_own_peak_or_none(name: str, peak: float | None) -> None:
    assert peak_tflops(name, "bfloat16") == peak
    assert peak_tflops(name, "float32") is None


def test_a_cpu_has_none() -> None:
    assert own_peak(torch.device("cpu"), "bfloat16") is None
