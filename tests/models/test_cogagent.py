"""The whole of CogAgent (arXiv 2312.08914) against its formula in fp64, dense, one sample at a time.

Each decoder layer: h' = MSA(LN x) + x; h'' = MCA(LN h', X_high) + h'; FFN(LN h'') + h''. transformers has none.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmllm.infer.generation import generate_tokens
from fastmllm.infer.sampling import SamplingParams
from tests.support.tiny_compositions import ENCODERS, HIGH, IMAGE, LANGUAGE, labels, picture, redrawn, samples, tiny

CONFIG = tiny("vit", "dual", "mlp", "cogagent")
Weights = dict[str, Tensor]


def under(w: Weights, prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in w.items() if name.startswith(prefix)}


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return x * w[name + ".weight"] + w[name + ".bias"]


def rms_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[name + ".weight"]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attend (T, H, Dh) to (N, H, Dh): (T, H * Dh)."""
    scores = torch.einsum("thd,nhd->htn", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), float("-inf"))
    return torch.einsum("htn,nhd->thd", scores.softmax(-1), v).flatten(1)


def turn(x: Tensor, angle: Tensor, neighbours: bool) -> Tensor:
    """Turn the pairs (2i, 2i + 1), or (i, i + Dh / 2), of (T, H, Dh) by angle (T, Dh / 2)."""
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else x.chunk(2, -1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    parts = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(parts, -1).flatten(-2) if neighbours else torch.cat(parts, -1)


def frequencies(width: int) -> Tensor:
    return 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)


def patches(w: Weights, pixels: Tensor, config) -> Tensor:
    """Embed an image (S, S, 3), uint8: (1 + N, D), the class token in front."""
    p = config.patch_size
    x = (pixels.double() / 255 - torch.tensor(config.pixel_mean).double()) / torch.tensor(config.pixel_std).double()
    side = len(x) // p
    x = x.reshape(side, p, side, p, 3).transpose(1, 2).reshape(side**2, -1)
    x = x @ w["patch_embed.weight"] + w["patch_embed.bias"] + w["patch_embed.position"]
    return torch.cat([(w["cls_token"] + w["cls_position"])[None], x])


def low(w: Weights, pixels: Tensor) -> Tensor:
    """The tower whose tokens stand in the text."""
    config = ENCODERS["vit"]
    x = patches(w, pixels, config)
    for k in range(config.depth):
        block = under(w, f"blocks.{k}.")
        qkv = linear(block, "attn.qkv", layer_norm(block, "norm1", x, config.norm_eps))
        q, k_, v = (t.unflatten(-1, (config.num_heads, -1)) for t in qkv.chunk(3, -1))
        x = x + block["scale1"] * linear(block, "attn.proj", attend(q, k_, v))
        y = layer_norm(block, "norm2", x, config.norm_eps)
        y = F.gelu(y @ block["mlp.weight1"].T + block["mlp.bias1"]) @ block["mlp.weight2"].T + block["mlp.bias2"]
        x = x + block["scale2"] * y
    return layer_norm(w, "norm", x, config.norm_eps)[1:]


