"""CogAgent's high-resolution tower in and out of its checkpoint (names under `model.cross_vision.`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastmllm.models.eva import EvaConfig, EvaVisionTransformer
from fastmllm.models.weights.mapping import Conv, Join, Positions, Rule, Shape, View, fill, to_ours, to_theirs
from fastmllm.models.weights.values import named, read_size

# the rotary tables are computed; the norm and the head behind the last block are not used
UNUSED: Mapping[str, Shape] = dict.fromkeys(
    ("vit.model.rope.{table}", "vit.model.blocks.{i}.attn.rope.{table}", "vit.model.norm.{p}",
     "vit.model.fc_norm.{p}", "vit.model.head.{p}")
)  # fmt: skip


def eva_config(raw: Mapping[str, Any], origin: str = "config.json") -> EvaConfig:
    """Read the configuration of CogAgent; its file names only the image size, the rest is fixed in its code."""
    with named(origin):
        return EvaConfig(image_size=read_size(raw, "cross_image_size", 1120, origin))


def eva_rules(config: EvaConfig) -> list[Rule]:
    """Return the table of names."""
    layer = "vit.model.blocks.{i}."
    return [
        Rule("cls_token", "vit.model.cls_token", View(ours=(-1,), theirs=(1, 1, -1))),
        Rule(("cls_position", "patch_embed.position"), "vit.model.pos_embed", Positions(leading=True)),
        Rule("patch_embed.weight", "vit.model.patch_embed.proj.weight", Conv(config.patch_size)),
        Rule("patch_embed.bias", "vit.model.patch_embed.proj.bias"),
        Rule("blocks.{i}.attn.qkv_weight", tuple(f"{layer}attn.{part}_proj.weight" for part in "qkv"), Join()),
        Rule("blocks.{i}.attn.q_bias", layer + "attn.q_bias"),
        Rule("blocks.{i}.attn.v_bias", layer + "attn.v_bias"),
        Rule("blocks.{i}.attn.norm.{p}", layer + "attn.inner_attn_ln.{p}"),
        Rule("blocks.{i}.attn.proj.{p}", layer + "attn.proj.{p}"),
        Rule("blocks.{i}.mlp.w12.{p}", (layer + "mlp.w1.{p}", layer + "mlp.w2.{p}"), Join(parts=2)),
        Rule("blocks.{i}.mlp.norm.{p}", layer + "mlp.ffn_ln.{p}"),
        Rule("blocks.{i}.mlp.w3.{p}", layer + "mlp.w3.{p}"),
        Rule("blocks.{i}.norm1.{p}", layer + "norm1.{p}"),
        Rule("blocks.{i}.norm2.{p}", layer + "norm2.{p}"),
        Rule("output_position", "pos_embed"),
    ]


@dataclass(frozen=True, slots=True)
class EvaTower:
    """A tower, and what its checkpoint holds besides."""

    model: EvaVisionTransformer
    rest: Mapping[str, Tensor]


def read_eva(config: EvaConfig, state: Mapping[str, Tensor], origin: str) -> EvaTower:
    """Build the tower from its part of a checkpoint.

    Args:
        config: of the tower.
        state: names without `model.cross_vision.`.
        origin: what the messages call the checkpoint.

    Raises:
        ValueError: a tensor is missing, of another shape, or unknown.
    """
    rules = eva_rules(config)
    ours, rest = to_ours(state, rules, origin, UNUSED)
    with torch.device("meta"):
        whole, model = EvaVisionTransformer(replace(config, layer=config.depth)), EvaVisionTransformer(config)
    fill(whole, ours, origin)
    fill(model, {name: ours.pop(name) for name in model.state_dict()}, origin)
    return EvaTower(model.eval(), to_theirs(ours, rules, rest))


def eva_state(tower: EvaTower) -> dict[str, Tensor]:
    """Return the tower's tensors under the checkpoint's names, with what was kept apart."""
    return to_theirs(tower.model.state_dict(), eva_rules(tower.model.config), tower.rest)
