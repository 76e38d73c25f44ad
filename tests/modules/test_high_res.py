"""CogAgent's cross module against its formula in fp64; transformers has no such class."""

from __future__ import annotations

import cross_layers as shared
import pytest
import torch
from torch import Tensor

from fastmllm.models.weights.fusion import COGAGENT_CROSS, cogagent_cross_config
from fastmllm.models.weights.mapping import to_ours, to_theirs
from fastmllm.modules.high_res import HighResConfig, HighResCrossAttention

D, DM = 24, 16
CONFIG = HighResConfig(width=D, media_width=DM, num_heads=3, head_dim=4)  # 12 wide inside, the tower is 16


def build() -> HighResCrossAttention:
    layer = shared.redraw(HighResCrossAttention(CONFIG))
    assert isinstance(layer, HighResCrossAttention)
    return layer


def cogagent(layer: HighResCrossAttention, x: Tensor, media: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """Restate h'' = MCA(RMSNorm(h'), X_hi) + h' (arXiv 2312.08914, section 2.2) in fp64.

    The order of norm and attention, the halves of key_value and the missing biases are modeling_cogagent.py's. That
    file reshapes the heads' output to cross_hidden_size, a crash or a scramble unless it equals
    cross_compute_hidden_size (1024 both in the published model); here the sizes differ on purpose.
    """
    p = {n: t.double() for n, t in layer.named_parameters()}
    x, media, config = x.double(), media.double(), layer.config

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (config.num_heads, config.head_dim)).transpose(0, 1)  # (H, ., Dh)

    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.norm_eps) * p["norm.weight"]
    q = heads(y @ p["q_proj.weight"].T)
    k, v = (heads(t) for t in (media @ p["kv_proj.weight"].T).split(config.num_heads * config.head_dim, -1))
    seen = shared.dense_mask(start, stop, len(media))
    weights = (q @ k.transpose(1, 2) / config.head_dim**0.5).masked_fill(~seen, -torch.inf).softmax(-1)
    y = (weights.nan_to_num() @ v).transpose(0, 1).flatten(1)
    return x + y @ p["o_proj.weight"].T


def test_equals_the_formula() -> None:
    layer = build()
    x, media, start, stop = shared.batch(D, DM, "all_previous")
    own = {n: [p] for n, p in layer.named_parameters()}
    shared.check_equal(layer, lambda a, b: cogagent(layer, a, b, start, stop), own, (x, media, start, stop))


def test_a_fresh_module_is_not_an_identity() -> None:
    # there is no gate: from the first step on the rows that see the tower move, and all parameters learn
    torch.manual_seed(0)
    layer = HighResCrossAttention(CONFIG)
    x, media, start, stop = shared.batch(D, DM)
    y = shared.run(layer, x, media, start, stop)
    assert torch.equal((y != x).any(-1), start < stop)
    (y * torch.randn_like(y)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_a_later_image_moves_no_earlier_row() -> None:
    shared.check_later_images_move_no_earlier_row(build(), D, DM)


def test_packed_equals_alone() -> None:
    shared.check_packed_equals_alone(build(), D, DM)


def test_rows_without_media_leave_as_they_came() -> None:
    layer = build()
    x, media, start, stop = shared.batch(D, DM)
    unseen = start >= stop
    assert torch.equal(shared.run(layer, x, media, start, stop)[unseen], x[unseen])
    assert torch.equal(shared.check_text_only(layer, D, DM), x)


def test_media_count() -> None:
    shared.check_media_count(build(), D, DM)


def test_kept_keys_and_values_give_the_same() -> None:
    shared.check_steps_equal_whole(build(), D, DM)


def test_bfloat16_follows_float32() -> None:
    shared.check_bfloat16(build(), D, DM)


def test_reads_cogagents_layout() -> None:
    assert cogagent_cross_config({}) == HighResConfig()  # 32 heads of 32 over 6,400 tokens of width 1024
    raw = {"hidden_size": D, "cross_hidden_size": DM, "cross_compute_hidden_size": 12, "num_attention_heads": 3}
    assert cogagent_cross_config(raw) == CONFIG
    with pytest.raises(ValueError, match="cross_compute_hidden_size 13 is no multiple of 3 heads"):
        cogagent_cross_config({**raw, "cross_compute_hidden_size": 13})
    state = {
        "post_cross_attention_layernorm.weight": torch.randn(D), "cross_attn.query.weight": torch.randn(12, D),
        "cross_attn.key_value.weight": torch.randn(24, DM), "cross_attn.dense.weight": torch.randn(D, 12),
    }  # fmt: skip
    ours, _ = to_ours(state, COGAGENT_CROSS, "a checkpoint")
    HighResCrossAttention(CONFIG).load_state_dict(ours)
    back = to_theirs(ours, COGAGENT_CROSS)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], state[n]) for n in state)


def test_rejects_what_does_not_fit() -> None:
    layer = build()
    x, media, start, stop = shared.batch(D, DM)
    with pytest.raises(ValueError, match="HighResCrossAttention: media must be packed"):
        layer.keys_values(media[:, :4])
    with pytest.raises(ValueError, match="x must be packed"):
        layer(x[None], *layer.keys_values(media), start, stop, 8)
    with pytest.raises(ValueError, match="num_heads must be >= 1, got 0"):
        HighResConfig(num_heads=0)
    with pytest.raises(ValueError, match="norm_eps must be positive"):
        HighResConfig(norm_eps=0.0)
