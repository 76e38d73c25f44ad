"""Perceiver resamplers: OpenFlamingo from its formula in fp64, Idefics and Idefics2 against transformers."""

from __future__ import annotations

import cross_layers as shared
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Idefics2Config, IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from fastmllm.models.weights.fusion import (
    IDEFICS2_CONNECTOR,
    IDEFICS_RESAMPLER,
    idefics2_resampler_config,
    idefics_resampler_config,
)
from fastmllm.models.weights.mapping import Rule, fill, to_ours
from fastmllm.modules.resampler import PerceiverResampler, ResamplerConfig

D, L = 24, 4
COUNTS = (5, 3, 6)  # tokens of each image
CONFIGS = {
    "flamingo": ResamplerConfig.flamingo(width=D, num_latents=L, depth=2, num_heads=2, head_dim=8),
    "idefics": ResamplerConfig.idefics(width=D, num_latents=L, depth=2, num_heads=3, head_dim=4),
    "idefics-qk": ResamplerConfig.idefics(width=D, num_latents=L, depth=2, num_heads=3, head_dim=4, qk_norm=True),
    "idefics2": ResamplerConfig.idefics2(
        width=D, num_latents=L, depth=2, num_heads=4, num_kv_heads=2, head_dim=6, media_width=10, projection_width=14
    ),
}


def build(config: ResamplerConfig) -> PerceiverResampler:
    model = shared.redraw(PerceiverResampler(config))
    assert isinstance(model, PerceiverResampler)
    return model


def batch(config: ResamplerConfig, counts: tuple[int, ...] = COUNTS) -> tuple[Tensor, Tensor, int]:
    media = torch.randn(sum(counts), config.media_width or config.width, generator=torch.Generator().manual_seed(1))
    return media, torch.tensor([0, *counts]).cumsum(0).int(), max(counts, default=0)


@pytest.fixture(params=list(CONFIGS))
def config(request: pytest.FixtureRequest) -> ResamplerConfig:
    return CONFIGS[request.param]


# equal to the source --------------------------------------------------------------------------------------------------
def openflamingo(model: PerceiverResampler, media: Tensor, frames: Tensor | None, place: int) -> Tensor:
    """Restate helpers.py of OpenFlamingo in fp64 for one image: media (n, D), its frames (n,), its place."""
    p = {n: t.double() for n, t in model.named_parameters()}
    config, x = model.config, media.double()
    if frames is not None:
        x = x + p["frame_embedding"][frames] + p["media_embedding"][place]

    def norm(t: Tensor, name: str) -> Tensor:
        return F.layer_norm(t, (D,), p[f"{name}.weight"], p[f"{name}.bias"])

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (config.num_heads, config.head_dim)).transpose(0, 1)

    latents = p["latents"]
    for i in range(config.depth):
        at = f"layers.{i}."
        y = norm(latents, at + "latents_norm")
        kv = torch.cat([norm(x, at + "media_norm"), y]) @ p[at + "kv_proj.weight"].T
        q, k, v = (heads(t) for t in (y @ p[at + "q_proj.weight"].T, *kv.chunk(2, -1)))
        weights = (q * config.head_dim**-0.5 @ k.transpose(1, 2)).softmax(-1)
        latents = latents + (weights @ v).transpose(0, 1).flatten(1) @ p[at + "o_proj.weight"].T
        y = F.gelu(norm(latents, at + "ffn_norm") @ p[at + "ffn.weight1"].T) @ p[at + "ffn.weight2"].T
        latents = latents + y
    return norm(latents, "norm")


