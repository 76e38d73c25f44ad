"""Gated cross-attention: OpenFlamingo from its formula in fp64, Idefics and Llama-3.2-Vision against transformers."""

from __future__ import annotations

import cross_layers as shared
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

from fastmllm.models.weights.fusion import MLLAMA_CROSS, idefics_cross_config, idefics_cross_rules, mllama_cross_config
from fastmllm.models.weights.mapping import fill, to_ours
from fastmllm.modules.cross_attention import CrossAttentionConfig, GatedCrossAttention

D, DM = 24, 16
CONFIGS = {
    "flamingo": CrossAttentionConfig.flamingo(width=D, media_width=DM, num_heads=2, head_dim=8),
    "idefics": CrossAttentionConfig.idefics(width=D, media_width=DM, num_heads=3, ffn_width=20),
    "idefics-qk-vector": CrossAttentionConfig.idefics(
        width=D, media_width=DM, num_heads=3, ffn_width=20, qk_norm=True, channel_gates=True
    ),
    "mllama": CrossAttentionConfig.mllama(width=D, num_heads=4, num_kv_heads=2, ffn_width=20),
}


def build(name: str) -> GatedCrossAttention:
    layer = shared.redraw(GatedCrossAttention(CONFIGS[name]))
    assert isinstance(layer, GatedCrossAttention)
    return layer


