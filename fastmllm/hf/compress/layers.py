"""The layers of a language model in front of which visual tokens are dropped.

A stage runs when its layer is called, so that gradient checkpointing recomputes the layer on the rows that it had;
positions stay, and each group of layers has its own mask and its own length of cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.compression import Compressor
from fastmllm.hf.compress.fitting import check_stage
from fastmllm.hf.compress.listening import PROJECTIONS, Listener, Watched, WatchedKeys, listening
from fastmllm.hf.compress.rows import PAD
from fastmllm.hf.compress.seams import KEY, Seam, family_of
from fastmllm.hf.compress.state import Compression
from fastmllm.hf.fusion import STATE, Fusion, arguments

NUMBER = STATE + "layer"
# packages under transformers.models whose decoder layers are Llama's in what they are called with
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TURNS = "its layers take turns with a sliding window, which a cache of fewer tokens would measure otherwise"


class StagedLayer(Fusion):
    """A decoder layer from the first stage on, or the one in front of it.

    Its call is replaced, not its forward: gradient checkpointing computes a forward anew, in another order.
    """

    op = "compress"
    overrides = ("__call__",)

    @staticmethod
    @torch.compiler.disable(recursive=False)
    def __call__(module: Any, original: Callable[..., Any], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        state: Compression = module.__dict__[KEY]
        way, layer = state.now.way, module.__dict__[NUMBER]
        if way is None:
            return original(module, hidden_states, *args, **kwargs)
        if args:
            kwargs = arguments(type(module).forward, (hidden_states, *args), kwargs)
            del kwargs["hidden_states"]
        x = way.enter(layer, hidden_states, state.layers.get(layer - 1), kwargs.get("past_key_values"))
        kwargs = way.arranged(layer, kwargs, x.dtype)
        listener = None if way.reduction is None else state.layers.get(layer)
        if listener is not None:
            listener.turned(kwargs["position_embeddings"])
        with listening(listener):
            return original(module, x, **kwargs)


class StagedText(Fusion):
    """A language model with DeepStack: features of an image are added to the tokens that are left of it."""

    op = "compress"
    overrides = ("_deepstack_process",)

    @staticmethod
    def _deepstack_process(
        module: Any, original: Callable[..., Tensor], hidden_states: Tensor, visual_pos_masks: Tensor,
        visual_embeds: Tensor,
    ) -> Tensor:  # fmt: skip
        way = module.__dict__[KEY].now.way
        number = 0 if way is None else way.group(way.layer)
        if not number or way.reduction is None or not way.lost(number):
            return original(module, hidden_states, visual_pos_masks, visual_embeds)
        index = way.new[number].index.to(visual_pos_masks.device)
        at = torch.where(index == PAD, 0, index - way.held.columns)
        mask = visual_pos_masks.gather(1, at) & (index != PAD)
        ordinal = (visual_pos_masks.flatten().cumsum(0) - 1).view_as(visual_pos_masks).gather(1, at)
        places = torch.nonzero_static(mask.flatten(), size=sum(way.reduction.visual.seqlens))[:, 0]
        chosen = ordinal.flatten().index_select(0, places).to(visual_embeds.device)
        return original(module, hidden_states, mask, visual_embeds.index_select(0, chosen))


def take_stages(state: Compression, stages: tuple[tuple[int, Compressor], ...]) -> None:
    """Let a model compress in front of layers of its language model.

    Raises:
        ValueError: this model cannot be compressed so.
    """
    layers = _layers(state.text, state.seam)
    for layer, compressor in stages:
        check_stage(layer, compressor, state.seam, len(layers))
    weight = next(p for p in layers[0].parameters() if p.is_floating_point())
    state.stages = tuple((n, c.to(weight)) for n, c in stages)
    window = state.text.config.sliding_window if "sliding_attention" in _kinds(state.text) else None
    parts = dict(zip(PROJECTIONS, (Watched, WatchedKeys), strict=True))  # not its norms: those may be operators of ours
    for layer, compressor in stages:
        if compressor.layer is not None:
            heard = Listener(layers[layer - 1].self_attn, parts, compressor.name, layer - 1, window)
            state.layers[layer - 1] = heard


def staged(state: Compression, at: str) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], str | None]]:
    """Yield the layers that take part, and what calls them, as `compress_fusions` does.

    Args:
        state: of the model.
        at: the name of its language model.
    """
    if hasattr(state.text, "_deepstack_process"):
        yield at, state.text, StagedText, {KEY: state}, None
    said = {n: f"{c.name}, K = {c.keep}, {c.mode}, in front of it" for n, c in state.stages}
    for number in range(state.stages[0][0] - 1, len(state.text.layers)):
        kept = {KEY: state, NUMBER: number}
        yield f"{at}.layers.{number}", state.text.layers[number], StagedLayer, kept, said.get(number)


def _kinds(text: Any) -> set[str]:
    """Return what attention the layers of a language model have."""
    config = text.config
    sliding = getattr(config, "sliding_window", None) is not None
    return set(getattr(config, "layer_types", None) or ["sliding_attention" if sliding else "full_attention"])


def _layers(text: Any, seam: Seam) -> Any:
    """Return the decoder layers of a language model.

    Raises:
        ValueError: what its layers do with their rows is not known.
    """

    def refuse(why: str) -> None:
        raise ValueError(f"patch: cannot compress inside of the language model of {seam.prefix}: {why}")

    if len(_kinds(text)) > 1 or seam.prefix == "Gemma3":
        refuse(TURNS)
    layers = getattr(text, "layers", ())
    for layer in layers:
        package, cls = family_of(layer)
        if package not in DECODERS or not cls.__name__.endswith("DecoderLayer"):
            refuse(f"how a {cls.__name__} takes its rows is not known; known families: {', '.join(DECODERS)}")
    if not len(layers):
        refuse(f"{type(text).__name__} has no list of layers")
    return layers
