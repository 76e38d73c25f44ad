"""LayerNorm or RMSNorm, by the name that a configuration gives."""

from __future__ import annotations

from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.rms_norm import RMSNorm

_NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"layer": LayerNorm, "rms": RMSNorm}


def make_norm(kind: str, width: int, eps: float) -> LayerNorm | RMSNorm:
    """Make the norm that a configuration names.

    Args:
        kind: "layer" or "rms".
        width: size of the last dimension.
        eps: added to the variance or mean square.

    Returns:
        The norm.

    Raises:
        ValueError: another kind.
    """
    if kind not in _NORMS:
        raise ValueError(f"make_norm: {kind!r} must be one of {sorted(_NORMS)}")
    return _NORMS[kind](width, eps)
