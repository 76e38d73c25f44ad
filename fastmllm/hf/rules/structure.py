"""What is right in any family: layers of torch, and norms whose numbers are checked when they are patched."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastmllm.hf.fused.norms import FusedLayerNorm, FusedRMSNorm
from fastmllm.hf.fused.patches import PatchConv
from fastmllm.hf.fusion import Fusion


def by_structure(module: Any) -> tuple[type[Fusion], ...]:
    """Return what a module may compute with by what it is, whatever model it stands in."""
    if type(module) is nn.LayerNorm:
        return (FusedLayerNorm,)
    if type(module) in (nn.Conv2d, nn.Conv3d) and module.stride == module.kernel_size and max(module.kernel_size) > 1:
        return (PatchConv,)
    if type(module).__name__.endswith("RMSNorm"):
        return (FusedRMSNorm,)
    return ()
