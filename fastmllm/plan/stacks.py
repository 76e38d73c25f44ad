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
from fastmllm.models.composition import ConnectorSizes, ResolutionSizes
from fastmllm.models.eva import EvaConfig
from fastmllm.models.mllm import MLLM, Blueprint
from fastmllm.models.packing import Packing
from fastmllm.models.sizes import Raw, language_sizes
from fastmllm.plan.builders import IMAGE_TOKEN, composed, family, shuffled, vit


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

    @property
    def behind(self) -> bool:
        """Whether a compressor at the connector takes what comes out of it."""
        return (
            self.seam is not None
            and not self.seam.crossed
            and (self.seam.side == "behind" or self.seam.connector is None)
        )

    def build(self, language: str | Path) -> MLLM:
        """Build the whole model without weights, on the meta device, in bfloat16.

        Args:
            language: one of `fastmllm.models.sizes.LANGUAGES`, or a folder with a config.json.

        Raises:
            ValueError: no such name or folder, or a decoder that is not computed here.
        """
        with torch.device("meta"):
            parts = self.make(language_sizes(language))
            model = MLLM(parts, {})
        token = parts.placeholders[0] if parts.placeholders else IMAGE_TOKEN
        model.packing = Packing(policy=self.policy, image_token=token)
        return model.to(torch.bfloat16).eval().requires_grad_(False)


_CLIP_224 = vit(1024, 24, 16, 4096, 14, 224, pre_norm=True, patch_bias=False, activation="quick_gelu")
_SIGLIP_364 = vit(1152, 27, 16, 4304, 14, 364, cls_token=False, activation="gelu_tanh")
_SIGLIP_512 = vit(768, 12, 12, 3072, 16, 512, cls_token=False, activation="gelu_tanh")
_EVA_G = vit(1408, 39, 16, 6144, 14, 224)
_EVA_E = vit(1792, 63, 16, 15360, 14, 224, post_norm=True)
_QFORMER = ConnectorSizes(tokens=32, width=768, depth=12, num_heads=12)
_LATENTS = ConnectorSizes(tokens=64, depth=6, num_heads=8, head_dim=64)
_QWEN2 = Native(min_pixels=56 * 56, max_pixels=12845056)  # as the checkpoints' preprocessors say

STACKS: Mapping[str, Stack] = {
    "llava-1.5": Stack(
        policy=Fixed(prefix_tokens=1), make=family(sizes.llava), seam=SEAMS["llava"],
        about="CLIP ViT-L/14-336 (23 blocks), MLP",
    ),
    "llava-next": Stack(
        policy=AnyRes(), make=family(sizes.llava_next), seam=SEAMS["llava_next"],
        about="CLIP ViT-L/14-336 (23 blocks), MLP",
    ),
    "llava-onevision": Stack(
        policy=AnyRes(image_size=384, pinpoints=ONEVISION_PINPOINTS, max_tiles=9),
        make=family(sizes.llava_onevision), seam=SEAMS["llava_onevision"], about="SigLIP SO400M/14-384, MLP",
    ),
    "internvl": Stack(
        policy=InternVL(), make=family(sizes.internvl), seam=SEAMS["internvl"],
        about="InternViT-300M-448, pixel shuffle, MLP",
    ),
    "idefics3": Stack(
        policy=Idefics3(), make=partial(shuffled, _SIGLIP_364, 2), seam=SEAMS["idefics3"],
        about="SigLIP SO400M/14-364, pixel shuffle, linear",
    ),
    "smolvlm": Stack(
        policy=Idefics3(longest_edge=2048, image_size=512, patch_size=16, shuffle=4),
        make=partial(shuffled, _SIGLIP_512, 4), seam=SEAMS["smolvlm"],
        about="SigLIP B/16-512, pixel shuffle, linear",
    ),
    "nanovlm": Stack(
        policy=NanoVLM(), make=partial(shuffled, _SIGLIP_512, 4), seam=None,
        about="SigLIP2 B/16-512, pixel shuffle, linear",
    ),
    "qwen2-vl": Stack(
        policy=_QWEN2, make=family(sizes.qwen2_vl), seam=SEAMS["qwen2_vl"],
        about="Qwen2-VL ViT, 2 x 2 merger",
    ),
    "qwen2.5-vl": Stack(
        policy=_QWEN2, make=family(sizes.qwen2_5_vl), seam=SEAMS["qwen2_5_vl"],
        about="Qwen2.5-VL ViT with windows, 2 x 2 merger",
    ),
    "qwen3-vl": Stack(
        policy=Native(patch_size=16, min_pixels=65536, max_pixels=16777216), make=family(sizes.qwen3_vl),
        seam=SEAMS["qwen3_vl"], about="Qwen3-VL ViT, 2 x 2 merger, DeepStack",
    ),
    "mllama": Stack(
        policy=Mllama(), make=family(sizes.mllama), seam=CROSSED["mllama"][0],
        about="Llama-3.2-Vision ViT-H/14-560, a cross layer in front of each fourth",
    ),
    "flamingo": Stack(
        policy=Fixed(image_size=224, queries=64, cross=True), seam=None,
        make=partial(composed, _CLIP_224, fusion="flamingo", connector="resampler", connector_sizes=_LATENTS),
        about="CLIP ViT-L/14-224, perceiver resampler, a gated cross layer in front of each fourth",
    ),
    "blip-2": Stack(
        policy=Fixed(image_size=224, fit="resize", queries=32, prefix_tokens=1), seam=None,
        make=partial(composed, _EVA_G, connector="qformer", connector_sizes=_QFORMER),
        about="EVA ViT-g/14-224, Q-Former",
    ),
    "cogagent": Stack(
        policy=CogAgent(), seam=None,
        make=partial(composed, _EVA_E, resolution="dual", fusion="cogagent", high_res=EvaConfig(),
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
