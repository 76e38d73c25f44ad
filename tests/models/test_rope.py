"""Rotary tables against transformers': every scaling, one position a token and three."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastmllm.kernels.vision_rope import vision_rope
from fastmllm.models.rope import RopeScaling, rope_frequencies, rope_tables
from fastmllm.ops import mrope_tables

HEAD_DIM, THETA, LONGEST = 24, 50000.0, 256
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "yarn-bounds": {
        "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False,
        "attention_factor": 1.3,
    },
}  # fmt: skip


def scaling_of(name: str) -> RopeScaling | None:
    kind = name.partition("-")[0]
    if kind == "default":
        return None
    given = dict(PARAMETERS[name])
    length = given.pop("original_max_position_embeddings", None)
    return RopeScaling(kind=kind, original_max_positions=length, **given)


def theirs(name: str, family: str = "llama", **more: Any) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    modeling = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
    config, module = {
        "llama": ("LlamaConfig", "LlamaRotaryEmbedding"),
        "qwen2_5_vl": ("Qwen2_5_VLTextConfig", "Qwen2_5_VLRotaryEmbedding"),
        "qwen3_vl": ("Qwen3VLTextConfig", "Qwen3VLTextRotaryEmbedding"),
    }[family]
    kind = name.partition("-")[0]
    parameters = {"rope_type": kind, "rope_theta": THETA, **PARAMETERS[name], **more}
    configs = transformers if family == "llama" else pytest.importorskip(f"transformers.models.{family}")
    made = getattr(configs, config)(
        hidden_size=4 * HEAD_DIM,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=LONGEST,
        rope_parameters=parameters,
    )
    return getattr(modeling, module)(made)


@pytest.mark.parametrize("name", PARAMETERS)
def test_tables_are_bitwise_transformers(name: str) -> None:
    positions = torch.tensor([0, 1, 5, 63, 64, 200, LONGEST - 1])
    expected = theirs(name)(torch.zeros(1), positions[None])
    scaling = scaling_of(name)
    factor = 1.0 if scaling is None else scaling.table_factor
    tables = rope_tables(positions, rope_frequencies(HEAD_DIM, THETA, scaling), factor=factor)
    for table, truth in zip(tables, expected, strict=True):
        assert table.dtype == torch.float32
        assert torch.equal(torch.cat((table, table), -1), truth[0])
    if name not in ("default", "dynamic"):  # the scaling does something
        assert not torch.equal(tables[0], rope_tables(positions, rope_frequencies(HEAD_DIM, THETA))[0])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["default", "linear", "yarn"])
def test_mrope_tables_are_bitwise_transformers(family: str, name: str) -> None:
    section = [3, 5, 4]
    positions = torch.randint(0, LONGEST, (3, 40))
    expected = theirs(name, family, mrope_section=section)(torch.zeros(1), positions[:, None])
    scaling = scaling_of(name)
    factor = 1.0 if scaling is None else scaling.table_factor
    tables = rope_tables(
        positions, rope_frequencies(HEAD_DIM, THETA, scaling), section, interleaved=family == "qwen3_vl", factor=factor
    )
    for table, truth in zip(tables, expected, strict=True):
        assert torch.equal(torch.cat((table, table), -1), truth[0])
    if name == "default":
        kernels = mrope_tables(positions, HEAD_DIM, section, THETA, interleaved=family == "qwen3_vl")
        assert all(torch.equal(a, b) for a, b in zip(tables, kernels, strict=True))


@pytest.mark.parametrize("interleaved", [False, True])
def test_text_positions_turn_alike_in_one_and_in_three(interleaved: bool) -> None:
    positions, frequencies = torch.arange(30), rope_frequencies(HEAD_DIM, THETA)
    three = rope_tables(positions.expand(3, -1), frequencies, (4, 4, 4), interleaved)
    assert all(torch.equal(a, b) for a, b in zip(rope_tables(positions, frequencies), three, strict=True))


def test_heads_turn_as_in_transformers() -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    positions = torch.tensor([0, 1, 5, 200])
    query, key = torch.randn(4, 6, HEAD_DIM), torch.randn(4, 2, HEAD_DIM)
    cos, sin = theirs("default")(query, positions[None])
    expected = modeling.apply_rotary_pos_emb(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin)
    tables = rope_tables(positions, rope_frequencies(HEAD_DIM, THETA))
    for mine, truth in zip(vision_rope(torch.cat((query, key), 1), *tables, 6, 2)[:2], expected, strict=True):
        torch.testing.assert_close(mine, truth[0].transpose(0, 1), rtol=3e-7, atol=3e-7)  # multiply-adds round once


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "longrope"}, "longrope"),
        ({"factor": 0.0}, "factor"),
        ({"kind": "yarn", "original_max_positions": None}, "original_max_positions"),
        ({"kind": "llama3", "high_freq_factor": 1.0}, "high_freq_factor"),
    ],
)
def test_scaling_rejects(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**({"kind": "linear", "factor": 2.0, "original_max_positions": 64} | change))
