"""The towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL against transformers, from patches and from pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_towers import assert_gradients, assert_near
from torch import Tensor

transformers = pytest.importorskip("transformers")
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf2_5  # noqa: E402
from transformers.models.qwen2_vl import modeling_qwen2_vl as hf2  # noqa: E402
from transformers.models.qwen3_vl import modeling_qwen3_vl as hf3  # noqa: E402
from transformers.vision_utils import get_vision_window_index  # noqa: E402

from fastmllm.models.qwen_vision import QwenVision, QwenVisionConfig, window_order  # noqa: E402
from fastmllm.models.weights import qwen_vision as weights  # noqa: E402
from fastmllm.models.weights.mapping import fill, to_ours, to_theirs  # noqa: E402

FAMILIES: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "qwen2_vl": (hf2.Qwen2VLVisionConfig, hf2.Qwen2VisionTransformerPretrainedModel, weights.qwen2_vision_config,
                 {"depth": 2, "embed_dim": 32, "hidden_size": 24, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}),
    "qwen2_5_vl": (hf2_5.Qwen2_5_VLVisionConfig, hf2_5.Qwen2_5_VisionTransformerPretrainedModel,
                   weights.qwen2_5_vision_config,
                   {"depth": 3, "hidden_size": 32, "out_hidden_size": 24, "intermediate_size": 44, "num_heads": 4,
                    "patch_size": 4, "window_size": 16, "fullatt_block_indexes": [1]}),
    "qwen3_vl": (hf3.Qwen3VLVisionConfig, hf3.Qwen3VLVisionModel, weights.qwen3_vision_config,
                 {"depth": 3, "hidden_size": 32, "out_hidden_size": 24, "intermediate_size": 44, "num_heads": 4,
                  "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2]}),
}  # fmt: skip
GRIDS = [
    [(1, 4, 4)],  # one image, whole windows
    [(1, 6, 10)],  # ragged windows to the right and below
    [(1, 2, 2), (3, 6, 4), (1, 10, 6)],  # images and a video of three steps
]
each_family = pytest.mark.parametrize("family", FAMILIES)


def oracle(family: str, **changes: Any) -> torch.nn.Module:
    """Draw transformers' tiny tower, every parameter at random."""
    make_config, make_model, _, fields = FAMILIES[family]
    config = make_config(**fields | changes)
    config._attn_implementation = "eager"
    model = make_model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            norm = parameter.dim() == 1 and name.endswith("weight")
            fan_in = 8 if name == "pos_embed.weight" else parameter[0].numel()
            parameter.copy_(1 + 0.2 * noise if norm else noise / max(fan_in, 8) ** 0.5)
    return model.eval()


def ours(model: torch.nn.Module, family: str) -> QwenVision:
    """Build our tower from the oracle's configuration and weights."""
    config = FAMILIES[family][2](model.config.to_dict())
    tower = QwenVision(config).eval()
    state, rest = to_ours(model.state_dict(), weights.qwen_vision_rules(config), family)
    assert not rest
    fill(tower, {name: tensor.clone() for name, tensor in state.items()}, family)
    return tower.requires_grad_()


def cut(grids: list[tuple[int, int, int]], seed: int = 1) -> Tensor:
    """Draw what a processor would have cut for the grids: (M, 3 * 2 * 4 * 4)."""
    rows = sum(t * h * w for t, h, w in grids)
    return torch.randn(rows, 96, generator=torch.Generator().manual_seed(seed))


def outputs(model: torch.nn.Module, patches: Tensor, grids: list[tuple[int, int, int]]) -> list[Tensor]:
    result = model(patches, torch.tensor(grids))
    return [result.pooler_output, *getattr(result, "deepstack_features", [])]


def score(tensors: list[Tensor]) -> Tensor:
    """Weight every number of the outputs by its own random number."""
    generator = torch.Generator().manual_seed(2)
    return sum((t * torch.randn(t.shape, generator=generator)).sum() for t in tensors)


@pytest.mark.parametrize("grids", GRIDS)
@each_family
def test_equals_transformers_forward_and_backward(family: str, grids: list[tuple[int, int, int]]) -> None:
    reference = oracle(family)
    tower = ours(reference, family)
    expected = outputs(reference, cut(grids), grids)
    result = tower(cut(grids), grids)
    assert len(result.planes) == len(expected) - 1 == 2 * (family == "qwen3_vl")
    for actual, wanted in zip((result.tokens, *result.planes), expected, strict=True):
        assert_near(actual, wanted)
    assert len(result.tokens) == sum(tower.num_tokens(grid) for grid in grids)

    score(expected).backward()
    score([result.tokens, *result.planes]).backward()
    rules = weights.qwen_vision_rules(tower.config)
    grads, _ = to_ours({n: p.grad for n, p in reference.named_parameters()}, rules, "gradients")
    assert_gradients(tower, grads)


