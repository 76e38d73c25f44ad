"""What a fresh composition is made of, and which parts go together."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from fastmllm.models.decoder import LanguageConfig
from fastmllm.models.eva import EvaConfig
from fastmllm.models.mllama_vision import MllamaVisionConfig
from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.vision import VisionConfig

ENCODERS: dict[str, type] = {"vit": VisionConfig, "qwen": QwenVisionConfig, "mllama": MllamaVisionConfig}
EncoderConfig = VisionConfig | QwenVisionConfig | MllamaVisionConfig

_GRIDS = ("mlp", "pixel_shuffle", "abstractor", "ldp", "token_packer")  # what comes out is still a grid
_PROJECTING = (*_GRIDS, "qformer", "resampler")  # what comes out has the language model's width
_ACROSS = ("flamingo", "idefics", "mllama")
# (one part, another): value of the one -> values of the other that it goes with
RULES: Mapping[tuple[str, str], Mapping[str, tuple[str, ...]]] = {
    ("resolution", "encoder"): {
        "fixed": ("vit",), "anyres": ("vit",), "tiles": ("vit",), "dual": ("vit",), "native": ("vit", "qwen"),
        "mllama": ("mllama",),
    },
    ("encoder", "connector"): {"vit": (*_PROJECTING, "none"), "qwen": ("merger",), "mllama": ("none",)},
    ("resolution", "fusion"): {
        "fixed": ("tokens", *_ACROSS), "tiles": ("tokens", *_ACROSS), "native": ("tokens", *_ACROSS, "deepstack"),
        "anyres": ("tokens",), "mllama": _ACROSS, "dual": ("cogagent",),
    },
    ("fusion", "connector"): {
        "tokens": (*_PROJECTING, "merger"), "cogagent": _PROJECTING, "deepstack": ("merger",),
        **dict.fromkeys(_ACROSS, (*_PROJECTING, "merger", "none")),
    },
    ("resolution", "connector"): {
        "anyres": _GRIDS,
        **dict.fromkeys(("fixed", "tiles", "dual", "native", "mllama"), (*_PROJECTING, "merger", "none")),
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ConnectorSizes:
    """Say how large a connector is; each kind reads what it has.

    Args:
        block: side of the block of patches that becomes one token (pixel_shuffle, ldp, token_packer).
        tokens: of an image or tile (qformer, resampler).
        side: of the grid of tokens that comes out (abstractor).
        width: inside (qformer, abstractor, token_packer); None for the encoder's. A resampler has the width of what
            reads it: the language model's for tokens in the text, the encoder's for cross-attention.
        depth: layers (qformer, resampler), or blocks before and behind the pool (abstractor).
        num_heads: of a qformer or resampler.
        head_dim: of a resampler or token_packer.
        mlp_width: hidden width of a qformer's feed-forward, and of the gated MLP in front of a resampler of tokens;
            None for four times the width.
    """

    block: int = 2
    tokens: int = 64
    side: int = 12
    width: int | None = None
    depth: int = 3
    num_heads: int = 16
    head_dim: int = 96
    mlp_width: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolutionSizes:
    """Say how a resolution policy takes images; each reads what it has.

    Args:
        fit: "resize", "crop" or "pad" (fixed).
        pinpoints: canvases in pixels (anyres); None for LLaVA-NeXT's five in tiles of the encoder's size.
        max_tiles: tiles of a grid (tiles; None: 12), or k of anyres_max_k (anyres; None: never shrunk).
        min_tiles: of a grid (tiles).
        thumbnail: whether an overview comes behind several tiles (tiles).
        min_pixels, max_pixels: of an image (native).
    """

    fit: str = "resize"
    pinpoints: tuple[tuple[int, int], ...] | None = None
    max_tiles: int | None = None
    min_tiles: int = 1
    thumbnail: bool = True
    min_pixels: int | None = 56 * 56
    max_pixels: int | None = 28 * 28 * 1280


@dataclass(frozen=True, kw_only=True, slots=True)
class MLLMConfig:
    """Name the parts of a multimodal model; plain values and nested dataclasses, as a YAML file holds them.

    Args:
        encoder: the image tower.
        language: the decoder.
        image_token_id: stands in the text where an image is.
        resolution: "fixed"; "anyres" (LLaVA-NeXT); "tiles" (InternVL); "native"; "mllama" (Llama-3.2-Vision); "dual"
            (CogAgent: each image twice, in the text and beside it).
        connector: "mlp", "pixel_shuffle", "qformer", "resampler", "abstractor", "ldp", "token_packer"; "merger" is in
            a Qwen tower; "none" leaves the tower's tokens to cross-attention.
        fusion: "tokens" in the text; "flamingo", "idefics", "mllama": layers that look across; "cogagent": modules
            inside every layer that look at `high_res`; "deepstack": tokens, and a Qwen tower's early features.
        connector_sizes: of the connector.
        resolution_sizes: of the resolution policy.
        cross_every: decoder layers from one cross layer to the next. Idefics' stand before layers 0, n, 2n, ...;
            Flamingo's and Llama's before n - 1, 2n - 1, ...
        cross_layers: the decoder layers that they stand before (CogAgent: inside of), instead; `depth` is behind all.
        high_res: the tower of "dual" whose tokens are seen across.

    Raises:
        ValueError: parts that do not go together, with what would.
    """

    encoder: EncoderConfig
    language: LanguageConfig
    image_token_id: int
    resolution: str = "fixed"
    connector: str = "mlp"
    fusion: str = "tokens"
    connector_sizes: ConnectorSizes = field(default_factory=ConnectorSizes)
    resolution_sizes: ResolutionSizes = field(default_factory=ResolutionSizes)
    cross_every: int = 4
    cross_layers: tuple[int, ...] | None = None
    high_res: EvaConfig | None = None

    def __post_init__(self) -> None:
        for (one, other), goes in RULES.items():
            mine, theirs = self.part(one), self.part(other)
            if mine not in goes:
                raise ValueError(f"MLLMConfig: {one} {mine!r} is not one of {', '.join(goes)}")
            if theirs in goes[mine]:
                continue
            back = [name for name, allowed in goes.items() if theirs in allowed]
            raise ValueError(
                f"MLLMConfig: {one} {mine!r} and {other} {theirs!r} do not go together: {one} {mine!r} goes with "
                f"{other} {', '.join(goes[mine])}; {other} {theirs!r} "
                + (f"with {one} {', '.join(back)}" if back else "is not known")
            )
        for holds, message in _VALUES:
            if not holds(self):
                raise ValueError(f"MLLMConfig: {message.format(c=self)}")

    def part(self, name: str) -> str:
        """Return the name of a part: "encoder", "resolution", "connector" or "fusion"."""
        if name == "encoder":
            return next((kind for kind, cls in ENCODERS.items() if isinstance(self.encoder, cls)), repr(self.encoder))
        return str(getattr(self, name))

    @property
    def places(self) -> tuple[int, ...]:
        """Decoder layers that a cross layer stands before, or inside of (CogAgent)."""
        depth = self.language.depth
        if self.cross_layers is not None:
            return self.cross_layers
        if self.fusion == "cogagent":
            return tuple(range(depth))
        if self.fusion == "idefics":
            return tuple(k * self.cross_every for k in range(depth // self.cross_every))
        return tuple(range(self.cross_every - 1, depth, self.cross_every)) if self.fusion in _ACROSS else ()


def _planes(config: MLLMConfig) -> int:
    return len(getattr(config.encoder, "deepstack_layers", ()))


# what must hold of the values -> what is said where it does not
_VALUES: tuple[tuple[Callable[[MLLMConfig], bool], str], ...] = (
    (
        lambda c: 0 <= c.image_token_id < c.language.vocab_size + c.language.extra_embeddings,
        "image_token_id {c.image_token_id} has no row among the {c.language.vocab_size} + "
        "{c.language.extra_embeddings} embeddings",
    ),
    (
        lambda c: (c.resolution == "dual") == (c.high_res is not None),
        "resolution {c.resolution!r} and high_res do not go together: 'dual' has a high_res tower, no other has",
    ),
    (
        lambda c: c.high_res is None or c.high_res.patch_size == c.encoder.patch_size,
        "encoder and high_res of 'dual' must have one patch_size, got {c.encoder.patch_size} and another",
    ),
    (
        lambda c: (c.fusion == "deepstack") == (_planes(c) > 0),
        "fusion {c.fusion!r} and encoder {c.encoder} do not go together: deepstack_layers go with fusion 'deepstack'",
    ),
    (lambda c: _planes(c) <= c.language.depth, "deepstack_layers are more than the {c.language.depth} decoder layers"),
    (
        lambda c: c.connector != "merger" or c.fusion in _ACROSS or c.encoder.out_width == c.language.width,  # type: ignore[union-attr]
        "connector 'merger' makes tokens of another width than language.width {c.language.width}: set out_width",
    ),
    (
        lambda c: c.resolution != "native" or getattr(c.encoder, "resample", "") != "none",
        "resolution 'native' and resample 'none' do not go together: use resample 'bicubic' or 'antialias'",
    ),
    (lambda c: c.cross_every >= 1, "cross_every must be at least 1, got {c.cross_every}"),
    (
        lambda c: c.cross_layers is None or c.fusion in (*_ACROSS, "cogagent"),
        "cross_layers {c.cross_layers} and fusion {c.fusion!r} do not go together: flamingo, idefics, mllama and "
        "cogagent have such layers",
    ),
    (
        lambda c: (
            c.fusion not in (*_ACROSS, "cogagent")
            or (
                len(c.places) > 0
                and list(c.places) == sorted(set(c.places))
                and c.places[0] >= 0
                and c.places[-1] <= c.language.depth - (c.fusion == "cogagent")
            )
        ),
        "cross layers {c.places} of fusion {c.fusion!r} must ascend within the {c.language.depth} decoder layers, and "
        "there must be one: set cross_every or cross_layers",
    ),
)


def to_json(config: MLLMConfig) -> dict[str, Any]:
    """Return the configuration as plain values; `encoder` has its kind among them."""
    raw = asdict(config)
    raw["encoder"] = {"kind": config.part("encoder"), **raw["encoder"]}
    return raw


def from_json(raw: Mapping[str, Any], origin: str) -> MLLMConfig:
    """Read what `to_json` wrote.

    Args:
        raw: plain values; what is left out has its default.
        origin: what the messages call it.

    Raises:
        ValueError: an unknown or a missing name, a value of another kind, or parts that do not go together.
    """
    raw = dict(raw)
    encoder = raw.get("encoder")
    kind = encoder.get("kind") if isinstance(encoder, Mapping) else None
    if not isinstance(encoder, Mapping) or kind not in ENCODERS:
        raise ValueError(f"fastmllm::MLLM: {origin}: encoder needs a kind, one of {', '.join(ENCODERS)}; got {kind!r}")
    raw["encoder"] = _read(ENCODERS[kind], {k: v for k, v in encoder.items() if k != "kind"}, f"{origin}: encoder")
    config: MLLMConfig = _read(MLLMConfig, raw, origin)
    return config


def _read(cls: type, raw: Mapping[str, Any], origin: str) -> Any:
    """Make a dataclass of plain values: lists become tuples, mappings the dataclass that the field has."""
    known = {f.name: f for f in fields(cls)}
    unknown = [name for name in raw if name not in known]
    missing = [n for n, f in known.items() if n not in raw and f.default is MISSING and f.default_factory is MISSING]
    if unknown or missing:
        what = f"has no {unknown[0]!r}" if unknown else f"needs {missing[0]!r}"
        raise ValueError(f"fastmllm::MLLM: {origin}: {cls.__name__} {what}")
    hints = get_type_hints(cls)
    return cls(**{name: _value(hints[name], value, f"{origin}: {name}") for name, value in raw.items()})


def _value(hint: Any, value: Any, origin: str) -> Any:
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    nested = tuple(option for option in options if isinstance(option, type) and is_dataclass(option))
    if not nested:
        for option in options:
            try:
                return _plain(option, value)
            except (TypeError, ValueError):
                continue
        kind = hint.__name__ if isinstance(hint, type) else str(hint)
        raise ValueError(f"fastmllm::MLLM: {origin}: expected {kind}, found {value!r}")
    if isinstance(value, Mapping):
        return _read(nested[0], value, origin)
    if isinstance(value, nested) or (value is None and types.NoneType in options):
        return value
    raise ValueError(f"fastmllm::MLLM: {origin}: {value!r} is no {nested[0].__name__}")


def _plain(hint: Any, value: Any) -> Any:
    """Return a value as a field of this kind holds it; a TypeError or ValueError where it is of another."""
    inner = get_args(hint)
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
        return tuple(_plain(kind, item) for kind, item in zip(kinds, value, strict=True))
    if hint is float and not isinstance(value, bool):  # YAML reads 1e-6 as text
        return float(value)
    if value is None and hint is types.NoneType:
        return None
    if hint in (int, bool, str) and type(value) is hint:
        return value
    raise TypeError
