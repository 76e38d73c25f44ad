"""Tiny models whose images have enough tokens to lose some, and rows of several images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from hf_checks import in_dtype
from tiny_hf import BOS, CLIP, IDS, IMAGE, LLAMA, PAD, SIGLIP, VIDEO, draw, finish
from torch import nn

BIG = {**SIGLIP, "image_size": 56}  # 64 patches
TILES = [[28, 56], [56, 28], [56, 56]]
QTEXT = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 2, 2]}}
START = 7  # of an image; Qwen's models in transformers < 5.23 count images by it where beams repeat them
QIDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": 8}
# rows of text and images by number: two images, none, one
ROWS = (
    ([BOS, 20, START], 0, [22, 23, START], 1, [25, 26, 27, 28]),
    ([BOS, 40, 41, 42, 43],),
    ([BOS, START], 2, [30, 31, 32, 33, 34]),
)

NEXT = (([50, START], 2, [51, 52]), ([53, START], 2, [54, 55]), ([56, START], 1, [57, 58]))  # what rows go on with


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """One family.

    Args:
        name: its package in transformers.
        build: fp64, the same weights every time.
        images: of each image, pixels and, where there is one, grid or size.
        places: how many placeholders each has.
        keep: tokens that are to be left of each, or of each tile.
        tiles: of each image.
        batched: lays the pixels of some rows' images out as the model takes them.
        types: the token types of a row's text and images: name, of text, of an image.
        clips: which of the images are videos.
        filmed: lays those out.
    """

    name: str
    build: Callable[[], nn.Module]
    images: tuple[Any, ...]
    places: tuple[int, ...]
    keep: int
    batched: Callable[[Any, list[list[int]]], dict[str, Any]]
    tiles: tuple[int, ...] = (1, 1, 1)
    types: tuple[str, int, int] | None = None
    grid: bool = True
    clips: tuple[int, ...] = ()
    filmed: Callable[[Any, list[list[int]]], dict[str, Any]] | None = None

    def __repr__(self) -> str:
        return self.name

    @property
    def mrope(self) -> bool:
        return self.name.startswith("qwen")

    def rows(self, rows=ROWS, side: str = "right", labels: bool = False) -> dict[str, Any]:
        """Return a batch as a processor gives it, without compression."""
        texts = [[t for part in row for t in (part if isinstance(part, list) else self.written(part))] for row in rows]
        longest = max(map(len, texts))

        def padded(values: list[list[int]], fill: int) -> torch.Tensor:
            gaps = [[fill] * (longest - len(v)) for v in values]
            return torch.tensor([v + g if side == "right" else g + v for v, g in zip(values, gaps, strict=True)])

        batch = {"input_ids": padded(texts, PAD), "attention_mask": padded([[1] * len(t) for t in texts], 0)}
        if self.types:
            name, text, image = self.types
            batch[name] = padded([[{IMAGE: image, VIDEO: 2}.get(t, text) for t in row] for row in texts], 0)
        if labels:
            batch["labels"] = padded([[-100] * (len(t) - 4) + t[-4:] for t in texts], -100)
        which = [[part for part in row if isinstance(part, int) and part not in self.clips] for row in rows]
        shown = [[part for part in row if part in self.clips] for row in rows]
        seen = self.batched(self.images, which) if any(which) else {}
        if any(shown):
            seen |= self.filmed(self.images, shown)
        return {**batch, **seen}

    def written(self, number: int) -> list[int]:
        """Return the placeholders of an image or video."""
        return [VIDEO if number in self.clips else IMAGE] * self.places[number]


def flat(images, which):
    return {"pixel_values": torch.stack([images[i] for row in which for i in row])}


def tiled(images, which):
    chosen = [images[i] for row in which for i in row]
    most = max(len(pixels) for pixels, _ in chosen)
    filled = [torch.cat([p, p.new_zeros(most - len(p), *p.shape[1:])]) for p, _ in chosen]
    return {"pixel_values": torch.stack(filled), "image_sizes": torch.tensor([size for _, size in chosen])}


def slots(images, which):
    most = max(map(len, which))
    blank = torch.zeros_like(images[0])
    return {"pixel_values": torch.stack([torch.stack([images[i] for i in row] + [blank] * (most - len(row)))
                                         for row in which])}  # fmt: skip


def patches(images, which):
    chosen = [images[i] for row in which for i in row]
    return {"pixel_values": torch.cat([p for p, _ in chosen]), "image_grid_thw": torch.tensor([g for _, g in chosen])}


def _pictures(side: int) -> tuple[torch.Tensor, ...]:
    return tuple(draw(3, side, side, seed=s).double() for s in (1, 2, 3))


def _tiles() -> tuple[Any, ...]:
    # 5 tiles whole; 3 tiles of which a part is padding
    return (
        (draw(5, 3, 28, 28, seed=1).double(), (56, 56)),
        (draw(3, 3, 28, 28, seed=2).double(), (28, 56)),
        (draw(3, 3, 28, 28, seed=3).double(), (40, 28)),
    )


def _patches() -> tuple[Any, ...]:
    grids = ([1, 8, 8], [1, 4, 12], [1, 6, 8])
    return tuple((draw(t * h * w, 96, seed=s).double(), [t, h, w]) for s, (t, h, w) in enumerate(grids))


def _double(model: nn.Module) -> Any:
    return in_dtype(finish(model), torch.float64)


def llava():
    return _double(hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**LLAMA), image_token_id=IMAGE,
        vision_feature_layer=-2,
    )))  # fmt: skip


def llava_next():
    return _double(hf.LlavaNextForConditionalGeneration(hf.LlavaNextConfig(
        vision_config=hf.CLIPVisionConfig(**CLIP), text_config=hf.LlamaConfig(**LLAMA), image_token_id=IMAGE,
        image_grid_pinpoints=TILES, vision_feature_layer=-2,
    )))  # fmt: skip


def llava_onevision():
    return _double(hf.LlavaOnevisionForConditionalGeneration(hf.LlavaOnevisionConfig(
        vision_config=hf.SiglipVisionConfig(**SIGLIP), text_config=hf.Qwen2Config(**LLAMA), image_token_id=IMAGE,
        video_token_id=VIDEO, image_grid_pinpoints=TILES, vision_feature_layer=-1,
        vision_feature_select_strategy="full", vision_aspect_ratio="anyres_max_9",
    )))  # fmt: skip


def internvl():
    vision = {**BIG, "image_size": [56, 56], "patch_size": [7, 7], "hidden_act": "gelu", "attention_bias": True}
    return _double(hf.InternVLForConditionalGeneration(hf.InternVLConfig(
        vision_config=vision, text_config={"model_type": "qwen2", **LLAMA}, image_token_id=IMAGE, image_seq_length=16,
    )))  # fmt: skip


def paligemma():
    return _double(hf.PaliGemmaForConditionalGeneration(hf.PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "projection_dim": 48, **SIGLIP}, projection_dim=48,
        text_config={"model_type": "gemma", "head_dim": 12, **LLAMA}, image_token_id=IMAGE,
    )))  # fmt: skip


def gemma3():
    return _double(hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **BIG}, mm_tokens_per_image=16,
        text_config={"head_dim": 12, "sliding_window": 20, **LLAMA}, image_token_id=IMAGE,
    )))  # fmt: skip


def idefics2():
    perceiver = {"hidden_size": 48, "resampler_n_latents": 9, "resampler_depth": 1, "resampler_n_heads": 4,
                 "num_key_value_heads": 2, "resampler_head_dim": 12}  # fmt: skip
    return _double(hf.Idefics2ForConditionalGeneration(hf.Idefics2Config(
        vision_config=SIGLIP, text_config={"model_type": "mistral", **LLAMA}, perceiver_config=perceiver,
        image_token_id=IMAGE, pad_token_id=PAD,
    )))  # fmt: skip


def idefics3():
    return _double(hf.Idefics3ForConditionalGeneration(hf.Idefics3Config(
        vision_config=BIG, text_config={"model_type": "llama", **LLAMA}, scale_factor=2, image_token_id=IMAGE,
        pad_token_id=PAD,
    )))  # fmt: skip


def smolvlm():
    return _double(hf.SmolVLMForConditionalGeneration(hf.SmolVLMConfig(
        vision_config=BIG, text_config={"model_type": "llama", **LLAMA}, scale_factor=2, image_token_id=IMAGE,
        pad_token_id=PAD,
    )))  # fmt: skip


QVISION = {"depth": 2, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2,
           "temporal_patch_size": 2}  # fmt: skip


def qwen2_vl():
    vision = {**QVISION, "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return _double(hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(
        vision_config=vision, text_config=QTEXT, **QIDS, **IDS,
    )))  # fmt: skip


def qwen2_5_vl():
    vision = {**QVISION, "out_hidden_size": 48, "intermediate_size": 44, "window_size": 16,
              "fullatt_block_indexes": [1]}  # fmt: skip
    return _double(hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(
        vision_config=vision, text_config=QTEXT, **QIDS, **IDS,
    )))  # fmt: skip


def qwen3_vl():
    vision = {**QVISION, "out_hidden_size": 48, "intermediate_size": 44, "num_position_embeddings": 16,
              "deepstack_visual_indexes": [0, 1]}  # fmt: skip
    text = {**QTEXT, "head_dim": 12, "rope_parameters": {**QTEXT["rope_parameters"], "mrope_interleaved": True}}
    return _double(hf.Qwen3VLForConditionalGeneration(hf.Qwen3VLConfig(
        vision_config=vision, text_config=text, **QIDS, **IDS,
    )))  # fmt: skip


SIXTEEN, QWEN = (16, 16, 16), {"places": (16, 12, 12), "keep": 5, "types": ("mm_token_type_ids", 0, 1)}
KINDS = [
    Kind(name="llava", build=llava, images=_pictures(28), places=SIXTEEN, keep=4, batched=flat),
    Kind(name="llava_next", build=llava_next, images=_tiles(), places=(88, 52, 46), keep=4, batched=tiled,
         tiles=(5, 3, 3)),
    Kind(name="llava_onevision", build=llava_onevision, images=_tiles(), places=(88, 52, 46), keep=4, batched=tiled,
         tiles=(5, 3, 3)),
    Kind(name="internvl", build=internvl, images=_pictures(56), places=SIXTEEN, keep=4, batched=flat),
    Kind(name="paligemma", build=paligemma, images=_pictures(28), places=SIXTEEN, keep=4, batched=flat,
         types=("token_type_ids", 0, 0)),
    Kind(name="gemma3", build=gemma3, images=_pictures(56), places=SIXTEEN, keep=4, batched=flat,
         types=("token_type_ids", 0, 1)),
    Kind(name="idefics2", build=idefics2, images=_pictures(28), places=(9, 9, 9), keep=4, batched=slots, grid=False),
    Kind(name="idefics3", build=idefics3, images=_pictures(56), places=SIXTEEN, keep=4, batched=slots),
    Kind(name="smolvlm", build=smolvlm, images=_pictures(56), places=SIXTEEN, keep=4, batched=slots),
    Kind(name="qwen2_vl", build=qwen2_vl, images=_patches(), batched=patches, **QWEN),
    Kind(name="qwen2_5_vl", build=qwen2_5_vl, images=_patches(), batched=patches, **QWEN),
    Kind(name="qwen3_vl", build=qwen3_vl, images=_patches(), batched=patches, **QWEN),
]  # fmt: skip


def follow(kind, before, said, rows):
    """Return the whole conversation as a user gives it: everything said, then what is new, images of that alone."""
    new = kind.rows(rows, side="left")
    ids, ones = torch.cat([said, new["input_ids"]], 1), torch.ones(len(said), said.shape[1])
    ones[:, : before["attention_mask"].shape[1]] = before["attention_mask"]
    batch = {**new, "input_ids": ids, "attention_mask": torch.cat([ones.long(), new["attention_mask"]], 1)}
    if kind.types:
        name = kind.types[0]
        types = torch.zeros_like(said)
        types[:, : before[name].shape[1]] = before[name]
        batch[name] = torch.cat([types, new[name]], 1)
    return batch
