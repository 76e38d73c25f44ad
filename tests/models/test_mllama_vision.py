"""Llama-3.2-Vision's tower against transformers, on the tiles that are not padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_towers import assert_gradients, assert_near
from torch import Tensor

transformers = pytest.importorskip("transformers")
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig as TheirConfig  # noqa: E402
from transformers.models.mllama.modeling_mllama import MllamaVisionModel  # noqa: E402

from fastmllm.models.mllama_vision import MllamaVision, MllamaVisionConfig  # noqa: E402
from fastmllm.models.weights.mapping import fill, to_ours, to_theirs  # noqa: E402
from fastmllm.models.weights.mllama_vision import mllama_vision_config, mllama_vision_rules  # noqa: E402

# 17 tokens a tile and 7 rows of padding; 5 tokens and 3 rows. transformers blanks the whole mask where no padding is
# needed (`[:, :, -0:] = 0`, 5.23), but with a class token behind a square of patches that is never so.
FIELDS = {"hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 4, "image_size": 16,
          "intermediate_size": 44, "vision_output_dim": 96, "patch_size": 4,
          "intermediate_layers_indices": [0, 2]}  # fmt: skip
IDS = [6, 1, 2]  # (2, 2), (1, 1) and (1, 2) tiles: no padding tile, three, two
COUNTS = [4, 1, 2]


def oracle(**changes: Any) -> MllamaVisionModel:
    """Draw transformers' tiny tower, every parameter at random, gates far from 0."""
    config = TheirConfig(**FIELDS | changes)
    config._attn_implementation = "eager"
    model = MllamaVisionModel(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "layernorm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif "gate" in name.rsplit(".", 1)[-1]:
                parameter.copy_(0.5 + 0.3 * noise)
            elif "embedding" in name and parameter.dim() != 4:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise / max(parameter[0].numel(), 8) ** 0.5)
    return model.eval()


def ours(model: MllamaVisionModel) -> MllamaVision:
    """Build our tower from the oracle's configuration and weights."""
    config = mllama_vision_config(model.config.to_dict())
    tower = MllamaVision(config).eval()
    state, rest = to_ours(model.state_dict(), mllama_vision_rules(config), "the test")
    assert not rest
    fill(tower, {name: tensor.clone() for name, tensor in state.items()}, "the test")
    return tower.requires_grad_()


def draw(num_tiles: int, side: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num_tiles, side, side, 3), dtype=torch.uint8, generator=generator)


def expected(model: MllamaVisionModel, tiles: Tensor, ids: list[int], counts: list[int]) -> Tensor:
    """Pad as transformers' processor does, run its tower, and take the real tiles' tokens, packed."""
    config = mllama_vision_config(model.config.to_dict())
    pixels = (tiles.double() / 255 - torch.tensor(config.pixel_mean)) / torch.tensor(config.pixel_std)
    batch = torch.zeros(len(ids), 1, 4, 3, *tiles.shape[1:3])
    mask = torch.zeros(len(ids), 1, 4, dtype=torch.long)
    for image, (rows, count) in enumerate(zip(pixels.float().permute(0, 3, 1, 2).split(counts), counts, strict=True)):
        batch[image, 0, :count], mask[image, 0, :count] = rows, 1
    out = model(batch, torch.tensor(ids).view(-1, 1), mask).last_hidden_state  # (I, 1, tiles, tokens, channels)
    return out[mask.bool()].flatten(0, 1)


def score(tokens: Tensor) -> Tensor:
    return (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))).sum()


@pytest.mark.parametrize("side", [16, 8])
@pytest.mark.parametrize(("ids", "counts"), [([6], [4]), ([1], [1]), (IDS, COUNTS)])
def test_equals_transformers_forward_and_backward(ids: list[int], counts: list[int], side: int) -> None:
    reference = oracle(image_size=side)
    tower, tiles = ours(reference), draw(sum(counts), side)
    wanted = expected(reference, tiles, ids, counts)
    actual = tower(tiles, ids)
    assert_near(actual, wanted)
    assert len(actual) == sum(tower.num_tokens(n) for n in ids)

    score(wanted).backward()
    score(actual).backward()
    grads, _ = to_ours({n: p.grad for n, p in reference.named_parameters()}, mllama_vision_rules(tower.config), "grads")
    assert_gradients(tower, grads)
    assert all(p.grad.any() for p in tower.parameters())


def test_padding_takes_part() -> None:
    """What the tower computes is not what it would on real rows alone: an image alone sees three tiles of padding."""
    tower, tiles = ours(oracle()), draw(1)
    with torch.no_grad():
        before = tower(tiles, [1])
        tower.tile_position[1, 1:] += 1  # positions of tiles that the image does not have
        assert not torch.isclose(before, tower(tiles, [1]), rtol=1e-3).all()


