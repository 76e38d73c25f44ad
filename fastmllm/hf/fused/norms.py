"""LayerNorm, and RMSNorm as Llama, Qwen, Mistral (weight around 1) or Gemma (around 0) store it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fusion import Fusion, agrees
from fastmllm.kernels import _native
from fastmllm.kernels.layer_norm import layer_norm
from fastmllm.kernels.rms_norm import rms_norm

# numbers below which autograd's call of an operator costs more on a CPU than the six of torch that it replaces
FEW = {torch.float32: 12288, torch.bfloat16: 4096, torch.float16: 4096}


class FusedLayerNorm(Fusion):
    """nn.LayerNorm over the last dimension."""

    op = "layer_norm"
    one_tensor = True

    @staticmethod
    def refuses(module: Any) -> str | None:
        assert isinstance(module, nn.LayerNorm)
        if len(module.normalized_shape) != 1 or module.weight is None:
            return f"it normalises {module.normalized_shape} with weight {module.weight is not None}"
        return None

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        return "torch's own is as fast on a CPU" if device.type == "cpu" else None

    @staticmethod
    def unsupported(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        if x.dtype != module.weight.dtype:
            return f"x is {x.dtype}, its weight {module.weight.dtype}"
        if x.dtype != torch.float32 and torch.is_autocast_enabled(x.device.type):
            return "autocast lets torch return fp32"
        return None

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        return layer_norm(x, module.weight, module.bias, eps=module.eps)  # type: ignore[return-value]


class FusedRMSNorm(Fusion):
    """A class whose name ends in RMSNorm, whose numbers are found to be those of `rms_norm` with offset 0 or 1."""

    op = "rms_norm"
    one_tensor = True

    @staticmethod
    def refuses(module: Any) -> str | None:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or len(list(module.parameters())) != 1:
            return "it has other parameters than one weight"
        if _eps(module) is None:
            return "it has no epsilon that we know the name of"
        if _agrees(module, weight):
            return None
        return "its numbers are not those of rms_norm" + (
            ", fp32 inside of fp64" if weight.dtype == torch.float64 else ""
        )

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        if device.type == "cpu" and _native.EXTENSION_MISSING:
            return "the C++ operators are not built"
        return None

    @staticmethod
    def unsupported(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        return None if x.dtype == module.weight.dtype else f"x is {x.dtype}, its weight {module.weight.dtype}"

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        if _few(x):
            return original(module, x)
        return rms_norm(x, module.weight, eps=_eps(module), offset=_offset(module))  # type: ignore

    @staticmethod
    def backend(device: torch.device) -> str:
        return "triton" if device.type == "cuda" else "torch" if _native.EXTENSION_MISSING else "C++"


def _few(x: Tensor) -> bool:
    if not torch.is_grad_enabled() or x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return x.numel() < FEW.get(x.dtype, 0)


def _eps(module: Any) -> float | None:
    kept = module.__dict__  # a name that a module lacks is slow to ask for
    return kept["variance_epsilon"] if "variance_epsilon" in kept else kept.get("eps")


def _offset(module: Any) -> float:
    return 1.0 if type(module).__name__.startswith("Gemma") else 0.0


@torch.no_grad()
def _agrees(module: Any, weight: Tensor) -> bool:
    """Compare on a twin with weights of its own (ZeRO-3 may hold the module's), in 2, 3 and 4 dimensions."""
    (width,) = getattr(weight, "ds_shape", weight.shape)
    twin = object.__new__(type(module))
    scale = torch.arange(width).cos().add(1.5).to(weight.dtype)
    twin.__dict__.update({**module.__dict__, "_parameters": {"weight": scale}})
    sizes = torch.tensor([[1.0], [1e-3], [30.0]])  # of which one is near the epsilon
    for shape in ((3,), (2, 3), (2, 2, 3)):
        rows = torch.arange(width * 3 * 2 ** (len(shape) - 1)).sin().view(*shape, width)  # no random number is drawn
        x = (rows * sizes).to(weight.dtype)
        ours = rms_norm(x, scale, eps=_eps(module), offset=_offset(module))  # type: ignore[arg-type]
        if not agrees(ours, type(module).forward(twin, x)):  # type: ignore[arg-type]
            return False
    return True
