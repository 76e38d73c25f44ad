from __future__ import annotations

from fastmllm.train.devices import DEVICES, cpu_device
from fastmllm.train.peaks import peak_tflops


def test_plans_and_meters_divide_by_the_same_peak() -> None:
    for device in DEVICES.values():
        assert device.flops["bfloat16"] == 1e12 * (peak_tflops(device.name, "bfloat16") or 0)
        assert device.flops["float32"] < device.flops["bfloat16"] / 10
        assert device.network < device.link < device.bandwidth
        assert device.source


def test_this_machine_has_its_own_memory() -> None:
    cpu = cpu_device(1e11, 1e10, "float32")
    assert cpu.memory > 1e9
    assert cpu.flops == {"float32": 1e11}