def test_takes_floats_and_channels_first() -> None:
    tower, tiles = ours(oracle()), draw(sum(COUNTS))
    with torch.no_grad():
        wanted = tower(tiles, IDS)
        assert_near(tower(tiles.float() / 255, IDS), wanted)
        assert_near(tower(tiles.permute(0, 3, 1, 2).contiguous(), IDS, "chw"), wanted)


def test_packed_equals_one_by_one() -> None:
    tower, tiles = ours(oracle()), draw(sum(COUNTS))
    apart = torch.cat([tower(rows, [n]) for rows, n in zip(tiles.split(COUNTS), IDS, strict=True)])
    score(apart).backward()
    grads = {name: p.grad for name, p in tower.named_parameters()}
    tower.zero_grad()
    together = tower(tiles, IDS)
    assert_near(together, apart, 2e-6)
    score(together).backward()
    assert_gradients(tower, grads, 1e-5)


def test_an_image_does_not_depend_on_its_neighbours() -> None:
    tower, tiles = ours(oracle()), draw(sum(COUNTS))
    changed = tiles.clone()
    changed[4] = 255 - changed[4]  # the second image
    with torch.no_grad():
        before, after = tower(tiles, IDS), tower(changed, IDS)
    same = (before == after).all(1)
    assert same[: 4 * 17].all()
    assert not same[4 * 17 : 5 * 17].any()
    assert same[5 * 17 :].all()


def test_no_images() -> None:
    tower = ours(oracle())
    tokens = tower(draw(0), [])
    assert tokens.shape == (0, 96)
    score(tokens).backward()


def test_runs_in_bfloat16() -> None:
    reference = oracle()
    wanted = expected(reference, draw(sum(COUNTS)), IDS, COUNTS)
    tower = ours(reference).bfloat16()
    tokens = tower(draw(sum(COUNTS)), IDS)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - wanted).norm() < 0.03 * wanted.norm()
    score(tokens).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


def test_trains_after_inference_mode() -> None:
    tower = ours(oracle())
    ids = [3, 3]  # of no other test: they are planned in here first
    with torch.inference_mode():
        tower(draw(6), ids)
    tower(draw(6), ids).sum().backward()


def test_a_fresh_tower_ignores_tiles() -> None:
    """Gates start at 0: positions of tiles neither count nor move, plain positions count in full."""
    tower = MllamaVision(mllama_vision_config(FIELDS))
    score(tower(draw(2), [2])).backward()
    for name in ("pre_tile", "post_tile", "tile_position"):
        assert not getattr(tower, name).grad.any()
        assert getattr(tower, name.replace("tile_position", "position") + "_gate").grad.any()
    assert tower.position.grad.any()


def test_weights_come_back_bit_for_bit() -> None:
    reference = oracle()
    tower = ours(reference)
    theirs = to_theirs(tower.state_dict(), mllama_vision_rules(tower.config))
    assert set(theirs) == set(reference.state_dict())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in reference.state_dict().items())


def test_defaults_are_transformers() -> None:
    assert mllama_vision_config({}) == mllama_vision_config(TheirConfig().to_dict())
    assert mllama_vision_config(FIELDS) == mllama_vision_config(TheirConfig(**FIELDS).to_dict())
    assert mllama_vision_config({}).tile_size == 448
    assert mllama_vision_config({"image_size": 560}) == MllamaVisionConfig()
    assert MllamaVisionConfig().tile_tokens == 1601
    assert MllamaVisionConfig().out_width == 7680


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"vision_output_dim": 64}, "vision_output_dim 64"),
        ({"image_size": [16, 32]}, r"'image_size' is \[16, 32\], which is no whole"),
        ({"attention_heads": 5}, "num_heads 5"),
        ({"image_size": 18}, "tile_size 18"),
        ({"intermediate_layers_indices": [0, 3]}, "layers"),
        ({"intermediate_layers_indices": [], "vision_output_dim": 32}, "layers"),
        ({"max_num_tiles": 3}, "max_tiles 3"),
        ({"num_global_layers": 0}, "'num_global_layers' is 0"),
    ],
)
def test_refuses_configurations(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mllama_vision_config({**FIELDS, **raw})


@pytest.mark.parametrize(
    ("tiles", "ids", "message"),
    [
        (torch.zeros(3, 16, 16, 3), [2], "must be 2"),
        (torch.zeros(2, 16, 8, 3), [2], "16 x 16 pixels"),
        (torch.zeros(2, 3, 16, 16), [2], "16 x 16 pixels"),
        (torch.zeros(1, 16, 16, 3), [0], "not in 1..8"),
        (torch.zeros(1, 16, 16, 3), [9], "not in 1..8"),
    ],
)
def test_refuses_inputs(tiles: Tensor, ids: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MllamaVision(mllama_vision_config(FIELDS))(tiles, ids)
