"""Which parts go together: what is refused is named, with what would fit; and the way to JSON and back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fastmllm.models.composition import ENCODERS as KINDS
from fastmllm.models.composition import RULES, ConnectorSizes, MLLMConfig, ResolutionSizes, from_json, to_json
from fastmllm.models.mllm import MLLM
from fastmllm.models.rope import RopeScaling
from tests.support.tiny_compositions import ENCODERS, HIGH, LANGUAGE, SIZES, allowed, tiny

VIT, QWEN = ENCODERS["vit"], ENCODERS["qwen"]
BASE = MLLMConfig(encoder=VIT, language=LANGUAGE, image_token_id=5)
CONNECTORS = (*RULES["encoder", "connector"]["vit"], "merger")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": "anyres", "connector": "qformer"},
         "resolution 'anyres' and connector 'qformer' do not go together: resolution 'anyres' goes with connector mlp, "
         "pixel_shuffle, abstractor, ldp, token_packer; connector 'qformer' with resolution fixed, tiles, dual, nat"),
        ({"encoder": QWEN, "connector": "merger"},
         "resolution 'fixed' and encoder 'qwen' do not go together: resolution 'fixed' goes with encoder vit; encoder "
         "'qwen' with resolution native"),
        ({"encoder": QWEN, "resolution": "native"}, "encoder 'qwen' goes with connector merger"),
        ({"connector": "none"}, "fusion 'tokens' and connector 'none' do not go together"),
        ({"resolution": "dual", "high_res": HIGH}, "resolution 'dual' goes with fusion cogagent"),
        ({"resolution": "dual", "fusion": "cogagent"}, "'dual' has a high_res tower, no other has"),
        ({"high_res": HIGH}, "resolution 'fixed' and high_res do not go together"),
        ({"fusion": "deepstack"}, "fusion 'deepstack' with resolution native"),
        ({"encoder": QWEN, "resolution": "native", "connector": "merger", "fusion": "deepstack"},
         "deepstack_layers go with fusion 'deepstack'"),
        ({"encoder": replace(QWEN, out_width=24), "resolution": "native", "connector": "merger"}, "set out_width"),
        ({"encoder": replace(VIT, resample="none"), "resolution": "native"}, "use resample 'bicubic' or 'antialias'"),
        ({"resolution": "panorama"}, "resolution 'panorama' is not one of fixed, anyres, "),
        ({"fusion": "mixture"}, "fusion 'mixture' is not known"),
        ({"encoder": LANGUAGE}, "encoder .*LanguageConfig.* is not known"),
        ({"image_token_id": 64}, "image_token_id 64 has no row among the 64"),
        ({"cross_layers": (1,)}, r"cross_layers \(1,\) and fusion 'tokens' do not go together"),
        ({"fusion": "flamingo", "cross_layers": (2, 1)}, "must ascend within the 3 decoder layers"),
        ({"fusion": "flamingo", "cross_every": 4}, "there must be one: set cross_every"),
        ({"fusion": "flamingo", "cross_every": 0}, "cross_every must be at least 1"),
    ],
)  # fmt: skip
def test_parts_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(ValueError, match=f"MLLMConfig: .*{message}"):
        replace(BASE, **changes)


def test_everything_is_either_allowed_or_refused():
    fusions = ("tokens", "flamingo", "idefics", "mllama", "cogagent", "deepstack")
    good, passed = set(allowed()), 0
    for encoder in KINDS:
        for resolution in RULES["resolution", "encoder"]:
            for connector in CONNECTORS:
                for fusion in fusions:
                    parts = (encoder, resolution, connector, fusion)
                    if parts in good:
                        passed += 1
                        continue
                    with pytest.raises(ValueError, match="do not go together"):
                        MLLMConfig(
                            encoder=ENCODERS[encoder], language=LANGUAGE, image_token_id=5, resolution=resolution,
                            connector=connector, fusion=fusion, cross_every=2,
                        )  # fmt: skip
    assert passed == len(good) == 113


@pytest.mark.parametrize(
    ("resolution", "connector", "sizes", "message"),
    [
        ("fixed", "pixel_shuffle", {"block": 3}, "make 4 patches a side, which 3 must divide"),
        ("anyres", "abstractor", {"side": 3}, "image_size 16 is no multiple of the 3 tokens on a side"),
        ("fixed", "qformer", {"num_heads": 3}, "num_heads 3 does not divide width 16"),
        ("fixed", "token_packer", {"head_dim": 5}, "head_dim divide width"),
    ],
)
def test_sizes_that_do_not_fit_are_named(resolution, connector, sizes, message):
    config = replace(BASE, resolution=resolution, connector=connector, connector_sizes=replace(SIZES, **sizes))
    with pytest.raises(ValueError, match=message):
        MLLM.from_config(config)


def test_json_and_back():
    scaled = replace(LANGUAGE, rope_scaling=RopeScaling(kind="linear", factor=2.0))
    for config in (
        replace(BASE, language=scaled, connector_sizes=ConnectorSizes(width=8)),
        replace(BASE, resolution="anyres", resolution_sizes=ResolutionSizes(pinpoints=((16, 32), (32, 16)))),
        replace(BASE, fusion="flamingo", cross_layers=(0, 3)),
        tiny("vit", "dual", "token_packer", "cogagent"),
        tiny("qwen", "native", "merger", "deepstack"),
        tiny("mllama", "mllama", "none", "mllama"),
    ):
        assert from_json(json.loads(json.dumps(to_json(config))), "here") == config


def test_numbers_are_read_as_yaml_writes_them():
    raw = to_json(BASE)
    raw["language"] |= {"norm_eps": "1e-6", "rope_theta": 10000}
    assert from_json(raw, "here").language == replace(LANGUAGE, norm_eps=1e-6, rope_theta=10000.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": {"width": 16}}, "here: encoder needs a kind, one of vit, qwen, mllama; got None"),
        ({"encoder": {"kind": "vit", "wdith": 16}}, "here: encoder: VisionConfig has no 'wdith'"),
        ({"language": {"vocab_size": 8}}, "here: language: LanguageConfig needs 'width'"),
        ({"fusoin": "tokens"}, "here: MLLMConfig has no 'fusoin'"),
        ({"connector_sizes": 3}, "here: connector_sizes: 3 is no ConnectorSizes"),
        (
            {"language": to_json(BASE)["language"] | {"depth": "three"}},
            "here: language: depth: expected int, found",
        ),
        ({"language": to_json(BASE)["language"] | {"depth": True}}, "here: language: depth: expected int, found True"),
        ({"language": to_json(BASE)["language"] | {"norm_eps": "no"}}, "here: language: norm_eps: expected float, f"),
        (
            {"encoder": to_json(BASE)["encoder"] | {"pixel_mean": [0.5]}},
            r"encoder: pixel_mean: expected tuple\[fl",
        ),
        ({"resolution_sizes": {"pinpoints": [[16]]}}, r"pinpoints: expected tuple\[.* \| None, found \[\[16\]\]"),
        ({"cross_every": 2.5}, "here: cross_every: expected int, found 2.5"),
        ({"connector": 3}, "here: connector: expected str, found 3"),
        ({"fusion": "deepstack"}, "do not go together"),
    ],
)
def test_a_file_that_says_nonsense_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        from_json(to_json(BASE) | changes, "here")
