"""The stacks that a plan knows: a resolution policy, the tower and connector it is published with, and their seam."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from fastmllm.data.resolution import (
    ONEVISION_PINPOINTS,
    AnyRes,
    CogAgent,
    Fixed,
    Idefics3,
    InternVL,
    Mllama,
    NanoVLM,
    Native,
    Policy,
)
from fastmllm.hf.compress.crossed import CROSSED
from fastmllm.hf.compress.seams import SEAMS, Seam
from fastmllm.models import sizes
from fastmllm.models.compose import blueprint
from fastmllm.models.composition import ConnectorSizes, MLLMConfig, ResolutionSizes
from fastmllm.models.eva import EvaConfig
from fastmllm.models.families import build
from fastmllm.models.mllm import MLLM, Blueprint
from fastmllm.models.sizes import LANGUAGES, Raw
from fastmllm.models.vision import VisionConfig
from fastmllm.models.weights.folder import read_config
from fastmllm.models.weights.language import language_config
from fastmllm.modules.projector import ShuffleProjector

IMAGE_TOKEN = 1  # of fresh compositions: any row of the table


@dataclass(frozen=True, kw_only=True, slots=True)
class Stack:
    """A policy and what it is published with.

    Args:
        policy: with the sizes of its checkpoints' preprocessors.
        make: text_config -> the parts.
        seam: what `fastmllm.patch(compress=)` knows of the family; None: nothing.
        about: tower and connector, in words.
    """

    policy: Policy
    make: Callable[[Raw], Blueprint]
    seam: Seam | None
    about: str

    def build(self, language: str | Path) -> MLLM:
        """Build the whole model without weights, on the meta device, in bfloat16.

        Args:
            language: one of `LANGUAGES`, or a folder with a config.json.

        Raises:
            ValueError: no such name or folder, or a decoder that is not computed here.
        """
        with torch.device("meta"):
            model = MLLM(self.make(language_sizes(language)), {})
        return model.to(torch.bfloat16).eval().requires_grad_(False)


def language_sizes(name: str | Path) -> Raw:
    """Return the text_config of a published language model, or of a folder.

    Raises:
        ValueError: neither of them.
    """
    known = LANGUAGES.get(str(name).lower())
    if known is not None:
        return known
    if not Path(name).is_dir():
        raise ValueError(f"plan: unknown llm {str(name)!r}; choose a folder with a config.json or one of "
                         f"{', '.join(LANGUAGES)}")  # fmt: skip
    raw = read_config(Path(name))
    inside: Raw = {**raw, **raw.get("text_config", {})}
    return {key: value for key, value in inside.items() if key != "text_config"}


def _family(raw: Callable[[Raw], Raw]) -> Callable[[Raw], Blueprint]:
    return lambda inside: build(raw(inside), "plan")


def _composed(encoder: VisionConfig, inside: Raw, **parts: Any) -> Blueprint:
    return blueprint(
        MLLMConfig(encoder=encoder, language=language_config(inside, "plan"), image_token_id=IMAGE_TOKEN, **parts)
    )


def _shuffled(encoder: VisionConfig, block: int, inside: Raw) -> Blueprint:
    """Tiles through a pixel shuffle and one linear layer: Idefics3, SmolVLM, nanoVLM."""
    made = _composed(
        encoder, inside, resolution="tiles", connector="pixel_shuffle", connector_sizes=ConnectorSizes(block=block)
    )
    width: int = made.images.width
    made.images.connector = ShuffleProjector(encoder.width, width, shuffle=block)
    return made


def _vit(width: int, depth: int, heads: int, mlp: int, patch: int, image: int, **more: Any) -> VisionConfig:
    return VisionConfig(
        width=width, depth=depth, num_heads=heads, mlp_ratio=mlp / width, patch_size=patch, image_size=image,
        layer_scale=None, **more,
    )  # fmt: skip


_CLIP_224 = _vit(1024, 24, 16, 4096, 14, 224, pre_norm=True, patch_bias=False, activation="quick_gelu")
_SIGLIP_364 = _vit(1152, 27, 16, 4304, 14, 364, cls_token=False, activation="gelu_tanh")
_SIGLIP_512 = _vit(768, 12, 12, 3072, 16, 512, cls_token=False, activation="gelu_tanh")
_EVA_G = _vit(1408, 39, 16, 6144, 14, 224)
_EVA_E = _vit(1792, 63, 16, 15360, 14, 224, post_norm=True)
_QFORMER = ConnectorSizes(tokens=32, width=768, depth=12, num_heads=12)
_LATENTS = ConnectorSizes(tokens=64, depth=6, num_heads=8, head_dim=64)
_QWEN2 = Native(min_pixels=56 * 56, max_pixels=12845056)  # as the checkpoints' preprocessors say

STACKS: Mapping[str, Stack] = {
    "llava-1.5": Stack(
        policy=Fixed(prefix_tokens=1), make=_family(sizes.llava), seam=SEAMS["llava"],
        about="CLIP ViT-L/14-336 (23 blocks), MLP",
    ),
    "llava-next": Stack(
        policy=AnyRes(), make=_family(sizes.llava_next), seam=SEAMS["llava_next"],
        about="CLIP ViT-L/14-336 (23 blocks), MLP",
    ),
    "llava-onevision": Stack(
        policy=AnyRes(image_size=384, pinpoints=ONEVISION_PINPOINTS, max_tiles=9),
        make=_family(sizes.llava_onevision), seam=SEAMS["llava_onevision"], about="SigLIP SO400M/14-384, MLP",
    ),
    "internvl": Stack(
        policy=InternVL(), make=_family(sizes.internvl), seam=SEAMS["internvl"],
        about="InternViT-300M-448, pixel shuffle, MLP",
    ),
    "idefics3": Stack(
        policy=Idefics3(), make=partial(_shuffled, _SIGLIP_364, 2), seam=SEAMS["idefics3"],
        about="SigLIP SO400M/14-364, pixel shuffle, linear",
    ),
    "smolvlm": Stack(
        policy=Idefics3(longest_edge=2048, image_size=512, patch_size=16, shuffle=4),
        make=partial(_shuffled, _SIGLIP_512, 4), seam=SEAMS["smolvlm"],
        about="SigLIP B/16-512, pixel shuffle, linear",
    ),
    "nanovlm": Stack(
        policy=NanoVLM(), make=partial(_shuffled, _SIGLIP_512, 4), seam=None,
        about="SigLIP2 B/16-512, pixel shuffle, linear",
    ),
    "qwen2-vl": Stack(
        policy=_QWEN2, make=_family(sizes.qwen2_vl), seam=SEAMS["qwen2_vl"],
        about="Qwen2-VL ViT, 2 x 2 merger",
    ),
    "qwen2.5-vl": Stack(
        policy=_QWEN2, make=_family(sizes.qwen2_5_vl), seam=SEAMS["qwen2_5_vl"],
        about="Qwen2.5-VL ViT with windows, 2 x 2 merger",
    ),
    "qwen3-vl": Stack(
        policy=Native(patch_size=16, min_pixels=65536, max_pixels=16777216), make=_family(sizes.qwen3_vl),
        seam=SEAMS["qwen3_vl"], about="Qwen3-VL ViT, 2 x 2 merger, DeepStack",
    ),
    "mllama": Stack(
        policy=Mllama(), make=_family(sizes.mllama), seam=CROSSED["mllama"][0],
        about="Llama-3.2-Vision ViT-H/14-560, a cross layer in front of each fourth",
    ),
    "flamingo": Stack(
        policy=Fixed(image_size=224, queries=64, cross=True), seam=None,
        make=partial(_composed, _CLIP_224, fusion="flamingo", connector="resampler", connector_sizes=_LATENTS),
        about="CLIP ViT-L/14-224, perceiver resampler, a gated cross layer in front of each fourth",
    ),
    "blip-2": Stack(
        policy=Fixed(image_size=224, fit="resize", queries=32, prefix_tokens=1), seam=None,
        make=partial(_composed, _EVA_G, connector="qformer", connector_sizes=_QFORMER),
        about="EVA ViT-g/14-224, Q-Former",
    ),
    "cogagent": Stack(
        policy=CogAgent(), seam=None,
        make=partial(_composed, _EVA_E, resolution="dual", fusion="cogagent", high_res=EvaConfig(),
                     resolution_sizes=ResolutionSizes(fit="resize")),
        about="EVA2-CLIP-E/14-224, MLP; EVA2-CLIP-L/14-1120 seen across in every layer",
    ),
}  # fmt: skip
ALIASES = {"fixed": "llava-1.5", "anyres": "llava-next", "native": "qwen2.5-vl", "llama-3.2-vision": "mllama"}


def find_stack(text: str) -> Stack:
    """Return a stack by name, with other sizes of its policy where they are given.

    Args:
        text: a name in `STACKS` or `ALIASES`, perhaps with fields of its policy, as "internvl:max_tiles=6".

    Raises:
        ValueError: an unknown name, or a field that the policy does not have.
    """
    name, _, given = text.partition(":")
    stack = STACKS.get(ALIASES.get(name.lower(), name.lower()))
    if stack is None:
        raise ValueError(f"plan: unknown policy {name!r}; choose one of {', '.join((*STACKS, *ALIASES))}")
    changes: dict[str, Any] = {}
    known = [field.name for field in fields(stack.policy)]
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        if key not in known or not value:
            raise ValueError(f"plan: policy {text!r}: {part!r} names no field=value of {name}: {', '.join(known)}")
        changes[key] = yaml.safe_load(value)
    try:
        return replace(stack, policy=replace(stack.policy, **changes))
    except TypeError as error:  # a word where a number belongs
        raise ValueError(f"plan: policy {text!r}: {error}") from error
