"""What config.json says: transformers' defaults, old and new layouts of the rotary fields, refusals, the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmllm.models import weights
from fastmllm.models.language import LanguageConfig, LanguageModel
from fastmllm.models.rope import RopeScaling
from fastmllm.models.weights.language_config import language_config, language_fields

CLASSES = {
    "llama": ("llama", "LlamaConfig"), "mistral": ("mistral", "MistralConfig"), "qwen2": ("qwen2", "Qwen2Config"),
    "qwen3": ("qwen3", "Qwen3Config"), "qwen2_vl_text": ("qwen2_vl", "Qwen2VLTextConfig"),
    "qwen2_5_vl_text": ("qwen2_5_vl", "Qwen2_5_VLTextConfig"), "qwen3_vl_text": ("qwen3_vl", "Qwen3VLTextConfig"),
    "mllama_text_model": ("mllama", "MllamaTextConfig"), "idefics": ("idefics", "IdeficsConfig"),
}  # fmt: skip
TINY = LanguageConfig(
    vocab_size=90, width=32, depth=3, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40, max_positions=64
)
YARN = RopeScaling(kind="yarn", factor=4.0, original_max_positions=16)


@pytest.mark.parametrize("kind", CLASSES)
def test_what_a_config_leaves_out_is_as_in_transformers(kind: str) -> None:
    module, name = CLASSES[kind]
    theirs = getattr(pytest.importorskip(f"transformers.models.{module}.configuration_{module}"), name)()
    mine = language_config({"model_type": kind}, "here")
    assert mine == language_config(theirs.to_dict(), "here")
    cross = getattr(theirs, "cross_attention_layers", [])
    heads = theirs.num_attention_heads
    assert mine.width == theirs.hidden_size
    assert mine.depth + len(cross) == theirs.num_hidden_layers
    assert (mine.vocab_size, mine.mlp_width, mine.num_heads) == (theirs.vocab_size, theirs.intermediate_size, heads)
    assert mine.num_kv_heads == getattr(theirs, "num_key_value_heads", heads)
    assert mine.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // heads)
    assert (mine.norm_eps, mine.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert mine.rope_theta == theirs.rope_parameters["rope_theta"]
    assert mine.sliding_window == (4096 if kind == "mistral" else None)
    assert mine.extra_embeddings == (8 if kind == "mllama_text_model" else 0)


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({"rope_theta": 5.0}, 5.0, None),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, 6.0, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2}}, 1e4, RopeScaling(kind="linear", factor=2.0)),
        (  # transformers 4's field goes before 5's
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 6.0}},
            1e4,
            RopeScaling(kind="linear", factor=2.0),
        ),
        ({"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 2.0}}, 1e4, None),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0}},
            1e4,
            RopeScaling(kind="yarn", factor=2.0, original_max_positions=2048),
        ),
        (  # the factor is the ratio of the lengths
            {"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 512, "factor": None}},
            1e4,
            RopeScaling(kind="yarn", factor=4.0, original_max_positions=512),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 1.0, "attention_factor": 1.5, "truncate": False}},
            1e4,
            RopeScaling(kind="yarn", original_max_positions=2048, attention_factor=1.5, truncate=False),
        ),
    ],
)
def test_rotary_fields_of_both_layouts(fields: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    read = language_config({"model_type": "llama"} | fields, "here")
    assert (read.rope_theta, read.rope_scaling) == (theta, scaling)


def test_yarn_magnitude_of_two_scales_is_transformers() -> None:
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    rope = {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "mscale": 0.7, "mscale_all_dim": 0.4}
    theirs = pytest.importorskip("transformers").LlamaConfig(rope_parameters=rope)
    mine = language_config({"model_type": "llama", "rope_parameters": rope}, "here").rope_scaling
    assert mine is not None
    assert mine.table_factor == utils.ROPE_INIT_FUNCTIONS["yarn"](theirs)[1] != 1


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, "llama"),
        ({"rope_scaling": YARN, "tie_embeddings": True, "activation": "gelu_tanh"}, "llama"),
        ({"qkv_bias": True, "output_bias": True}, "llama"),
        ({"sliding_window": 16}, "mistral"),
        ({"qkv_bias": True}, "qwen2"),
        ({"qkv_bias": True, "sliding_window": 16, "sliding_layers": (0, 2)}, "qwen2"),
        ({"qk_norm": True}, "qwen3"),
        ({"qkv_bias": True, "mrope_section": (2, 1, 1), "rope_scaling": YARN}, "qwen2_5_vl_text"),
        ({"qk_norm": True, "mrope_section": (2, 1, 1), "mrope_interleaved": True}, "qwen3_vl_text"),
        ({"extra_embeddings": 8}, "mllama_text_model"),
    ],
)
def test_fields_say_the_whole_configuration(change: dict[str, Any], kind: str) -> None:
    config = replace(TINY, **change)
    written = language_fields(config)
    assert written["model_type"] == kind
    assert language_config(written, "here") == config


def test_fields_name_what_a_family_cannot_say() -> None:
    with pytest.raises(ValueError, match="model_type llama says this decoder; nearest, llama loses qk_norm"):
        language_fields(replace(TINY, qk_norm=True), "llama")
    with pytest.raises(ValueError, match="loses output_bias"):
        language_fields(replace(TINY, output_bias=True))
    with pytest.raises(ValueError, match="'gpt2'"):
        language_fields(TINY, "gpt2")


@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])
def test_folders_go_to_transformers_and_back(tmp_path: Path, kind: str) -> None:
    auto = pytest.importorskip("transformers").AutoModelForCausalLM
    change: dict[str, Any] = {
        "mistral": {"sliding_window": 4},
        "qwen2": {"qkv_bias": True, "sliding_window": 4, "sliding_layers": (1,), "tie_embeddings": True},
        "qwen3": {"qk_norm": True, "rope_scaling": YARN},
    }[kind]
    torch.manual_seed(0)
    model = LanguageModel(replace(TINY, **change)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights.save_language(model, tmp_path / "ours")
    theirs = auto.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert theirs.config.model_type == kind
    ids, starts = torch.randint(0, 90, (9,)), torch.tensor([0, 9], dtype=torch.int32)
    with torch.no_grad():
        logits = model.logits(model(model.embed(ids), torch.arange(9), starts, 9))
        torch.testing.assert_close(logits, theirs(ids[None]).logits[0], rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = weights.load_language(tmp_path / "theirs")
    assert back.config == model.config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_save_language_leaves_parts_of_larger_models_to_them(tmp_path: Path) -> None:
    config = replace(TINY, qkv_bias=True, mrope_section=(2, 1, 1))
    with pytest.raises(ValueError, match="qwen2_5_vl_text"):
        weights.save_language(LanguageModel(config), tmp_path)
    model = LanguageModel(TINY)
    model.cross_layers["1"] = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"cross_layers \['1'\]"):
        weights.save_language(model, tmp_path)
    assert not list(tmp_path.iterdir())


NUMBER = ("rms_norm_eps", "rope_theta", "partial_rotary_factor")
FLAG = ("mlp_bias", "attention_bias", "tie_word_embeddings", "use_sliding_window")
OPT_FLAG = (
    "do_layer_norm_before", "_remove_final_layer_norm", "enable_bias", "layer_norm_elementwise_affine",
    "tie_word_embeddings",
)  # fmt: skip
SIZE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "head_dim",
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "names", "values"),
    [
        ("qwen2", SIZE, (True, 0, -2, 2.0, float("nan"), float("inf"), "2", [2], {}, 2**31)),
        ("qwen2", NUMBER, (True, 0, -1.0, float("nan"), float("inf"), float("-inf"), "2", [2.0])),
        ("llama", FLAG[:3], ("false", 1, [], float("nan"))),
        ("qwen2", FLAG[3:], ("false", 1, [], float("nan"))),
        ("opt", OPT_FLAG, ("false", 1, [])),
        ("opt", ("ffn_dim", "hidden_size", "num_attention_heads", "word_embed_proj_dim"), (True, 0, float("nan"))),
        ("idefics", ("additional_vocab_size",), (-1, True, 1.5)),
        ("mistral", ("sliding_window",), (0, -4, True, 2.5)),
        ("mllama_text_model", ("cross_attention_layers",), (3, "3", [1.0], [True], [40], [-1], [3, 3], {})),
        ("qwen2", ("rope_scaling", "rope_parameters"), (True, "yarn", [1], 2)),
        ("qwen2", ("layer_types",), (3, "full_attention", [None], {})),
    ],
)
def test_a_value_of_another_kind_is_named_with_its_key_and_its_origin(
    kind: str, names: tuple[str, ...], values: tuple[Any, ...]
) -> None:
    for name in names:
        for value in values:
            with pytest.raises(ValueError, match="fastmllm::weights: here ") as caught:
                language_config({"model_type": kind, name: value}, "here")
            assert name in str(caught.value)
            assert str(value) in str(caught.value), (name, value)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "factor": float("nan")},
        {"rope_type": "yarn", "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": True},
        {"rope_type": "yarn", "factor": 2.0, "beta_fast": float("nan")},
        {"rope_type": "yarn", "factor": 2.0, "beta_slow": "1"},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": "1"},
        {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0},
        {"rope_type": "yarn", "factor": 2.0, "mscale": [1], "mscale_all_dim": 1},
        {"rope_type": "yarn", "factor": 2.0, "truncate": "no"},
        {"rope_type": "linear", "factor": float("inf")},
        {"rope_type": "linear", "factor": False},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": float("nan")},
        {"rope_type": ["linear"]},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
        {"mrope_section": 3},
        {"mrope_section": [1, 1]},
        {"mrope_section": [32.0, 16, 16]},
    ],
)
def test_a_wrong_rotary_value_is_named(rope: dict[str, Any]) -> None:
    kind = "qwen2_vl_text" if "mrope_section" in rope else "llama"
    name = next(name for name in reversed(rope) if name != "high_freq_factor" or rope[name] != 1)
    with pytest.raises(ValueError, match=r"fastmllm::weights: here ") as caught:
        language_config({"model_type": kind, "rope_parameters": rope}, "here")
    assert str(rope[name]) in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (None, "config' is None"),
        ([], r"config' is \[\]"),
        ({"model_type": "llama", "num_attention_heads": 7, "num_key_value_heads": 2}, "num_heads 7 is no multiple"),
        ({"model_type": "llama", "hidden_size": 33, "num_attention_heads": 11}, "even head_dim, got 3"),
        ({"model_type": "llama", "hidden_size": 8}, "'head_dim' is 0"),
        ({"model_type": "opt", "hidden_size": 8}, "head_dim must be positive"),
        ({"model_type": "qwen2_vl_text", "rope_scaling": {"mrope_section": [1, 1, 1]}}, r"mrope_section \(1, 1, 1\)"),
        ({"model_type": "mllama_text_model", "num_hidden_layers": 8}, "cross_attention_layers"),
        (
            {"model_type": "llama", "rope_scaling": {
                "type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1}},
            "low_freq_factor 4.0 must be positive and below",
        ),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together_are_named_with_their_origin(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"weights: here.*{message}"):
        language_config(raw, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "tanh"}, "relu"),
        ({"mrope_section": (1, 1, 1)}, "mrope_section"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"extra_embeddings": 8, "tie_embeddings": True}, "extra_embeddings"),
    ],
)
def test_config_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
