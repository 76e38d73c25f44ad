"""Models that read an image by cross-attention: what the tower gives is compressed, and the text stays as it is.

Llama-3.2-Vision's language model and Idefics' gated layers attend to the tokens of the tower, BLIP-2's Q-Former and
Idefics' perceiver do so for a few queries. A class token stays in front of the K tokens of each image, or tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.compression.budget import tokens_to_keep
from fastmllm.hf.compress.listening import listening, watched
from fastmllm.hf.compress.seams import KEY, Seam, family_of
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.fusion import Fusion, arguments

# package under transformers.models -> the seam, and the classes that have the tower
CROSSED: Mapping[str, tuple[Seam, tuple[str, ...]]] = {
    "mllama": (Seam(prefix="Mllama", connector=None, crossed=True), ("MllamaModel",)),
    "idefics": (Seam(prefix="Idefics", connector=None, tower="vision_model", crossed=True), ("IdeficsModel",)),
    "blip_2": (
        Seam(prefix="Blip2", connector=None, tower="vision_model", crossed=True),
        ("Blip2ForConditionalGeneration", "Blip2Model"),
    ),
    "instructblip": (
        Seam(prefix="InstructBlip", connector=None, tower="vision_model", crossed=True),
        ("InstructBlipForConditionalGeneration", "InstructBlipModel"),
    ),
}


class Encoded(Fusion):
    """The tower: K tokens of each image or tile behind its class token."""

    op = "compress"

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state: Compression = module.__dict__[KEY]
        with state.call(), listening(state.tower):
            out = original(module, *args, **kwargs)
            x = _kept(state, out[0])
        if isinstance(out, tuple):
            return (x, *out[1:])
        out.last_hidden_state = x
        return out


def _kept(state: Compression, x: Tensor) -> Tensor:
    """Return (..., 1 + K, C) of (..., 1 + N, C)."""
    images = x.flatten(0, -3)
    patches = images[:, 1:]
    kept = state.dense(patches)
    if kept is patches:
        return x
    return torch.cat([images[:, :1], kept], 1).unflatten(0, x.shape[:-2])


class CrossMask(Fusion):
    """Llama-3.2-Vision's language model: its mask names every token of every tile, of which as many go."""

    op = "compress"

    @staticmethod
    def forward(module: Any, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state: Compression = module.__dict__[KEY]
        call = arguments(original, args, kwargs)
        assert state.compressor is not None
        tile = state.owner.vision_model.num_patches
        left = 1 + tokens_to_keep(state.compressor.name, state.compressor.keep, (tile - 1,))[0]
        states, mask = call.get("cross_attention_states"), call.get("cross_attention_mask")
        if states is not None and states.shape[-2] != left:
            raise ValueError(
                f"compress: cross_attention_states of {states.shape[-2]} tokens a tile, but {left} are left of each: "
                "give pixel_values"
            )
        if mask is not None and left != tile:  # it is the same for all tokens of a tile
            call["cross_attention_mask"] = mask.unflatten(-1, (-1, tile))[..., :left].flatten(-2)
        return original(module, **call)


def find_crossed(model: nn.Module) -> tuple[str, Any, Seam] | None:
    """Return the outermost module with a tower whose images are read by cross-attention: name, module and seam."""
    for name, module in model.named_modules():
        package, cls = family_of(module)
        seam, owners = CROSSED.get(package or "", (None, ()))
        if seam is not None and cls.__name__ in owners:
            return name, module, seam
    return None


def crossed(
    state: Compression, root: nn.Module, name: str
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], str | None]]:
    """Yield the parts that take part, as `compress_fusions` does.

    Args:
        state: of the model.
        root: the model that is patched.
        name: in it of what has the tower.
    """
    owner, kept = state.owner, {KEY: state}
    yield f"{name}.vision_model".lstrip("."), owner.vision_model, Encoded, kept, state.said
    if state.seam.prefix == "Mllama":
        yield f"{name}.language_model".lstrip("."), owner.language_model, CrossMask, kept, None
    if state.tower is not None:
        yield from watched(state.tower, root)
