"""What config.json of a language model, or the text part of a vision-language model's, says: read, and written back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from fastmllm.models.language import LanguageConfig
from fastmllm.models.rope import RopeScaling, yarn_magnitude
from fastmllm.models.weights.values import (
    MOST_LAYERS,
    named,
    read_flag,
    read_list,
    read_number,
    read_size,
    wrong,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Family:
    """Defaults of transformers' configuration class (5.23), and what its model computes whatever the config says."""

    sizes: tuple[int, int, int, int, int]  # vocabulary, width, MLP width, layers, heads
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width / heads
    max_positions: int
    norm_eps: float = 1e-6
    theta: float = 10000.0
    qkv_bias: bool = False  # always; otherwise `attention_bias` of the config decides
    attention_bias: bool = False  # the config may ask for biases on all four projections
    qk_norm: bool = False
    mrope: tuple[int, int, int] | None = None
    mrope_interleaved: bool = False
    window: str | None = None  # "all": sliding_window counts in all layers; "layers": as layer_types says; None: never


_LLAMA = _Family(sizes=(32000, 4096, 11008, 32, 32), max_positions=2048, attention_bias=True)
_QWEN = (151936, 4096, 22016, 32, 32)
_QWEN_VL = _Family(
    sizes=(152064, 8192, 29568, 80, 64), kv_heads=8, max_positions=32768, norm_eps=1e-5, theta=1e6, qkv_bias=True,
    mrope=(16, 24, 24), window="layers",
)  # fmt: skip
_FAMILIES: Mapping[str, _Family] = {
    "llama": _LLAMA,
    "mistral": _Family(sizes=(32000, 4096, 14336, 32, 32), kv_heads=8, max_positions=131072, window="all"),
    "qwen2": _Family(sizes=_QWEN, kv_heads=32, max_positions=32768, qkv_bias=True, window="layers"),
    "qwen3": _Family(
        sizes=_QWEN, kv_heads=32, head_dim=128, max_positions=32768, attention_bias=True, qk_norm=True, window="layers"
    ),
    "qwen2_5_vl_text": _QWEN_VL,
    "qwen2_vl_text": _QWEN_VL,
    "qwen3_vl_text": _Family(
        sizes=_QWEN, kv_heads=32, head_dim=128, max_positions=128000, theta=5e5, attention_bias=True, qk_norm=True,
        mrope=(24, 20, 20), mrope_interleaved=True,
    ),
    "mllama_text_model": _Family(
        sizes=(128256, 4096, 14336, 40, 32), kv_heads=8, max_positions=131072, norm_eps=1e-5, theta=5e5
    ),
    "idefics": _Family(sizes=(32000, 4096, 11008, 32, 32), max_positions=2048),
}  # fmt: skip
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_MLLAMA_CROSS = (3, 8, 13, 18, 23, 28, 33, 38)
_MLLAMA_EXTRA = 8  # embeddings behind the vocabulary, for the image token and its like
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def language_config(raw: Mapping[str, Any], origin: str) -> LanguageConfig:
    """Read the configuration of a decoder.

    Args:
        raw: config.json of a Llama, Mistral, Qwen2 or Qwen3, or the `text_config` of a vision-language model with its
            model_type (qwen2_vl_text, qwen2_5_vl_text, qwen3_vl_text, mllama_text_model), or Idefics' config.json.
            What it leaves out is as in transformers' configuration class. Where a whole model decides about tied
            embeddings, put its `tie_word_embeddings` in.
        origin: what the messages call it.

    Returns:
        The configuration. Of Llama-3.2-Vision `depth` counts the self-attention layers only; the tokens that Idefics
        adds are part of the vocabulary.

    Raises:
        ValueError: something that the decoder does not compute, or a value that is missing, of another kind or out of
            range; the message names the key, the value and `origin`.
    """
    if not isinstance(raw, Mapping):
        raise wrong(origin, "config", raw, "no object")
    kind = raw.get("model_type")
    if kind == "opt":
        return _opt(raw, origin)
    family = _FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise _refusal(origin, f"model_type {kind!r} (supported: {', '.join(_FAMILIES)})")
    activation = raw.get("hidden_act", "silu")
    for what, bad in {
        f"activation {activation!r}": not isinstance(activation, str) or activation not in _ACTIVATIONS,
        "a bias in the MLP": read_flag(raw, "mlp_bias", False, origin),
    }.items():
        if bad:
            raise _refusal(origin, what)
    vocab, width, mlp_width, depth, heads = _sizes(raw, _SIZES, family.sizes, origin)
    extra = 0
    if kind == "mllama_text_model":
        extra = _MLLAMA_EXTRA
        cross = read_list(raw, "cross_attention_layers", _MLLAMA_CROSS, int, origin)
        if len(set(cross)) != len(cross) or not all(layer in range(depth) for layer in cross):
            raise wrong(origin, "cross_attention_layers", cross, f"no list of some of {depth} layers")
        depth -= len(cross)
    elif kind == "idefics":
        vocab += read_size(raw, "additional_vocab_size", 0, origin, least=0)
    max_positions = read_size(raw, "max_position_embeddings", family.max_positions, origin)
    theta, scaling, section = _rope(raw, family, max_positions, origin)
    biased = family.attention_bias and read_flag(raw, "attention_bias", False, origin)
    window, sliding = _window(raw, family, depth, origin)
    with named(origin):
        return LanguageConfig(
            vocab_size=vocab,
            width=width,
            depth=depth,
            num_heads=heads,
            num_kv_heads=read_size(raw, "num_key_value_heads", family.kv_heads or heads, origin, null=heads),
            head_dim=read_size(raw, "head_dim", family.head_dim or width // heads, origin, null=width // heads),
            mlp_width=mlp_width,
            rope_theta=theta,
            norm_eps=read_number(raw, "rms_norm_eps", family.norm_eps, origin),
            max_positions=max_positions,
            tie_embeddings=read_flag(raw, "tie_word_embeddings", False, origin),
            qkv_bias=family.qkv_bias or biased,
            output_bias=biased,
            qk_norm=family.qk_norm,
            activation=_ACTIVATIONS[activation],
            rope_scaling=scaling,
            mrope_section=section,
            mrope_interleaved=family.mrope_interleaved,
            sliding_window=window,
            sliding_layers=sliding,
            extra_embeddings=extra,
        )


def _opt(raw: Mapping[str, Any], origin: str) -> LanguageConfig:
    """Read the configuration of an OPT."""
    vocab, width, mlp_width, depth, heads = _sizes(
        raw, (*_SIZES[:2], "ffn_dim", *_SIZES[3:]), (50272, 768, 3072, 12, 12), origin
    )
    embedded = read_size(raw, "word_embed_proj_dim", width, origin, null=width)
    for what, bad in {
        f"activation {raw.get('activation_function')!r}": raw.get("activation_function", "relu") != "relu",
        "norms behind the layers (do_layer_norm_before)": not read_flag(raw, "do_layer_norm_before", True, origin),
        "no final norm": read_flag(raw, "_remove_final_layer_norm", False, origin),
        "layers without biases": not read_flag(raw, "enable_bias", True, origin),
        "norms without weights": not read_flag(raw, "layer_norm_elementwise_affine", True, origin),
        f"embeddings of another width (word_embed_proj_dim {embedded})": embedded != width,
    }.items():
        if bad:
            raise _refusal(origin, what)
    with named(origin):
        return LanguageConfig(
            vocab_size=vocab, width=width, depth=depth, num_heads=heads, num_kv_heads=heads, head_dim=width // heads,
            mlp_width=mlp_width, norm_eps=1e-5, max_positions=read_size(raw, "max_position_embeddings", 2048, origin),
            tie_embeddings=read_flag(raw, "tie_word_embeddings", True, origin), qkv_bias=True, output_bias=True,
            activation="relu", gated_mlp=False, layer_norm=True, learned_positions=True,
        )  # fmt: skip


def language_fields(config: LanguageConfig, model_type: str | None = None) -> dict[str, Any]:
    """Write a configuration as config.json holds it, for transformers 4 and 5 alike.

    Args:
        config: the decoder's.
        model_type: of `language_config`; None takes the first that can say all of it.

    Returns:
        The fields. What `language_config` could not keep is the caller's: Llama-3.2-Vision's cross-attention layers
        and their count in num_hidden_layers, the split of Idefics' vocabulary.

    Raises:
        ValueError: `model_type` cannot say this configuration; the message names what.
    """
    lost: dict[str, list[str]] = {}
    flat = config.mrope_section is None
    kinds = [kind for kind, family in _FAMILIES.items() if (family.mrope is None) == flat]
    for kind in kinds if model_type is None else [model_type]:
        written = _fields(config, kind)
        read = language_config(written, kind)
        lost[kind] = [f.name for f in fields(config) if getattr(config, f.name) != getattr(read, f.name)]
        if not lost[kind]:
            return written
    kind = min(lost, key=lambda name: len(lost[name]))
    raise ValueError(
        f"fastmllm::weights: no config.json of model_type {' or '.join(lost)} says this decoder; nearest, {kind} loses "
        f"{', '.join(lost[kind])}"
    )


def _fields(config: LanguageConfig, kind: str) -> dict[str, Any]:
    written: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == config.activation),
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    scaling, rope = config.rope_scaling, {}
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind in ("llama3", "yarn"):
            rope["original_max_position_embeddings"] = scaling.original_max_positions
        if scaling.kind == "llama3":
            rope |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
        if scaling.kind == "yarn":
            rope |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
            rope |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    if config.mrope_section is not None:
        rope = {"rope_type": "default", **rope, "mrope_section": list(config.mrope_section)}
        rope |= {"mrope_interleaved": True} if config.mrope_interleaved else {}
    if rope:
        written["rope_scaling"] = rope
    family = _FAMILIES.get(kind)
    if family is not None and family.attention_bias:
        written["attention_bias"] = config.qkv_bias
    if kind == "mllama_text_model":
        written["cross_attention_layers"] = []
    slides = [config.slides(layer) for layer in range(config.depth)]
    if family is not None and family.window == "all":
        written["sliding_window"] = config.sliding_window
    elif family is not None and family.window == "layers":
        written |= {"use_sliding_window": any(slides), "sliding_window": config.sliding_window}
        written["max_window_layers"] = slides.index(True) if any(slides) else config.depth
        written["layer_types"] = ["sliding_attention" if s else "full_attention" for s in slides]
    return written