@pytest.mark.parametrize("embeddings", [False, True])
def test_equals_openflamingo(embeddings: bool) -> None:
    sizes = {"max_frames": 3, "max_media": 2} if embeddings else {}
    model = build(ResamplerConfig.flamingo(width=D, num_latents=L, depth=2, num_heads=2, head_dim=8, **sizes))
    media, cu, longest = batch(model.config)
    media.requires_grad_()
    frames = torch.tensor([0, 0, 1, 1, 2, 0, 1, 2, 0, 0, 0, 1, 1, 1]) if embeddings else None
    at = (0, 1, 0)  # two images of the first sample, one of the second
    places = torch.tensor(at).repeat_interleave(torch.tensor(COUNTS)) if embeddings else None
    mine = model(media, cu, longest, frames=frames, places=places)
    apart = zip(media.split(COUNTS), [None] * 3 if frames is None else frames.split(COUNTS), at, strict=True)
    theirs = torch.cat([openflamingo(model, *one) for one in apart])
    shared.assert_close(mine, theirs)
    inputs = [media, *model.parameters()]
    weight = torch.randn(mine.shape)
    got = torch.autograd.grad((mine * weight).sum(), inputs)
    shared.assert_gradients_close(list(got), list(torch.autograd.grad((theirs * weight).sum(), inputs)))


def check_equal(model: PerceiverResampler, oracle: nn.Module, rules: list[Rule], mine: Tensor, theirs: Tensor) -> None:
    """Assert equal results and gradients; the oracle's are translated by the same table as its weights."""
    shared.assert_close(mine, theirs)
    weight = torch.randn(mine.shape)
    (mine * weight).sum().backward()
    (theirs * weight).sum().backward()
    wanted, _ = to_ours({n: p.grad for n, p in oracle.named_parameters()}, rules, "the oracle")
    own = dict(model.named_parameters())
    assert own.keys() == wanted.keys()
    shared.assert_gradients_close([own[n].grad for n in own], [wanted[n] for n in own])


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(qk_norm: bool) -> None:
    raw = {
        "use_resampler": True, "vision_config": {"embed_dim": D},
        "perceiver_config": {"resampler_n_latents": L, "resampler_depth": 2, "resampler_n_heads": 3,
                             "resampler_head_dim": 4, "qk_layer_norms_perceiver": qk_norm},
    }  # fmt: skip
    config = idefics_resampler_config(raw)
    assert config == CONFIGS["idefics-qk" if qk_norm else "idefics"]
    oracle = shared.redraw(IdeficsPerceiverResampler(IdeficsConfig(**raw), D, 2, 3, 4, L))
    model = PerceiverResampler(config)
    fill(model, to_ours({n: t.clone() for n, t in oracle.state_dict().items()}, IDEFICS_RESAMPLER, "o")[0], "o")
    media, cu, longest = batch(config)
    theirs = torch.cat([oracle(image[None])[0] for image in media.split(COUNTS)])
    check_equal(model, oracle, IDEFICS_RESAMPLER, model(media, cu, longest), theirs)


def test_equals_idefics2_connector() -> None:
    raw = {
        "vision_config": {"hidden_size": 10, "num_attention_heads": 2},
        "text_config": {"model_type": "mistral", "hidden_size": D, "intermediate_size": 14, "num_attention_heads": 4},
        "perceiver_config": {"hidden_size": D, "resampler_n_latents": L, "resampler_depth": 2, "resampler_n_heads": 4,
                             "resampler_head_dim": 6, "num_key_value_heads": 2},
    }  # fmt: skip
    config = idefics2_resampler_config(raw)
    assert config == CONFIGS["idefics2"]
    oracle_config = Idefics2Config(**raw)
    oracle_config.perceiver_config._attn_implementation = "eager"
    oracle = shared.redraw(Idefics2Connector(oracle_config))
    model = PerceiverResampler(config)
    fill(model, to_ours({n: t.clone() for n, t in oracle.state_dict().items()}, IDEFICS2_CONNECTOR, "o")[0], "o")
    media, cu, longest = batch(config)
    padded = nn.utils.rnn.pad_sequence(media.split(COUNTS), batch_first=True)
    mask = torch.arange(longest) < torch.tensor(COUNTS)[:, None]
    theirs = oracle(padded, mask).flatten(0, 1)  # images of different sizes: theirs are padded, ours are not
    check_equal(model, oracle, IDEFICS2_CONNECTOR, model(media, cu, longest), theirs)


