"""CogAgent's two EVA2-CLIP encoders against their formulas in fp64 (no class of transformers has them)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_towers import assert_gradients, assert_near, normalise, pixels, shake
from torch import Tensor, nn

from fastmllm.models.eva import EvaConfig, EvaVisionTransformer
from fastmllm.models.weights.eva import eva_config, eva_rules, eva_state, read_eva
from fastmllm.models.weights.mapping import to_ours
from fastmllm.models.weights.towers import FAMILIES, read_tower, tower_state

D, HEADS, INNER, PATCH, GRID, DEPTH = 32, 2, 44, 4, 5, 3
LARGE = EvaConfig(
    width=D, depth=DEPTH, num_heads=HEADS, mlp_width=INNER, patch_size=PATCH, image_size=GRID * PATCH, rope_grid=3,
    layer=2,
)  # fmt: skip
RAW = {"num_hidden_layers": DEPTH, "hidden_size": D, "num_heads": HEADS, "intermediate_size": INNER,
       "patch_size": PATCH, "image_size": GRID * PATCH, "hidden_act": "gelu", "in_channels": 3,
       "layer_norm_eps": 1e-6, "num_positions": GRID * GRID + 1, "dropout_prob": 0.0}  # fmt: skip


def draw(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}


def large_state() -> dict[str, Tensor]:
    """Draw a checkpoint under CogAgent's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (GRID * GRID, D), "vit.model.cls_token": (1, 1, D), "vit.model.pos_embed": (1, GRID * GRID + 1, D),
        "vit.model.patch_embed.proj.weight": (D, 3, PATCH, PATCH), "vit.model.patch_embed.proj.bias": (D,),
        "vit.model.rope.freqs_cos": (GRID * GRID, D // HEADS), "vit.model.norm.weight": (D,),
        "vit.model.norm.bias": (D,), "vit.model.head.weight": (8, D), "vit.model.head.bias": (8,),
    }  # fmt: skip
    for i in range(DEPTH):
        p = f"vit.model.blocks.{i}."
        shapes |= {p + f"attn.{n}_proj.weight": (D, D) for n in "qkv"}
        shapes |= {p + "attn.q_bias": (D,), p + "attn.v_bias": (D,), p + "mlp.w3.weight": (D, INNER)}
        shapes |= {p + n + ".weight": (D,) for n in ("attn.inner_attn_ln", "norm1", "norm2")}
        shapes |= {p + n + ".bias": (D,) for n in ("attn.inner_attn_ln", "norm1", "norm2", "attn.proj", "mlp.w3")}
        shapes |= {p + "attn.proj.weight": (D, D), p + "attn.rope.freqs_sin": (GRID * GRID, D // HEADS)}
        shapes |= {p + f"mlp.w{n}.{k}": s for n in (1, 2) for k, s in (("weight", (INNER, D)), ("bias", (INNER,)))}
        shapes |= {p + "mlp.ffn_ln.weight": (INNER,), p + "mlp.ffn_ln.bias": (INNER,)}
    return draw(shapes)


def small_state() -> dict[str, Tensor]:
    """Draw EVA2-CLIP-E under CogVLM's names."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch_embedding.proj.weight": (D, 3, PATCH, PATCH), "patch_embedding.proj.bias": (D,),
        "patch_embedding.cls_embedding": (1, D), "patch_embedding.position_embedding.weight": (GRID * GRID + 1, D),
    }  # fmt: skip
    for i in range(DEPTH):
        p = f"transformer.layers.{i}."
        for name, (rows, columns) in {"attention.query_key_value": (3 * D, D), "attention.dense": (D, D),
                                      "mlp.fc1": (INNER, D), "mlp.fc2": (D, INNER)}.items():  # fmt: skip
            shapes |= {f"{p}{name}.weight": (rows, columns), f"{p}{name}.bias": (rows,)}
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{p}{name}.weight": (D,), f"{p}{name}.bias": (D,)}
    return draw(shapes)


def embed(s: dict[str, Tensor], x: Tensor, patch: str, cls: Tensor, position: Tensor) -> Tensor:
    x = F.conv2d(x, s[patch + ".weight"], s[patch + ".bias"], stride=PATCH).flatten(2).transpose(1, 2)
    return torch.cat([cls.reshape(1, 1, D).expand(len(x), 1, D), x], 1) + position.reshape(1, -1, D)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend (I, S, H, Dh)."""
    scores = torch.einsum("ishd,ithd->ihst", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("ihst,ithd->ishd", scores.softmax(-1), v).flatten(2)


def norm(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], s[name + ".weight"], s[name + ".bias"], 1e-6)


def linear(s: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, s[name + ".weight"], s[name + ".bias"])


def turn(x: Tensor) -> Tensor:
    """Turn pairs (2i, 2i + 1) of a head as complex numbers: its first half by the row, its second by the column."""
    head = x.shape[-1]
    place = torch.arange(GRID, dtype=torch.float64) / GRID * LARGE.rope_grid
    angle = place[:, None] * 10000.0 ** (-torch.arange(0, head // 2, 2, dtype=torch.float64) / (head // 2))
    rows = angle[:, None].expand(GRID, GRID, -1)
    columns = angle[None].expand(GRID, GRID, -1)
    unit = torch.polar(torch.ones(()).double(), torch.cat([rows, columns], -1).reshape(GRID * GRID, 1, -1))
    turned = torch.view_as_complex(x[:, 1:].unflatten(-1, (-1, 2)).contiguous()) * unit
    return torch.cat([x[:, :1], torch.view_as_real(turned).flatten(-2)], 1)  # the class token stays


def large_formula(s: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    x = embed(s, x, "vit.model.patch_embed.proj", s["vit.model.cls_token"], s["vit.model.pos_embed"])
    for i in range(layer):
        p = f"vit.model.blocks.{i}."
        y = norm(s, p + "norm1", x)
        q, k, v = (y @ s[p + f"attn.{n}_proj.weight"].T for n in "qkv")
        q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in (q + s[p + "attn.q_bias"], k, v + s[p + "attn.v_bias"]))
        y = softmax_attention(turn(q), turn(k), v)
        x = x + linear(s, p + "attn.proj", norm(s, p + "attn.inner_attn_ln", y))
        y = norm(s, p + "norm2", x)
        y = F.silu(linear(s, p + "mlp.w1", y)) * linear(s, p + "mlp.w2", y)
        x = x + linear(s, p + "mlp.w3", norm(s, p + "mlp.ffn_ln", y))
    return x[:, 1:] + s["pos_embed"]


def small_formula(s: dict[str, Tensor], x: Tensor, layer: int) -> Tensor:
    position = s["patch_embedding.position_embedding.weight"]
    x = embed(s, x, "patch_embedding.proj", s["patch_embedding.cls_embedding"], position)
    for i in range(layer):
        p = f"transformer.layers.{i}."
        q, k, v = linear(s, p + "attention.query_key_value", x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        x = x + norm(s, p + "input_layernorm", linear(s, p + "attention.dense", softmax_attention(q, k, v)))
        y = linear(s, p + "mlp.fc2", F.gelu(linear(s, p + "mlp.fc1", x)))
        x = x + norm(s, p + "post_attention_layernorm", y)
    return x[:, 1:]


def in_double(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double().requires_grad_() for name, tensor in state.items()}


def expected_gradients(oracle: dict[str, Tensor], rules: list, model: nn.Module, unused: dict | None = None) -> dict:
    grads = {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in oracle.items()}
    ours, _ = to_ours(grads, rules, "the formula", unused)
    return {name: ours[name].float() for name, _ in model.named_parameters()}


def test_the_high_resolution_encoder_equals_its_formula() -> None:
    from fastmllm.models.weights.eva import UNUSED

    state = large_state()
    tower = read_eva(LARGE, state, "a checkpoint")
    assert len(tower.model.blocks) == 2
    x = pixels(2, GRID * PATCH, GRID * PATCH)
    oracle = in_double(state)
    y, expected = tower.model(x), large_formula(oracle, normalise(x, LARGE).double(), 2)
    assert_near(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert_gradients(tower.model, expected_gradients(oracle, eva_rules(LARGE), tower.model, UNUSED))
    back = eva_state(tower)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("layer", [None, -2])
def test_the_low_resolution_encoder_equals_its_formula(layer: int | None) -> None:
    state = small_state()
    model = read_tower(RAW, state, "a checkpoint", kind="eva2_clip_e", changes={"layer": layer})
    blocks = DEPTH if layer is None else DEPTH - 1
    assert len(model.blocks) == blocks
    x = pixels(2, GRID * PATCH, GRID * PATCH)
    oracle = in_double(state)
    y, expected = model(x), small_formula(oracle, normalise(x, model.config).double(), blocks)
    assert_near(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    rules = FAMILIES["eva2_clip_e"].rules(model.config)
    assert_gradients(model, expected_gradients(oracle, rules, model))
    back = tower_state(model)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    with pytest.raises(ValueError, match="20 x 20 pixels"):
        model(pixels(1, 24, 20))


def test_images_do_not_see_each_other_and_bfloat16_follows() -> None:
    model = shake(EvaVisionTransformer(LARGE))
    x = pixels(3, GRID * PATCH, GRID * PATCH)
    with torch.no_grad():
        y = model(x)
        assert_near(torch.cat([model(image[None]) for image in x]), y, 1e-6)
        assert model(x[:0]).shape == (0, GRID * GRID, D)
        half = model.bfloat16()(x)
    assert half.dtype == torch.bfloat16
    assert_near(half, y, 0.1)


def test_missing_and_unknown_tensors_and_bad_sizes_are_named() -> None:
    state = large_state()
    with pytest.raises(ValueError, match="surprise"):
        read_eva(LARGE, state | {"vit.surprise": torch.zeros(1)}, "a checkpoint")
    for name in ("vit.model.blocks.2.mlp.w2.bias", "vit.model.blocks.0.attn.v_bias", "pos_embed"):
        with pytest.raises(ValueError, match="lacks"):
            read_eva(LARGE, {k: v for k, v in state.items() if k != name}, "a checkpoint")
    with pytest.raises(ValueError, match="20, 20, 3"):
        EvaVisionTransformer(LARGE)(pixels(1, 16, 16))
    for bad in ({"width": 36}, {"layer": 0}, {"layer": 25}, {"image_size": 1121}, {"rope_grid": 0}):
        with pytest.raises(ValueError, match="EvaConfig"):
            EvaConfig(**bad)
    assert eva_config({"cross_image_size": 560}).image_size == 560
    assert eva_config({}) == EvaConfig()