def _rope(
    raw: Mapping[str, Any], family: _Family, max_positions: int, origin: str
) -> tuple[float, RopeScaling | None, tuple[int, int, int] | None]:
    """Read theta, scaling and M-RoPE's sections; transformers 4's rope_scaling goes before 5's rope_parameters."""
    place = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope: Mapping[str, Any] = raw.get(place) or {}
    if not isinstance(rope, Mapping):
        raise wrong(origin, place, rope, "no object")
    theta = read_number(rope if "rope_theta" in rope else raw, "rope_theta", family.theta, origin)
    section = family.mrope
    if section is not None:
        time, row, column = read_list(rope, "mrope_section", section, int, origin, length=3)
        section = time, row, column
    partial = read_number(rope if "partial_rotary_factor" in rope else raw, "partial_rotary_factor", 1.0, origin)
    if partial != 1:
        raise _refusal(origin, f"rotary positions of a part of each head (partial_rotary_factor {partial})")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or (kind == "mrope" and section is not None):
        return theta, None, section
    if kind not in ("linear", "dynamic", "llama3", "yarn"):
        raise _refusal(origin, f"rotary scaling {kind!r} in {dict(rope)}")

    original = read_size(rope, "original_max_position_embeddings", max_positions, origin, null=max_positions)
    factor = read_number(rope, "factor", max_positions / original if kind == "yarn" else None, origin)
    more: dict[str, Any] = {}
    if kind == "yarn":
        if theta <= 1:
            raise wrong(origin, "rope_theta", theta, "no base of which YaRN takes logarithms; it must be above 1")
        magnitude = (
            None if rope.get("attention_factor") is None else read_number(rope, "attention_factor", None, origin)
        )
        scales = [read_number(rope, name, 0.0, origin, zero=True) for name in ("mscale", "mscale_all_dim")]
        if magnitude is None and all(scales):
            magnitude = yarn_magnitude(factor, scales[0]) / yarn_magnitude(factor, scales[1])
        more = {
            "beta_fast": read_number(rope, "beta_fast", 0.0, origin, zero=True) or 32.0,
            "beta_slow": read_number(rope, "beta_slow", 0.0, origin, zero=True) or 1.0,
            "truncate": read_flag(rope, "truncate", True, origin),
            "attention_factor": magnitude,
        }
    elif kind == "llama3":
        more = {name: read_number(rope, name, None, origin) for name in ("low_freq_factor", "high_freq_factor")}
    if kind in ("yarn", "llama3"):
        more["original_max_positions"] = original
    with named(origin):
        return theta, RopeScaling(kind=kind, factor=factor, **more), section


