"""Learned queries that read images."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_checks import allowed, distance
from tiny_hf import draw
from tiny_hf_fusion import blip2, idefics, instructblip

from fastmllm.hf import patch
from fastmllm.hf.fused.latent_attention import AddNorm, PerceiverAttention, QFormerCrossAttention


def judged(module, call, ops, dtype):
    """Hold outputs and gradients of a patched module to fp64."""
    results = []
    for one, precision in ((module, torch.float64), (module, dtype), (patched(module, ops), dtype)):
        one = copy.deepcopy(one).to(precision)
        inputs = [draw(*shape, seed=n).to(dtype).to(precision).requires_grad_() for n, shape in enumerate(call)]
        y = one(inputs)
        y.backward(draw(*y.shape, seed=9).to(dtype).to(precision))
        results.append(
            [y.detach(), *(t.grad for t in inputs), *(p.grad for p in one.parameters() if p.grad is not None)]
        )
    truth, before, after = results
    for part in (slice(1), slice(1, None)):  # a bias in front of a softmax has no gradient: one scale for all of them
        assert distance(after[part], truth[part]) <= allowed(distance(before[part], truth[part]), dtype)


def patched(module, ops):
    fused = copy.deepcopy(module)
    report = patch(fused, ops=ops)
    assert report.replaced
    return fused


class Called(torch.nn.Module):
    """A module under the arguments that its model gives it."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, inputs):
        return self.call(self.module, *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", [True, False])
def test_perceiver(norms, dtype):
    attention = idefics().model.perceiver_resampler.blocks[0][0]
    attention.qk_layer_norms = norms
    module = Called(attention, lambda attention, image, latents: attention(image, latents))
    judged(module, [(3, 17, 32), (3, 4, 32)], ["attention"], dtype)


def test_perceiver_under_autocast():
    model = idefics().model.perceiver_resampler
    x = draw(2, 17, 32)
    for attention, _ in model.blocks:  # a GPU's autocast normalises in fp32, a CPU's does not
        for norm in (attention.q_layer_norm, attention.k_layer_norm):
            norm.register_forward_hook(lambda module, args, result: result.float())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        expected = model(x)
        patch(model, ops=["attention"])
        torch.testing.assert_close(model(x), expected, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("build", [blip2, instructblip])
def test_qformer(build, dtype):
    layer = build().qformer.encoder.layer[0]

    def read(layer, queries, image):
        return layer(queries, encoder_hidden_states=image, query_length=5)

    judged(Called(layer, read), [(2, 5, 24), (2, 17, 32)], ["attention", "layer_norm"], dtype)


def crossing(model):
    return model.qformer.encoder.layer[0].crossattention.attention


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda a, k: k.update(encoder_attention_mask=torch.zeros(2, 1, 5, 17)), "a mask over the image"),
        (lambda a, k: k.update(hidden_states=draw(1, 5, 24).expand(2, -1, -1)[:1]), "one image for several samples"),
        (lambda a, k: setattr(a.config, "_attn_implementation", "eager"), "eager attention was asked for"),
        (lambda a, k: setattr(a.train(), "attention_dropout", 0.1), "dropout in training"),
    ],
)
def test_what_the_operator_cannot_do_runs_transformers(change, reason):
    attention = crossing(blip2())
    arguments = {"hidden_states": draw(2, 5, 24), "encoder_hidden_states": draw(2, 17, 32)}
    change(attention, arguments)
    torch.manual_seed(0)
    expected = attention(**arguments)
    report = patch(attention, ops=["attention"])
    torch.manual_seed(0)
    found = attention(**arguments)
    assert torch.equal(found[0], expected[0])
    assert (found[1] is None) == (expected[1] is None)
    assert report.fallbacks()[""] == {f"attention: {reason}": 1}


def test_a_hook_on_the_norm_is_called():
    model = blip2()
    output = model.qformer.encoder.layer[0].attention.output
    x, y = draw(2, 5, 24), draw(2, 5, 24, seed=2)
    report = patch(output, ops=["layer_norm"])
    output.LayerNorm.register_forward_hook(lambda module, args, result: result * 0)
    assert not output(x, y).any()
    assert list(report.fallbacks()[""].values()) == [1]


def test_what_no_operator_takes_is_left():
    perceiver, crossed = idefics().model.perceiver_resampler.blocks[0][0], crossing(blip2())
    output = blip2().qformer.encoder.layer[0].attention.output
    assert [f.refuses(m) for f, m in ((PerceiverAttention, perceiver), (QFormerCrossAttention, crossed))] == [None] * 2
    perceiver.head_dim = crossed.attention_head_size = 320
    assert "320 wide" in PerceiverAttention.refuses(perceiver)
    assert "320 wide" in QFormerCrossAttention.refuses(crossed)
    output.LayerNorm = torch.nn.LayerNorm(24, elementwise_affine=False)
    assert "its norm is" in AddNorm.refuses(output)


def test_what_is_slower_is_left_by_default():
    assert not {row.op for row in patch(blip2()).replaced} & {"attention", "layer_norm"}
    assert "attention" in {row.op for row in patch(idefics()).replaced}
    assert "attention" not in {row.op for row in patch(idefics().bfloat16()).replaced}
