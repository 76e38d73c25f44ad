"""Parts of a patched model that are patched or unpatched by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_checks import allowed, distance, loss_of, outputs
from tiny_hf_families import NAMED
from tiny_hf_llava import llava, llava_batch

from fastmllm.compression import Placement, TopK
from fastmllm.hf import patch, unpatch
from fastmllm.hf.fusion import STATE, is_fused
from fastmllm.hf.rules import OPS

STAGE = Placement(stages=((1, TopK(0.5, scorer="last_row")),))


def shown(model):
    return outputs(model, llava_batch())[0]


@pytest.fixture(scope="module")
def expected():
    return shown(llava())


@pytest.mark.parametrize("order", ["inner first", "outer first"])
@pytest.mark.parametrize(
    "inner, outer",
    [(None, None), ("divprune:2", None), (None, "divprune:2"), (STAGE, STAGE)],
    ids=["plain", "compressed inside", "compressed outside", "stages"],
)
def test_an_inner_and_an_outer_patch_in_any_order(expected, inner, outer, order):
    model = llava()
    patch(model.model, compress=inner)
    report = patch(model, compress=outer)
    copied, short = copy.deepcopy(model), shown(model)
    assert (short.shape != expected.shape) == (outer is not None)
    for one in (model, copied):
        assert torch.equal(shown(one), short)
        first, last = (one.model, one) if order == "inner first" else (one, one.model)
        unpatch(first)
        torch.testing.assert_close(shown(one), expected)
        if one is model and outer is not None and first is one.model:
            assert any("was unpatched" in why for why in report.fallbacks()[""])
        unpatch(last)
        assert torch.equal(shown(one), expected)
        assert not any(is_fused(m) or any(n.startswith(STATE) for n in m.__dict__) for m in one.modules())


def test_a_head_takes_no_part_in_what_its_model_compresses_anew(expected):
    model = llava()
    patch(model, compress="divprune:2")
    patch(model.model, compress="divprune:3")
    inner = model.model.eval()(**{k: v for k, v in llava_batch().items() if k != "labels"})[0]
    assert shown(model).shape[1] == inner.shape[1] < expected.shape[1]
    patch(model, compress="divprune:2")
    assert shown(model).shape[1] < inner.shape[1]


def test_a_patch_of_a_part_that_fails_leaves_the_whole_as_it_was():
    model = llava()
    patch(model, compress="divprune:2")
    short = shown(model)
    with pytest.raises(ValueError, match="unknown method"):
        patch(model.model, compress="divprun:2")
    assert torch.equal(shown(model), short)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "blip_2"])
def test_any_part_may_be_unpatched(family):
    model, batch = NAMED[family].build(), NAMED[family].batch()
    wanted, loss = outputs(model, batch), loss_of(model, batch).detach()
    for name, part in list(model.named_modules()):
        patch(model, ops=OPS)
        if name and any(is_fused(m) for m in part.modules()):
            unpatch(part)
            assert distance(outputs(model, batch), wanted) <= 8 * allowed(0.0, torch.float32), name
            torch.testing.assert_close(loss_of(model, batch).detach(), loss, msg=name)
        unpatch(model)
