"""The MLP of a vision tower, and projectors like it: linear, GELU, linear as one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.hf.fusion import Fusion, agrees, hooked, outside_autocast, plain
from fastmllm.kernels.gelu_mlp import gelu_mlp

LINEARS = (("fc1", "fc2"), ("linear_1", "linear_2"), ("linear_fc1", "linear_fc2"))
ACTIVATIONS = ("activation_fn", "act", "act_fn", "activation")
NORMS = ("layer_norm", "projector_layernorm")
KINDS = {
    "GELUActivation": "none",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "NewGELUActivation": "tanh",
    "FastGELUActivation": "tanh",
    "QuickGELUActivation": "quick",
}
HOMES = ("transformers.activations", "torch.nn.modules.activation")  # where an activation of that name is meant


class GeluMLP(Fusion):
    """Two linear layers around a GELU, perhaps behind a norm, by the names that the tables above have."""

    op = "gelu_mlp"
    one_tensor = True

    @staticmethod
    def refuses(module: Any) -> str | None:
        parts = _parts(module)
        if parts is None:
            return "it has other parts than a linear layer, an activation and a linear layer"
        norm, first, act, second = parts
        if (why := _why_not(first, act, second)) is not None:
            return why
        if norm is not None and getattr(norm, "normalized_shape", None) != (first.in_features,):
            return f"its {type(norm).__name__} is of another width than its first linear layer"
        kind, device = _kind(act), first.weight.device
        for reach in (6.0, 300.0):  # the second finds activations that are clipped
            x = torch.linspace(-reach, reach, 101, device=device)[:, None]
            one = torch.ones(1, 1, device=device)
            if not agrees(gelu_mlp(x, one, None, one, None, str(kind)), type(act).forward(act, x)):
                return f"{type(act).__name__} is not the {kind} GELU that it is called"
        return None if _agrees(module, first) else "its numbers are not those of gelu_mlp"

    @staticmethod
    def slower(module: Any, device: torch.device, dtype: torch.dtype) -> str | None:
        # on CUDA: one launch instead of the bias's and the activation's passes over M x F, and the backward keeps one
        # tensor of that size instead of two
        return "oneDNN's products and torch's GELU are faster on a CPU" if device.type == "cpu" else None

    @staticmethod
    def unsupported(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        parts = _parts(module)
        if parts is None:
            return "its parts have been replaced since"
        _, first, act, second = parts
        if (why := _why_not(first, act, second)) is not None:
            return why
        mixed = x.dtype != first.weight.dtype and not torch.is_autocast_enabled(x.device.type)
        return f"x is {x.dtype}, its weight {first.weight.dtype}" if mixed else None

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        norm, first, act, second = _parts(module)  # type: ignore[misc]
        return outside_autocast(
            gelu_mlp, x if norm is None else norm(x), first.weight, first.bias, second.weight, second.bias,
            approximate=_kind(act),
        )  # fmt: skip


def _parts(module: Any) -> tuple[Any, Any, Any, Any] | None:
    """Return norm (or None), first linear layer, activation, second; None if there is anything else."""
    names = set(module._modules)
    linears = next((pair for pair in LINEARS if names.issuperset(pair)), None)
    act = next((name for name in ACTIVATIONS if name in names), None)
    norm = next((name for name in NORMS if name in names), None)
    if linears is None or act is None or names - {*linears, act, norm} or module._parameters or module._buffers:
        return None
    first, second = (module._modules[name] for name in linears)
    return module._modules[norm] if norm else None, first, module._modules[act], second


def _kind(act: Any) -> str | None:
    """Return the name that gelu_mlp has for an activation, or None."""
    if type(act).__module__ not in HOMES:
        return None
    return act.approximate if type(act) is nn.GELU else KINDS.get(type(act).__name__)


def _why_not(first: Any, act: Any, second: Any) -> str | None:
    """Say why these modules have to be called, or None."""
    if _kind(act) is None:
        return f"its activation is {type(act).__name__}"
    if hooked(act):
        return f"its {type(act).__name__} carries hooks"
    return plain(first, second)


@torch.no_grad()
def _agrees(module: Any, first: Any) -> bool:
    width = first.in_features
    x = torch.arange(3 * width, device=first.weight.device).sin().view(3, width).to(first.weight.dtype)
    ours = GeluMLP.forward(module, type(module).forward, x)
    return agrees(ours, type(module).forward(module, x))
