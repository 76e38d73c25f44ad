"""The index: every public operator, one line each."""

from fastmllm.kernels.layer_norm import layer_norm

__all__ = ["layer_norm"]