@pytest.fixture(params=list(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _inputs(name: str, policy: str = "latest") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return shared.batch(D, CONFIGS[name].media_width, policy)


# equal to the source --------------------------------------------------------------------------------------------------
def openflamingo(layer: GatedCrossAttention, x: Tensor, media: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Restate helpers.py of OpenFlamingo in fp64: masked scores, softmax, rows without media zeroed after it."""
    p = {n: t.double() for n, t in layer.named_parameters()}
    x, media, config = x.double(), media.double(), layer.config

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (config.num_heads, config.head_dim)).transpose(0, 1)  # (H, ., Dh)

    q = heads(F.layer_norm(x, (D,), p["norm.weight"], p["norm.bias"]) @ p["q_proj.weight"].T)
    k, v = (heads(t) for t in (media @ p["kv_proj.weight"].T).chunk(2, -1))
    seen = shared.dense_mask(start, stop, len(media))
    scores = (q * config.head_dim**-0.5 @ k.transpose(1, 2)).masked_fill(~seen, -torch.finfo(x.dtype).max)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1)[None, :, None], 0.0)
    y = (weights @ v).transpose(0, 1).flatten(1) @ p["o_proj.weight"].T
    x = y * p["attn_gate"].tanh() + x
    y = F.layer_norm(x, (D,), p["ffn_norm_weight"], p["ffn_norm_bias"])
    return F.gelu(y @ p["ffn.weight1"].T) @ p["ffn.weight2"].T * p["ffn_gate"].tanh() + x


@pytest.mark.parametrize("policy", ["latest", "all_previous"])
def test_equals_openflamingo(policy: str) -> None:
    layer = build("flamingo")
    x, media, start, stop = _inputs("flamingo", policy)
    own = {n: [p] for n, p in layer.named_parameters()}
    shared.check_equal(layer, lambda a, b: openflamingo(layer, a, b, start, stop), own, (x, media, start, stop))


_NAMES = {
    "norm.weight": ["input_layernorm.weight"],
    "q_proj.weight": ["cross_attn.q_proj.weight"],
    "kv_proj.weight": ["cross_attn.k_proj.weight", "cross_attn.v_proj.weight"],
    "o_proj.weight": ["cross_attn.o_proj.weight"],
    "ffn_norm_weight": ["post_attention_layernorm.weight"],
    **{f"ffn.{n}_proj.weight": [f"mlp.{n}_proj.weight"] for n in ("gate", "up", "down")},
}


def _additive(start: Tensor, stop: Tensor, keys: int) -> Tensor:
    """Return the mask (1, 1, T, N) that a padded model adds to its scores."""
    seen = shared.dense_mask(start, stop, keys)
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("variant", ["idefics", "idefics-qk-vector"])
def test_equals_idefics(variant: str) -> None:
    config = CONFIGS[variant]
    raw = {
        "hidden_size": D, "num_attention_heads": 3, "intermediate_size": 20, "qk_layer_norms": config.qk_norm,
        "alpha_type": "vector" if config.channel_gates else "float", "vision_config": {"embed_dim": DM},
    }  # fmt: skip
    assert idefics_cross_config(raw) == config
    oracle = shared.redraw(IdeficsGatedCrossAttentionLayer(IdeficsConfig(**raw, attn_implementation="eager"), 0))
    layer = GatedCrossAttention(config)
    state, _ = to_ours(oracle.state_dict(), idefics_cross_rules(config), "the oracle")
    fill(layer, {n: t.clone() for n, t in state.items()}, "the oracle")
    x, media, start, stop = _inputs(variant, "all_previous")
    mask, gate = _additive(start, stop, len(media)), (start < stop)[None].float()

    def theirs(x: Tensor, media: Tensor) -> Tensor:
        return oracle(x[None], image_hidden_states=media[None], image_attention_mask=mask, cross_attention_gate=gate)[0]

    names = {**_NAMES, "attn_gate": ["alpha_cross_attn"], "ffn_gate": ["alpha_dense"]}
    if config.qk_norm:
        names |= {f"{n}_norm.weight": [f"cross_attn.{n}_layer_norm.weight"] for n in "qk"}
    parameters = dict(oracle.named_parameters())
    ordered = {n: [parameters[t] for t in names[n]] for n, _ in layer.named_parameters()}
    shared.check_equal(layer, theirs, ordered, (x, media, start, stop))


def _mllama() -> tuple[GatedCrossAttention, MllamaCrossAttentionDecoderLayer]:
    raw = {"hidden_size": D, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}
    config = mllama_cross_config(raw)
    assert config == CONFIGS["mllama"]
    oracle_config = MllamaTextConfig(**raw, num_hidden_layers=2, cross_attention_layers=[0], pad_token_id=0)
    oracle_config._attn_implementation = "eager"
    oracle = shared.redraw(MllamaCrossAttentionDecoderLayer(oracle_config, 0))
    layer = GatedCrossAttention(config)
    state, _ = to_ours(oracle.state_dict(), MLLAMA_CROSS, "the oracle")
    fill(layer, {n: t.clone() for n, t in state.items()}, "the oracle")
    return layer, oracle


def _run_mllama(oracle: MllamaCrossAttentionDecoderLayer, x: Tensor, media: Tensor, start: Tensor, stop: Tensor):
    full = (start < stop).float()[None, None, :, None]
    return oracle(  # as `_prepare_cross_attention_mask` does it: the mask of a row that sees nothing is cleared
        x[None], cross_attention_states=media[None], cross_attention_mask=_additive(start, stop, len(media)) * full,
        attention_mask=None, full_text_row_masked_out_mask=full,
    )[0]  # fmt: skip


def test_equals_mllama_on_rows_that_see_an_image() -> None:
    layer, oracle = _mllama()
    x, media, start, stop = _inputs("mllama", "all_previous")
    names = {**_NAMES, "attn_gate": ["cross_attn_attn_gate"], "ffn_gate": ["cross_attn_mlp_gate"]}
    names |= {f"{n}_norm.weight": [f"cross_attn.{n}_norm.weight"] for n in "qk"}
    parameters = dict(oracle.named_parameters())
    ordered = {n: [parameters[t] for t in names[n]] for n, _ in layer.named_parameters()}
    shared.check_equal(
        layer, lambda a, b: _run_mllama(oracle, a, b, start, stop), ordered, (x, media, start, stop), start < stop
    )


def test_mllama_rows_before_the_first_image_do_not_see_it() -> None:
    # transformers 5.23.0 clears the mask of a row that sees no image and zeroes its feed-forward only, so that the row
    # attends to every image of its sample, later ones too: with the weights of this test, changing the second image of
    # the first sample moves its rows 0 and 1 by 1.6 and 1.3, changing both by 3.8 and 4.0 (its rows 2 and 3, which do
    # see the first image, the second one does not move). Meta's code (llama-models, CrossAttention and
    # CrossAttentionTransformerBlock) multiplies the attention's output and the feed-forward with the mask: such a row
    # leaves as it came. transformers issue 39379.
    layer, _ = _mllama()
    x, media, start, stop = _inputs("mllama")
    unseen = start >= stop
    assert unseen.sum() == 5
    for images in (media, media * 3 + 1):
        assert torch.equal(shared.run(layer, x, images, start, stop)[unseen], x[unseen])


# what holds for every variant -----------------------------------------------------------------------------------------
def test_a_fresh_layer_changes_nothing_and_trains_its_gates(name: str) -> None:
    torch.manual_seed(0)
    layer = GatedCrossAttention(CONFIGS[name])
    x, media, start, stop = _inputs(name)
    y = shared.run(layer, x, media, start, stop)
    assert torch.equal(y, x)
    (y * torch.randn_like(y)).sum().backward()
    moved = {n for n, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved == {"attn_gate", "ffn_gate"}


def test_a_later_image_moves_no_earlier_row(name: str) -> None:
    shared.check_later_images_move_no_earlier_row(build(name), D, CONFIGS[name].media_width)


def test_packed_equals_alone(name: str) -> None:
    shared.check_packed_equals_alone(build(name), D, CONFIGS[name].media_width)


def test_rows_without_media_follow_the_policy(name: str) -> None:
    layer, config = build(name), CONFIGS[name]
    x, media, start, stop = _inputs(name)
    unseen = start >= stop
    y = shared.run(layer, x, media, start, stop)[unseen]
    alone = shared.check_text_only(layer, D, config.media_width)
    shared.assert_close(alone[unseen], y, 2e-6)
    for rows in (y, alone[unseen]):
        assert torch.equal(rows, x[unseen]) == (config.rows_without_media == "zero_attention_and_ffn")


def test_media_count(name: str) -> None:
    shared.check_media_count(build(name), D, CONFIGS[name].media_width)


def test_kept_keys_and_values_give_the_same(name: str) -> None:
    shared.check_steps_equal_whole(build(name), D, CONFIGS[name].media_width)


def test_bfloat16_follows_float32(name: str) -> None:
    shared.check_bfloat16(build(name), D, CONFIGS[name].media_width)


def test_openflamingos_heads_do_not_depend_on_the_language_model() -> None:
    layer = GatedCrossAttention(CrossAttentionConfig.flamingo(width=16, media_width=12))
    assert tuple(layer.q_proj.weight.shape) == (512, 16)
    assert tuple(layer.ffn.weight1.shape) == (64, 16)


def test_rejects_what_does_not_fit() -> None:
    layer = build("flamingo")
    x, media, start, stop = _inputs("flamingo")
    with pytest.raises(ValueError, match="media must be packed"):
        layer.keys_values(media.unflatten(0, (3, -1)))
    k, v = layer.keys_values(media)
    with pytest.raises(ValueError, match="x must be packed"):
        layer(x[:, :5], k, v, start, stop, 8)
    with pytest.raises(ValueError, match="media_start"):
        layer(x, k, v, start[:5], stop, 8)
    with pytest.raises(ValueError, match="head_dim must be >= 1, got 0"):
        CrossAttentionConfig.flamingo(width=8, media_width=8, head_dim=0)
    with pytest.raises(ValueError, match="no multiple of num_kv_heads 3"):
        CrossAttentionConfig.mllama(width=8, num_heads=4, num_kv_heads=3, ffn_width=8)
    with pytest.raises(ValueError, match="rows_without_media 'leak' must be one of"):
        CrossAttentionConfig.mllama(width=8, num_heads=4, num_kv_heads=2, ffn_width=8, rows_without_media="leak")