def test_idefics2_takes_width_and_eps_from_another_text_model() -> None:
    for text in ({"model_type": "mistral", "hidden_size": 48, "rms_norm_eps": 1e-4}, {"hidden_size": 48}):
        raw = {"text_config": {"model_type": "mistral", **text}, "perceiver_config": {"hidden_size": 24}}
        perceiver = Idefics2Config(**raw).perceiver_config
        config = idefics2_resampler_config(raw)
        assert (config.width, config.norm_eps) == (perceiver.hidden_size, perceiver.rms_norm_eps)


# what holds for every variant -----------------------------------------------------------------------------------------
def test_an_image_does_not_depend_on_its_neighbours(config: ResamplerConfig) -> None:
    model = build(config)
    media, cu, longest = batch(config)
    media.requires_grad_()
    whole = model(media, cu, longest)
    alone = torch.cat([model(m, torch.tensor([0, n], dtype=torch.int32), n)
                       for m, n in zip(media.split(COUNTS), COUNTS, strict=True)])  # fmt: skip
    shared.assert_close(alone, whole, 2e-6)
    weight, inputs = torch.randn(whole.shape), [media, *model.parameters()]
    want, got = (torch.autograd.grad((t * weight).sum(), inputs) for t in (whole, alone))
    shared.assert_gradients_close(list(got), list(want), 2e-6)
    other = media.detach().clone()
    other[5:8] += 1
    moved = (model(other, cu, longest) != whole).any(-1).unflatten(0, (3, L)).any(-1)
    assert moved.tolist() == [False, True, False]


def test_no_image_and_an_image_without_tokens(config: ResamplerConfig) -> None:
    model = build(config)
    media, cu, longest = batch(config)
    y = model(*batch(config, ()))
    assert y.shape == (0, D)
    y.sum().backward()
    empty = torch.tensor([0, 5, 8, 8, 14], dtype=torch.int32)  # the third sees its own latents only
    whole = model(media, empty, longest).unflatten(0, (4, L))
    shared.assert_close(whole[[0, 1, 3]].flatten(0, 1), model(media, cu, longest), 2e-6)
    assert whole.isfinite().all()


def test_gradients_reach_media_and_every_parameter(config: ResamplerConfig) -> None:
    model = build(config)
    media, cu, longest = batch(config)
    y = model(media.requires_grad_(), cu, longest)
    (y * torch.randn_like(y)).sum().backward()
    assert (media.grad.abs().sum(-1) > 0).all()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


def test_bfloat16_follows_float32(config: ResamplerConfig) -> None:
    torch.manual_seed(0)
    model = PerceiverResampler(config)
    media, cu, longest = batch(config)
    with torch.no_grad():
        expected = model(media, cu, longest)
        y = model.bfloat16()(media.bfloat16(), cu, longest)
    assert y.dtype == torch.bfloat16
    assert ((y.float() - expected).norm() / expected.norm()).item() < 0.03


def test_rejects_what_does_not_fit() -> None:
    config = CONFIGS["flamingo"]
    model = build(config)
    media, cu, longest = batch(config)
    with pytest.raises(ValueError, match="media must be packed"):
        model(media[:, :5], cu, longest)
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        model(media, cu[None], longest)
    with pytest.raises(ValueError, match=r"frames goes with .*no such embedding"):
        model(media, cu, longest, frames=torch.zeros(14, dtype=torch.long))
    framed = build(ResamplerConfig.flamingo(width=D, num_latents=L, depth=1, max_frames=2))
    with pytest.raises(ValueError, match=r"frames goes with .*missing"):
        framed(media, cu, longest)
    with pytest.raises(ValueError, match=r"frames \(3,\) must name each of the 14 tokens"):
        framed(media, cu, longest, frames=torch.zeros(3, dtype=torch.long))
    for change, message in (
        ({"num_latents": 0}, "num_latents must be >= 1, got 0"),
        ({"max_frames": -1}, "not negative"),
    ):
        with pytest.raises(ValueError, match=message):
            ResamplerConfig.flamingo(width=8, **change)
    for change, message in (
        ({"num_kv_heads": 3}, "no multiple of num_kv_heads 3"),
        ({"media_width": 4}, "need a projection_width"),
    ):
        with pytest.raises(ValueError, match=message):
            ResamplerConfig.idefics2(width=8, **change)
