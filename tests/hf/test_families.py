"""Every family: a patched model is as near to fp64 as the unpatched one, and unpatching gives back the bits."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hf_checks import allowed, cast, distance, gradients, in_dtype, outputs, training, worst_parameter
from tiny_hf_families import FAMILIES

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused import norms
from fastmllm.hf.rules import OPS

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=FAMILIES, ids=repr, scope="module")
def family(request):
    return request.param


@pytest.fixture(autouse=True, scope="module")
def every_size():
    """Let the operators compute at sizes where a CPU would not gain from them: these models are tiny."""
    with pytest.MonkeyPatch.context() as change:
        change.setattr(norms, "FEW", {})
        yield


@cache
def built(family):
    return family.build()


@cache
def truth(family, what):
    return what(in_dtype(built(family), torch.float64), cast(family.batch(), torch.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("what", [outputs, gradients, training], ids=lambda f: f.__name__)
def test_as_near_to_fp64_as_unpatched(family, what, dtype):
    batch = cast(family.batch(), dtype)
    before = what(in_dtype(built(family), dtype), batch)
    model = in_dtype(built(family), dtype)
    report = patch(model, ops=OPS)
    assert {row.op for row in report.replaced} >= family.ops
    after = what(model, batch)
    assert not report.fallbacks(), "a call ran transformers' own code, so nothing was compared"
    expected = truth(family, what)
    if what is training:  # losses, then parameters
        for n in range(2):
            assert distance(after[n], expected[n]) <= allowed(distance(before[n], expected[n]), dtype)
    else:
        assert distance(after, expected) <= allowed(distance(before, expected), dtype)
    if what is gradients:
        assert worst_parameter(after, expected) <= allowed(worst_parameter(before, expected), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generates_the_same_tokens(family, dtype):
    if family.prompt is None:
        pytest.skip("a tower")
    model, prompt = in_dtype(built(family), dtype), cast(family.prompt(), dtype)
    said = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    patch(model, ops=OPS)
    assert torch.equal(model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False), said)


def test_unpatching_gives_back_the_bits(family):
    model, batch = in_dtype(built(family), torch.float32), family.batch()
    before, names = gradients(model, batch), list(model.state_dict())
    classes, attributes = [type(m) for m in model.modules()], [set(m.__dict__) for m in model.modules()]
    patch(model, ops=OPS)
    assert list(model.state_dict()) == names
    gradients(model, batch)
    unpatch(model)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    after = gradients(model, batch)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_what_is_faster_here_is_as_right(family):
    model, batch = in_dtype(built(family), torch.float32), family.batch()
    before, expected = outputs(model, batch), truth(family, outputs)
    report = patch(model)
    assert report.replaced or family.prompt is None, "of a tower, nothing may be faster on a CPU"
    assert distance(outputs(model, batch), expected) <= allowed(distance(before, expected), torch.float32)