def _window(
    raw: Mapping[str, Any], family: _Family, depth: int, origin: str
) -> tuple[int | None, tuple[int, ...] | None]:
    """Read the sliding window and the layers that have it; None for all layers."""
    window = None
    if family.window == "all" or (family.window == "layers" and read_flag(raw, "use_sliding_window", False, origin)):
        window = None if raw.get("sliding_window", 4096) is None else read_size(raw, "sliding_window", 4096, origin)
    if family.window != "layers":
        return window, None
    sliding: tuple[int, ...] = ()
    if raw.get("layer_types") is not None:
        kinds = read_list(raw, "layer_types", (), str, origin)
        sliding = tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")
        unknown = sorted({kind for kind in kinds if kind not in ("sliding_attention", "full_attention")})
        if unknown or len(kinds) != depth or (sliding and window is None):
            raise _refusal(origin, f"layer_types {kinds} with a sliding window of {window} tokens in {depth} layers")
    elif window is not None:
        first = read_size(raw, "max_window_layers", 80 if family is _QWEN_VL else 28, origin, least=0)
        sliding = tuple(range(first, depth))
    if not sliding:
        return None, None
    return window, None if len(sliding) == depth else sliding


def _sizes(raw: Mapping[str, Any], names: Sequence[str], defaults: Sequence[int], origin: str) -> list[int]:
    """Read the sizes that every decoder has."""
    return [
        read_size(raw, name, default, origin, **({"most": MOST_LAYERS} if name == "num_hidden_layers" else {}))
        for name, default in zip(names, defaults, strict=True)
    ]


def _refusal(origin: str, what: str) -> ValueError:
    return ValueError(f"fastmllm::weights: {origin} asks for {what}; this decoder does not compute it")