def high(w: Weights, pixels: Tensor) -> Tensor:
    """The tower whose tokens are seen across."""
    side, eps, head = HIGH.image_size // HIGH.patch_size, HIGH.norm_eps, HIGH.width // HIGH.num_heads
    place = torch.arange(side).double() * HIGH.rope_grid / side
    angle = place[:, None] * frequencies(head // 2)  # (side, Dh / 4)
    angle = torch.cat([angle[:, None].expand(side, side, -1), angle[None].expand(side, side, -1)], -1).flatten(0, 1)
    angle = torch.cat([torch.zeros(1, head // 2).double(), angle])  # the class token stays
    x = patches(w, pixels, HIGH)
    for k in range(HIGH.layer):
        block = under(w, f"blocks.{k}.")
        qkv = layer_norm(block, "norm1", x, eps) @ block["attn.qkv_weight"].T
        q, k_, v = qkv.chunk(3, -1)
        q, k_, v = (t.unflatten(-1, (-1, head)) for t in (q + block["attn.q_bias"], k_, v + block["attn.v_bias"]))
        y = attend(turn(q, angle, True), turn(k_, angle, True), v)
        x = x + linear(block, "attn.proj", layer_norm(block, "attn.norm", y, eps))
        gate, up = linear(block, "mlp.w12", layer_norm(block, "norm2", x, eps)).chunk(2, -1)
        x = x + linear(block, "mlp.w3", layer_norm(block, "mlp.norm", F.silu(gate) * up, eps))
    return x[1:] + w["output_position"]


def decoder(w: Weights, x: Tensor, seen: Tensor | None) -> Tensor:
    """Decode (T, D) that sees the tokens of the large images; without images no cross module runs."""
    c = LANGUAGE
    angle = torch.arange(len(x)).double()[:, None] * frequencies(c.head_dim)
    for k in range(c.depth):
        layer, cross = under(w, f"model.layers.{k}."), under(w, f"inner_layers.{k}.")
        y = rms_norm(layer, "input_layernorm", x, c.norm_eps)
        q, k_, v = (linear(layer, f"self_attn.{n}_proj", y).unflatten(-1, (-1, c.head_dim)) for n in "qkv")
        k_, v = (t.repeat_interleave(c.num_heads // c.num_kv_heads, 1) for t in (k_, v))
        x = x + linear(layer, "self_attn.o_proj", attend(turn(q, angle, False), turn(k_, angle, False), v, True))
        if seen is not None:
            q = linear(cross, "q_proj", rms_norm(cross, "norm", x, c.norm_eps)).unflatten(-1, (c.num_heads, -1))
            k_, v = linear(cross, "kv_proj", seen).unflatten(-1, (2, c.num_heads, -1)).unbind(1)
            x = x + linear(cross, "o_proj", attend(q, k_, v))
        y = rms_norm(layer, "post_attention_layernorm", x, c.norm_eps)
        y = F.silu(linear(layer, "mlp.gate_proj", y)) * linear(layer, "mlp.up_proj", y)
        x = x + linear(layer, "mlp.down_proj", y)
    return linear(w, "lm_head", rms_norm(w, "model.norm", x, c.norm_eps))


def formula(w: Weights, sample: list, policy) -> Tensor:
    """Return (T', V) logits of a sample."""
    language, connector = under(w, "language."), under(w, "images.connector.mlp.")
    rows, across = [], []
    for item in sample:
        if isinstance(item, int):
            rows.append(language["model.embed_tokens.weight"][item][None])
            continue
        small, large = policy.apply(item)
        y = low(under(w, "images.vision."), small[0])
        y = F.gelu(y @ connector["weight1"].T + connector["bias1"]) @ connector["weight2"].T + connector["bias2"]
        rows.append(y)
        across.append(high(under(w, "images.high."), large[0]))
    return decoder(language, torch.cat(rows), torch.cat(across) if across else None)


def test_logits_loss_and_gradients_equal_the_formula():
    model, batch = redrawn(CONFIG), samples()
    model.zero_grad()
    packed = model.pack(batch, labels(batch))
    w = {name: t.detach().double().requires_grad_() for name, t in model.named_parameters()}
    expected = torch.cat([formula(w, sample, model.packing.policy) for sample in batch])
    logits = model.logits(packed)
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    loss = model(packed)
    loss.backward()
    reference = F.cross_entropy(expected, packed.plan.labels, ignore_index=-100, reduction="sum")
    assert abs(loss.item() - reference.item()) <= 1e-5 * reference.item()
    reference.backward()
    largest = max(t.grad.abs().max() for t in w.values())
    for name, p in model.named_parameters():
        assert (p.grad - w[name].grad).abs().max() <= 1e-4 * largest, name
        assert w[name].grad.any(), name


def test_generation_equals_the_formula():
    model, sample = redrawn(CONFIG), [1, picture(9), 20, 21]
    w = {name: t.detach().double() for name, t in model.named_parameters()}
    for token in generate_tokens(model, model.pack([sample]), SamplingParams(max_new_tokens=5), stop=[IMAGE])[0]:
        assert formula(w, sample, model.packing.policy)[-1].argmax() == token
        sample = [*sample, token]
    assert len(sample) > 4