def process(images: list[Tensor], config: QwenVisionConfig) -> tuple[Tensor, list[tuple[int, int, int]]]:
    """Do what transformers' Qwen2VLImageProcessor does behind the resize: a still image becomes two equal frames."""
    t, p, m = config.temporal_patch_size, config.patch_size, config.merge_size
    mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
    patches, grids = [], []
    for image in images:
        frames = image.expand(t, *image.shape) if image.dim() == 3 else image
        x = ((frames.double() / 255 - mean) / std).float().permute(0, 3, 1, 2)
        grid = (len(x) // t, x.shape[2] // p, x.shape[3] // p)
        x = x.reshape(grid[0], t, 3, grid[1] // m, m, p, grid[2] // m, m, p)
        patches.append(x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * t * p * p))
        grids.append(grid)
    return torch.cat(patches), grids


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes]


@pytest.mark.parametrize("shapes", [[(16, 24, 3), (8, 8, 3)], [(4, 16, 8, 3)], [(16, 24, 3), (4, 8, 24, 3)]])
@each_family
def test_pixels_equal_the_patches_that_a_processor_cuts(family: str, shapes: list[tuple[int, ...]]) -> None:
    reference = oracle(family)
    tower, images = ours(reference, family), draw(*shapes)
    patches, grids = process(images, tower.config)
    expected = outputs(reference, patches, grids)
    result = tower(images)
    for actual, wanted in zip((result.tokens, *result.planes), expected, strict=True):
        assert_near(actual, wanted)
    assert_near(tower([image.float() / 255 for image in images]).tokens, expected[0])


def test_the_processor_of_the_test_is_that_of_transformers() -> None:
    from transformers import Qwen2VLImageProcessorPil

    config = QwenVisionConfig(patch_size=4)
    images = draw((16, 24, 3), (8, 8, 3))
    processor = Qwen2VLImageProcessorPil(patch_size=4, do_resize=False)
    made = processor([image.numpy() for image in images], return_tensors="pt")
    patches, grids = process(images, config)
    assert made["image_grid_thw"].tolist() == [list(grid) for grid in grids]
    assert_near(patches, made["pixel_values"])


@each_family
def test_packed_equals_one_by_one(family: str) -> None:
    grids = GRIDS[2]
    reference = oracle(family)
    tower = ours(reference, family)
    patches = cut(grids)
    parts = [tower(rows, [grid]) for rows, grid in zip(patches.split([4, 72, 60]), grids, strict=True)]
    apart = [torch.cat([part.tokens for part in parts])]
    apart += [torch.cat(plane) for plane in zip(*[part.planes for part in parts], strict=True)]
    score(apart).backward()
    grads = {name: p.grad for name, p in tower.named_parameters()}
    tower.zero_grad()
    result = tower(patches, grids)
    for actual, wanted in zip((result.tokens, *result.planes), apart, strict=True):
        assert_near(actual, wanted, 2e-6)
    score([result.tokens, *result.planes]).backward()
    assert_gradients(tower, grads, 1e-5)


@each_family
def test_an_image_does_not_depend_on_its_neighbours(family: str) -> None:
    tower = ours(oracle(family), family)
    grids = [(1, 6, 6), (2, 4, 6)]
    patches = cut(grids)
    changed = patches.clone()
    changed[36:60] += 1  # the first frame of the video
    with torch.no_grad():
        before, after = tower(patches, grids).tokens, tower(changed, grids).tokens
    assert torch.equal(before[:9], after[:9])
    assert not torch.isclose(before[9:15], after[9:15]).all()
    assert torch.equal(before[15:], after[15:])  # no frame sees another


@each_family
def test_no_images(family: str) -> None:
    tower = ours(oracle(family), family)
    result = tower(torch.empty(0, 96), [])
    assert [x.shape for x in (result.tokens, *result.planes)] == [(0, 24)] * (1 + len(result.planes))
    score([result.tokens, *result.planes]).backward()


@each_family
def test_runs_in_bfloat16(family: str) -> None:
    reference = oracle(family)
    expected = outputs(reference, cut(GRIDS[2]), GRIDS[2])[0]
    tower = ours(reference, family).bfloat16()
    result = tower(cut(GRIDS[2]), GRIDS[2])
    assert result.tokens.dtype == torch.bfloat16
    assert (result.tokens.float() - expected).norm() < 0.03 * expected.norm()
    score([result.tokens, *result.planes]).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in tower.parameters())


