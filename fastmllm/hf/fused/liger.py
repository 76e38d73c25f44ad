"""The gated MLP of a language model with Liger's kernels, where liger-kernel is installed (arXiv 2410.10989).

Liger's own `apply_liger_kernel_to_*` replace functions and classes for all models of a process; here its autograd
functions work on the modules of one model.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastmllm.hf.fused.mlp import HOMES
from fastmllm.hf.fusion import Fusion, agrees, hooked

DEVICE = "cuda"
WIDEST = 65536  # columns that one program of Liger's takes
PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


class GatedMLP(Fusion):
    """`down_proj(act(gate_proj(x)) * up_proj(x))` with SiLU or tanh-GELU; all projections are called."""

    op = "gated_mlp"
    one_tensor = True

    @staticmethod
    def absent(device: torch.device) -> str | None:
        if importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        return None if device.type == DEVICE else "Liger computes on CUDA"

    @staticmethod
    def refuses(module: Any) -> str | None:
        if set(module._modules) != PARTS or module._parameters:
            return f"it has other parts than {sorted(PARTS)}"
        kind = _kind(module.act_fn)
        if kind is None:
            return f"its activation is {type(module.act_fn).__name__}"
        x = torch.linspace(-6.0, 6.0, 101)
        expected = nn.functional.silu(x) if kind == "silu" else nn.functional.gelu(x, approximate="tanh")
        if not agrees(expected, type(module.act_fn).forward(module.act_fn, x)):
            return f"{type(module.act_fn).__name__} is not the {kind} that it is called"
        return None

    @staticmethod
    def unsupported(module: Any, x: Tensor, *args: Any, **kwargs: Any) -> str | None:
        if x.device.type != DEVICE:
            return "Liger computes on CUDA"
        if torch.compiler.is_compiling():
            return "torch.compile fuses it"
        act = module.act_fn
        if _kind(act) is None or hooked(act):
            return "its activation has been replaced, or carries hooks"
        if module.gate_proj._forward_hooks or module.up_proj._forward_hooks:
            return "hooks see outputs that Liger's backward overwrites"
        return None

    @staticmethod
    def forward(module: Any, original: Callable[..., Tensor], x: Tensor) -> Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        if gate.shape != up.shape or gate.dtype != up.dtype or gate.shape[-1] > WIDEST or not gate.numel():
            return module.down_proj(module.act_fn(gate) * up)
        return module.down_proj(_function(str(_kind(module.act_fn))).apply(gate, up))

    @staticmethod
    def backend(device: torch.device) -> str:
        return "liger"


@functools.cache
def _function(kind: str) -> Any:
    """Return Liger's function for an activation, which here may be run backward again."""
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    liger = LigerSiLUMulFunction if kind == "silu" else LigerGELUMulFunction

    class Multiply(liger):  # type: ignore[misc, valid-type]
        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Any:
            # it writes the gradients over what it has saved: a second backward would go on from those
            again = torch._C._autograd._get_current_graph_task_keep_graph()
            return liger.backward(_Copies(ctx) if again else ctx, grad)

    return Multiply


class _Copies:
    """A context of autograd whose saved tensors may be overwritten."""

    def __init__(self, ctx: Any) -> None:
        self._ctx, self.saved_tensors = ctx, tuple(t.clone() for t in ctx.saved_tensors)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _kind(act: Any) -> str | None:
    if type(act).__module__ not in HOMES:
        return None
    name = type(act).__name__
    if name in ("SiLUActivation", "SiLU"):
        return "silu"
    return "gelu" if name in ("GELUTanh", "PytorchGELUTanh") else None
