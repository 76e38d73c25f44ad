"""Towers whose attention stays transformers'."""

from __future__ import annotations

import pytest
from tiny_hf_families import NAMED

from fastmllm.hf import patch
from fastmllm.hf.rules.dense import WHY, dense_attention

LAYERS = {
    "blip_2": 2, "clip": 2, "dinov2": 2, "idefics": 2, "idefics2": 2, "idefics3": 2, "internvl": 2, "mllama": 3,
    "siglip": 2, "smolvlm": 2,
}  # fmt: skip


@pytest.mark.parametrize("family", LAYERS)
def test_the_report_says_why_each_layer_keeps_its_attention(family):
    model = NAMED[family].build()
    layers = dense_attention(model)
    assert len(layers) >= LAYERS[family]
    said = {row.module: row for row in patch(model).left if row.reason == WHY}
    assert list(said) == [name for name, _ in layers]
    assert not any(row.refused for row in said.values())


def test_asked_for_by_name_it_is_no_operator():
    report = patch(NAMED["clip"].build(), ops=["gelu_mlp"])
    assert not any(row.reason == WHY for row in report.rows)
