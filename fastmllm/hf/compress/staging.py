"""Which language models take stages, which compressors fit there, and the modules that take part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from fastmllm.compression import Compressor
from fastmllm.hf.compress.layers import StagedHead, StagedLayer, StagedOwner, StagedText
from fastmllm.hf.compress.listening import Listener
from fastmllm.hf.compress.seams import Seam, family_of
from fastmllm.hf.compress.stages import NUMBER, STAGES, Stages, asks
from fastmllm.hf.fusion import Fusion

# packages under transformers.models whose decoder layers are Llama's in what they are called with
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
PREFIX = "its prompt sees all of itself, and scores are those of causal attention"
TURNS = "its layers take turns with a sliding window, which a cache of fewer tokens would measure otherwise"


def stage_fusions(
    stages: tuple[tuple[int, Compressor], ...], name: str, module: Any, seam: Seam
) -> Iterator[tuple[str, nn.Module, type[Fusion], dict[str, Any], str | None]]:
    """Yield the modules that take part, as `compress_fusions` does.

    Args:
        stages: (layer, compressor).
        name: of `module` in the model.
        module: the one that takes images as tokens.
        seam: its.

    Raises:
        ValueError: this model cannot be compressed so.
    """
    head = not family_of(module)[1].__name__.endswith("Model")
    owner, at = (module.model, f"{name}.model".lstrip(".")) if head else (module, name)
    inner = "language_model" if hasattr(owner, "language_model") else "text_model"
    text, inside = getattr(owner, inner), f"{at}.{inner}".lstrip(".")
    layers = _layers(text, seam)
    for layer, compressor in stages:
        _check(layer, compressor, seam, len(layers))
    weight = next(p for p in layers[0].parameters() if p.is_floating_point())
    state = Stages(tuple((n, c.to(weight)) for n, c in stages), seam, owner, text, module if head else None)
    window = text.config.sliding_window if "sliding_attention" in _kinds(text) else None
    for layer, compressor in stages:
        if compressor.layer is not None:
            state.listeners[layer - 1] = Listener(layers[layer - 1].self_attn, layer - 1, window)
    if head:
        yield name, module, StagedHead, {}, None
    yield at, owner, StagedOwner, {STAGES: state}, None
    if hasattr(text, "_deepstack_process"):
        yield inside, text, StagedText, {STAGES: state}, None
    said = {n: f"{c.name}, K = {c.keep}, {c.mode}, in front of it" for n, c in stages}
    for number in range(stages[0][0] - 1, len(layers)):
        kept = {STAGES: state, NUMBER: number}
        yield f"{inside}.layers.{number}", layers[number], StagedLayer, kept, said.get(number)


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


def _check(layer: int, compressor: Compressor, seam: Seam, depth: int) -> None:
    """Refuse a stage that has no place in this model.

    Raises:
        ValueError: says why.
    """

    def refuse(why: str) -> None:
        raise ValueError(
            f"patch: cannot compress {seam.prefix} with {compressor.name} in front of layer {layer}: {why}"
        )

    if not 0 < layer < depth:
        behind = "in front of the first one stands the connector: Placement(connector=…)"
        refuse(behind if not layer else f"its language model has {depth}")
    if compressor.position == "renumber":
        refuse("earlier layers keep their positions: position='keep' or 'calibrate'")
    if compressor.name == "temporal_dedup":
        refuse("it wants the frames of videos, and these are images")
    options = {getattr(compressor, name, None) for name in ("scorer", "relevance")}
    if options & {"given", "external"}:
        refuse("nobody gives it scores there")
    if "cls_row" in options and asks(compressor):
        refuse("a language model has no class token: scorer 'last_row', 'text_rows' or 'received'")
    if seam.prefix == "PaliGemma" and asks(compressor):
        refuse(PREFIX)
