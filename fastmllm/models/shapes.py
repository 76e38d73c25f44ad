"""Models without weights, on the meta device: published sizes by name, config.json folders, a recipe's own model.

Nothing is downloaded and no weight takes memory, so that a model of 90B parameters is there in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fastmllm.data.resolution import Fixed, InternVL, Mllama, Native, Policy
from fastmllm.models.compose import blueprint
from fastmllm.models.composition import to_json
from fastmllm.models.families import build
from fastmllm.models.mllm import MLLM
from fastmllm.models.packing import Packing
from fastmllm.models.sizes import LANGUAGES, Raw, internvl, llava, llava_onevision, mllama, qwen2_5_vl, qwen2_vl
from fastmllm.models.talk import TalkConfig, composition_of, said_packing
from fastmllm.models.vlm import VLM, ModelConfig, make_connector
from fastmllm.models.weights.folder import read_config
from fastmllm.models.weights.language import language_shape
from fastmllm.models.weights.vision import vision_shape

if TYPE_CHECKING:
    from tokenizers import Tokenizer


# name -> config.json, as far as it says sizes: those of the checkpoints of these names on the Hub
PUBLISHED: Mapping[str, Raw] = {
    "llava-1.5-7b": llava(LANGUAGES["vicuna-7b"] | {"vocab_size": 32064}),
    "llava-1.5-13b": llava(LANGUAGES["vicuna-13b"] | {"vocab_size": 32064}),
    "llava-onevision-7b": llava_onevision(LANGUAGES["qwen2.5-7b"] | {"vocab_size": 152128}),
    "internvl3-8b": internvl(LANGUAGES["qwen2.5-7b"] | {"vocab_size": 151674}),
    "qwen2-vl-7b": qwen2_vl(LANGUAGES["qwen2.5-7b"]),
    "qwen2-vl-72b": qwen2_vl(LANGUAGES["qwen2.5-72b"]),
    "qwen2.5-vl-7b": qwen2_5_vl(LANGUAGES["qwen2.5-7b"]),
    "qwen2.5-vl-72b": qwen2_5_vl(LANGUAGES["qwen2.5-72b"]),
    "llama-3.2-11b-vision": mllama(LANGUAGES["llama-3.1-8b"]),
    "llama-3.2-90b-vision": mllama(LANGUAGES["llama-3.1-70b"]),
}


def mllm_shape(name: str | Path) -> MLLM:
    """Build a published model without weights.

    Args:
        name: one of `PUBLISHED`, or a folder with a config.json of a family in `fastmllm.models.families`.

    Returns:
        The model on the meta device, with the resolution policy of its family's defaults.

    Raises:
        ValueError: no such name or folder, or a family whose pictures only its processor can take.
        FileNotFoundError: the folder has no config.json.
    """
    raw = PUBLISHED.get(str(name))
    if raw is None:
        if not Path(name).is_dir():
            raise ValueError(
                f"fastmllm::mllm_shape: {str(name)!r} is neither a folder with a config.json nor one of "
                f"{', '.join(PUBLISHED)}"
            )
        raw = read_config(Path(name))
    with torch.device("meta"):
        parts = build(raw, str(name))
        model = MLLM(parts, raw)
    if model.packing is None:
        token = parts.placeholders[0] if parts.placeholders else raw.get("image_token_index", 0)
        model.packing = Packing(policy=_policy(raw["model_type"], parts.images, str(name)), image_token=token)
    return model


def talk_shape(config: TalkConfig) -> MLLM:
    """Build a recipe's composition, or the model of its folder, without weights and without tokenizer.

    Raises:
        ValueError: as `mllm_shape`, an unknown name of a part, or parts that do not go together.
    """
    if config.folder:
        model = mllm_shape(config.folder)
        if config.resolution:
            model.packing = said_packing(config, model)
        return model
    with torch.device("meta"):
        vision = vision_shape(config.vision) if config.vision else None
        language = language_shape(config.language) if config.language else None
        made = composition_of(config, vision, language)
        return MLLM(blueprint(made), {"model_type": "fastmllm", **to_json(made)})


def vlm_shape(config: ModelConfig) -> VLM:
    """Build a recipe's model without weights and without tokenizer, in the dtype that the recipe means here.

    Raises:
        ValueError: an unknown name. Folders need their config.json only.
    """
    dtype = config.torch_dtype()
    with torch.device("meta"):
        language, vision = language_shape(config.language).to(dtype), vision_shape(config.vision).to(dtype)
        connector = make_connector(config, vision.width, language.config.width, 1.0).to(dtype)
        model = VLM(vision, connector, language, config, cast("Tokenizer", None))  # it has no weights
    model.requires_grad_(False)
    return model


def _policy(kind: str, images: Any, origin: str) -> Policy:
    """Return the resolution policy of a family, with the defaults of its checkpoints' preprocessors."""
    size = images.vision.config
    match kind:
        case "llava" | "idefics":
            return Fixed(image_size=size.image_size, patch_size=size.patch_size, cross=kind == "idefics")
        case "llava_next" | "llava_onevision":
            return images.policy
        case "internvl":
            return InternVL(image_size=size.image_size, patch_size=size.patch_size)
        case "mllama":
            return Mllama(image_size=size.tile_size, patch_size=size.patch_size, max_tiles=size.max_tiles)
        case "qwen2_vl" | "qwen2_5_vl" | "qwen3_vl":
            return Native(
                patch_size=size.patch_size, merge_size=size.merge_size, temporal_patch_size=size.temporal_patch_size
            )  # fmt: skip
    raise ValueError(f"fastmllm::mllm_shape: {origin}: pictures of {kind!r} come through its processor only")
