"""Values of a config.json: each of its kind and in its range, or refused by a message that names key and file."""

from __future__ import annotations

import copy
import functools
import json
import math
from contextlib import suppress

import pytest
import torch

pytest.importorskip("transformers")

from transformers import PretrainedConfig

from fastmllm.models.composition import to_json
from fastmllm.models.families import build
from fastmllm.models.weights import values
from tests.support.tiny_compositions import tiny
from tests.support.tiny_mllm import MODELS, oracle

DEPTHS = {"num_hidden_layers", "depth", "num_global_layers", "resampler_depth"}
SIZES = DEPTHS | {
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_heads",
    "patch_size",
    "num_query_tokens",
}


COMMON = set(PretrainedConfig().to_dict()) - {"tie_word_embeddings"}  # about transformers itself


@functools.cache
def config_of(name):
    return oracle(name)[0].config.to_dict()


def keys(raw, inside=()):
    for key, value in raw.items():
        if key not in COMMON:
            yield (*inside, key)
        if isinstance(value, dict):
            yield from keys(value, (*inside, key))


def changed(raw, path, value):
    raw = copy.deepcopy(raw)
    part = raw
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return raw


def refusal(raw):
    with torch.device("meta"), pytest.raises(ValueError, match="a checkpoint") as found:
        build(raw, "a checkpoint")
    return str(found.value)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [None, 7, [1]], ids=str)
def test_a_part_that_is_no_object_is_named(name, value):
    raw = config_of(name)
    for part in ("vision_config", "text_config", "qformer_config", "perceiver_config"):
        if part in raw and not (value is None and (name == "idefics" or (name, part[:4]) in OLD)):
            assert f"{part!r} is {value!r}, which is no object" in refusal(changed(raw, (part,), value))


OLD = {(f"qwen{n}_vl", "text") for n in ("2", "2_5", "3")}  # null: the text's keys are those of the whole


@pytest.mark.parametrize("name", MODELS)
def test_sizes_that_are_none_are_named(name):
    raw = config_of(name)
    for path in keys(raw):
        if path[-1] in SIZES and not (name == "idefics" and path == ("vision_config", "hidden_size")):
            for value in (True, "7", 2.5, math.nan, [1, 2, 3], -1, 0):
                assert path[-1] in refusal(changed(raw, path, value)), (path, value)
        if path[-1] in DEPTHS:
            assert f"{path[-1]!r} is 1000000000, which is not in 1 .. 1024" in refusal(changed(raw, path, 10**9))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("value", [["x"], 10**9], ids=["list", "large"])
def test_no_value_of_any_key_raises_anything_else(name, value):
    raw = config_of(name)
    for path in keys(raw):
        with suppress(ValueError), torch.device("meta"):
            build(changed(raw, path, value), "a checkpoint")


@pytest.mark.parametrize("part", ["language", "encoder", "connector_sizes"])
def test_a_composition_of_our_own_has_no_absurd_depth(part):
    config = tiny("vit", "fixed", "resampler", "flamingo")
    raw = {"model_type": "fastmllm", **changed(json.loads(json.dumps(to_json(config))), (part, "depth"), 10**9)}
    assert f"a checkpoint: {part} says 'depth' is 1000000000" in refusal(raw)


def test_pairs():
    assert values.read_pairs({"a": [[1, 2], (3, 4)]}, "a", (), "f") == ((1, 2), (3, 4))
    assert values.read_pairs({"a": None}, "a", ((5, 6),), "f") == ((5, 6),)
    for bad in ([[1, 2, 3]], [None], [1, 2], "12", [["1", "2"]], [[True, 2]]):
        with pytest.raises(ValueError, match="f says 'a' is"):
            values.read_pairs({"a": bad}, "a", (), "f")


def test_a_message_has_its_origin_once():
    with pytest.raises(ValueError, match=r"^here: wrong$"), values.named("here"):
        raise ValueError("here: wrong")
    with pytest.raises(ValueError, match=r"^fastmllm::weights: here: wrong$"), values.named("here"):
        raise ValueError("wrong")
