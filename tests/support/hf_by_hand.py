"""What a model of transformers computes with compressed images, put together by hand: row by row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_hf import IMAGE
from torch import nn

from fastmllm.compression import Compressor, Tokens

VIDEOS = {"pixel_values": "pixel_values_videos", "image_grid_thw": "video_grid_thw"}  # what Qwen's come as
CONNECTORS = ("multi_modal_projector", "connector")


def image_tokens(
    model: Any, kind: Any, compressor: Compressor, numbers: Sequence[int] | None = None
) -> list[tuple[torch.Tensor, list[torch.Tensor], Any]]:
    """Return of each image its tokens behind the connector, those of DeepStack, and where they stood, or None.

    The model is not patched; each image, or each of `numbers`, is encoded alone.
    """
    out = []
    for number in range(len(kind.tiles)) if numbers is None else numbers:
        out.append(_one(model.model, kind, compressor, kind.rows((([1], number, [20]),)), kind.tiles[number]))
    return out


def _one(owner: Any, kind: Any, compressor: Compressor, batch: dict[str, Any], tiles: int) -> Any:
    if "pixel_values_videos" in batch and not kind.mrope:
        (x,) = owner.get_video_features(batch["pixel_values_videos"], return_dict=True).pooler_output
        frames = batch["pixel_values_videos"].shape[1]
        kept, _ = compressor(Tokens.of(x[: frames * 4], [(frames, 2, 2)]))
        return torch.cat([kept.x, owner.image_newline[None]]), [], None
    names = {"image_sizes": "image_sizes", **{k: image for image, video in VIDEOS.items() for k in (image, video)}}
    pixels = {names[k]: v for k, v in batch.items() if k in names}  # Qwen's towers see a video as an image of frames
    if kind.mrope:
        features = owner.get_image_features(**pixels, return_dict=True)
        deep = [f if torch.is_tensor(f) else torch.cat(tuple(f)) for f in getattr(features, "deepstack_features", ())]
        t, h, w = pixels["image_grid_thw"][0].tolist()
        tokens = Tokens.of(features.pooler_output[0], [(t, h // 2, w // 2)], planes=deep)
        kept, _ = compressor(tokens)
        return kept.x, list(kept.planes), kept.pos[:, 0]
    connector = next(getattr(owner, name) for name in CONNECTORS if hasattr(owner, name))
    behind = kind.name in ("gemma3", "idefics2", "idefics3", "smolvlm")
    seen = {}

    def look(module: nn.Module, args: Any, kwargs: Any, out: torch.Tensor) -> None:
        seen["x"] = out if behind else args[0] if args else next(iter(kwargs.values()))

    hook = connector.register_forward_hook(look, with_kwargs=True)
    whole = owner.get_image_features(**pixels, return_dict=True).pooler_output
    hook.remove()
    x = seen["x"]
    assert len(x) == tiles
    tokens = Tokens.of(x.flatten(0, 1), [(4, 4) if kind.grid else (len(x[0]), 1)] * tiles)
    kept, _ = compressor(tokens)
    if kept is tokens:  # as the model lays it out, with ends of lines
        return whole[0], [], None
    return kept.x if behind else connector(kept.x), [], None


def logits(
    model: Any, kind: Any, images: list[Any], row: tuple[Any, ...], answer: tuple[int, ...] = ()
) -> torch.Tensor:
    """Return the logits (T', V) of one row and an answer so far."""
    embed, owner = model.get_input_embeddings(), model.model
    parts, deep, visual, columns, full = [], [], [], [], []
    for part in (*row, list(answer)):
        if isinstance(part, int):
            x, layers, pos = images[part]
            parts.append(x)
            deep.append(layers)
            if pos is not None:
                columns.append(pos + len(full))
            full += [IMAGE] * kind.places[part]
        else:
            parts.append(embed(torch.tensor(part, dtype=torch.long)))
            columns.append(torch.arange(len(part)) + len(full))
            full += part
        visual += [isinstance(part, int)] * len(parts[-1])
    call: dict[str, Any] = {"inputs_embeds": torch.cat(parts)[None], "use_cache": False}
    if kind.types and not kind.mrope:
        name, text, image = kind.types
        types = [image if v else text for v in visual]
        if kind.name == "paligemma":
            types[len(types) - len(answer) :] = [1] * len(answer)
        call[name] = torch.tensor(types)[None]
    if not kind.mrope:
        return model(**call).logits[0]
    call["position_ids"] = _positions(owner, kind, row, full)[:, :, torch.cat(columns)]
    if any(deep):
        call["visual_pos_masks"] = torch.tensor(visual)[None]
        call["deepstack_visual_embeds"] = [torch.cat(layer) for layer in zip(*deep, strict=True)]
    return model.lm_head(owner.language_model(**call).last_hidden_state)[0]


def _positions(owner: Any, kind: Any, row: tuple[Any, ...], full: list[int]) -> torch.Tensor:
    """Return (3, 1, T): text counts on, an image stands in a plane of its own and takes the longer side of room."""
    positions, at = [], 0
    for part in row:
        if isinstance(part, list):
            positions += [(at + i,) * 3 for i in range(len(part))]
            at += len(part)
        else:
            t, h, w = (n // k for n, k in zip(kind.images[part][1], (1, 2, 2), strict=True))
            positions += [(at + f, at + y, at + x) for f in range(t) for y in range(h) for x in range(w)]
            at += max(h, w)
    positions += [(at + i,) * 3 for i in range(len(full) - len(positions))]
    return torch.tensor(positions).t()[:, None]


def answer(model: Any, kind: Any, images: list[Any], row: tuple[Any, ...], length: int) -> list[int]:
    """Return what is the likeliest, one token after the other, without a cache."""
    said: tuple[int, ...] = ()
    for _ in range(length):
        said = (*said, int(logits(model, kind, images, row, said)[-1].argmax()))
    return list(said)
