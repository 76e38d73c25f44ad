"""A norm by its name."""

from __future__ import annotations

import pytest

from fastmllm.modules.layer_norm import LayerNorm
from fastmllm.modules.norms import make_norm
from fastmllm.modules.rms_norm import RMSNorm


def test_a_norm_by_its_name() -> None:
    layer, rms = make_norm("layer", 4, 1e-5), make_norm("rms", 4, 1e-3)
    assert isinstance(layer, LayerNorm)
    assert isinstance(rms, RMSNorm)
    assert (layer.eps, rms.eps) == (1e-5, 1e-3)
    with pytest.raises(ValueError, match="'batch' must be one of"):
        make_norm("batch", 4, 1e-5)