@each_family
def test_trains_after_inference_mode(family: str) -> None:
    tower = ours(oracle(family), family)
    grids = [(1, 8, 14)]  # of no other test: its windows are planned in here first
    with torch.inference_mode():
        tower(cut(grids), grids)
    tower(cut(grids), grids).tokens.sum().backward()


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("grids", [*GRIDS, [(2, 12, 12), (1, 2, 14)]])
def test_windows_equal_transformers(grids: list[tuple[int, int, int]], window: int) -> None:
    index, bounds = get_vision_window_index(torch.tensor(grids), 2, window * 8, 4)
    order, back, lengths = window_order(tuple(grids), 2, window)
    assert order.tolist() == index.tolist()
    assert np.cumsum([0, *lengths]).tolist() == bounds.tolist()
    assert (order[back] == np.arange(len(order))).all()


@each_family
def test_weights_come_back_bit_for_bit(family: str) -> None:
    reference = oracle(family)
    tower = ours(reference, family)
    theirs = to_theirs(tower.state_dict(), weights.qwen_vision_rules(tower.config))
    assert set(theirs) == set(reference.state_dict())
    assert all(torch.equal(theirs[name], tensor) for name, tensor in reference.state_dict().items())


@each_family
def test_defaults_are_transformers(family: str) -> None:
    make_config, _, read, fields = FAMILIES[family]
    assert read({}) == read(make_config().to_dict())
    assert read(fields) == read(make_config(**fields).to_dict())
    assert read({"rope_theta": 5000.0, "num_hidden_layers": 32, "num_attention_heads": 8}) == replace(
        read({"depth": 32, "num_heads": 8}), rope_theta=5000.0
    )


def test_the_default_width_of_qwen2_5_is_the_language_models() -> None:
    assert weights.qwen2_5_vision_config({}).width == 3584
    assert weights.qwen2_5_vision_config({"hidden_size": 1280}).full_layers == (7, 15, 23, 31)
    assert weights.qwen2_5_vision_config({"depth": 8}).full_layers == (7,)
    assert weights.qwen2_5_vision_config({}).window == 4


@pytest.mark.parametrize(
    ("family", "raw", "message"),
    [
        ("qwen2_5_vl", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("qwen3_vl", {"hidden_act": "silu"}, "hidden_act 'silu'"),
        ("qwen2_vl", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn'"),
        ("qwen2_vl", {"patch_size": [14, 14]}, "patch_size"),
        ("qwen3_vl", {"num_position_embeddings": 2300}, "2300 is not a square"),
        ("qwen3_vl", {"deepstack_visual_indexes": [16, 8]}, "deepstack_layers"),
        ("qwen3_vl", {"deepstack_visual_indexes": [27]}, "deepstack_layers"),
        ("qwen2_vl", {"embed_dim": 40}, "multiple of 4"),
        ("qwen2_5_vl", {"window_size": 8}, "'window_size' is 8, which is not in 28"),
    ],
)
def test_refuses_configurations(family: str, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FAMILIES[family][2](raw)


@pytest.mark.parametrize(
    ("pixels", "grids", "message"),
    [
        (torch.zeros(16, 96), None, "come with their grid_thw"),
        (torch.zeros(16, 95), [(1, 4, 4)], r"must be \(M, 96\)"),
        (torch.zeros(16, 96), [(1, 4, 6)], "do not fit the grids"),
        (torch.zeros(12, 96), [(1, 4, 3)], "multiples of merge_size 2"),
        ([torch.zeros(8, 8, 3)], [(1, 2, 2)], "a list of images without"),
        ([torch.zeros(8, 12, 3)], None, "multiples of 8 pixels"),
        ([torch.zeros(3, 8, 8, 3)], None, "multiple of 2 frames"),
        ([torch.zeros(8, 9, 3)], None, "whole 4 x 4 patches"),
    ],
)
def test_refuses_inputs(pixels: Any, grids: Any, message: str) -> None:
    tower = ours(oracle("qwen2_vl"), "qwen2_vl")
    with pytest.raises(ValueError, match=message):
        tower(pixels, grids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batch"}, "norm 'batch'"),
        ({"activation": "relu"}, "activation 'relu'"),
        ({"full_layers": (2, 1)}, "full_layers"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_config_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QwenVisionConfig(**change)
