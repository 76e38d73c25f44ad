"""Tokens of an image under every policy and compressor."""

from __future__ import annotations

import pytest
from tiny_hf_compress import KINDS, TILES

from fastmllm import patch
from fastmllm.compression import Placement
from fastmllm.data.resolution import AnyRes, Fixed, InternVL
from fastmllm.hf.compress.seams import SEAMS
from fastmllm.plan.stacks import STACKS, Stack, find_stack
from fastmllm.plan.tokens import count_tokens, find_placement, rows_of, waste_of

SIZES = [(336, 336), (640, 480), (1024, 1024), (1920, 1080), (1654, 2339), (2480, 3508)]
TABLE = {  # (LLM tokens, ViT tokens) of what one image costs, as published code counts them
    "llava-1.5": [(576, 577)] * 6,
    "llava-next": [(1176, 1728), (2340, 2880), (2928, 2880), (1948, 2880), (2256, 2880), (2256, 2880)],
    "llava-onevision": [(1485, 1458), (2929, 3645), (7371, 7290), (7269, 11664), (7353, 22599), (7353, 22599)],
    "internvl": [(256, 1024), (3328, 13312), (2560, 10240), (2304, 9216), (1792, 7168), (1792, 7168)],
    "qwen2.5-vl": [(144, 576), (391, 1564), (1369, 5476), (2691, 10764), (4956, 19824), (11125, 44500)],
    "qwen3-vl": [(100, 400), (300, 1200), (1024, 4096), (2040, 8160), (3796, 15184), (8580, 34320)],
}


def counted(name: str, width: int, height: int, compress: str | None = None):
    stack = find_stack(name)
    return count_tokens(stack.policy.plan(width, height), stack, find_placement(compress, stack, name))


@pytest.mark.parametrize("name", TABLE)
def test_what_one_image_costs(name: str) -> None:
    found = [counted(name, *size) for size in SIZES]
    assert [(counts.llm, counts.vit) for counts in found] == TABLE[name]
    assert all((counts.llm_left, counts.cross) == (counts.llm, 0) for counts in found)


def test_what_layers_look_at_counts_apart() -> None:
    assert [counted("cogagent", *size).cross for size in SIZES] == [6400] * 6
    assert [counted("cogagent", *size).llm for size in SIZES] == [258] * 6
    assert [(c.llm, c.cross) for c in (counted("flamingo", *size) for size in SIZES)] == [(0, 64)] * 6
    assert counted("mllama", 1120, 1120).cross == 4 * 1601
    assert counted("blip-2", 640, 480).llm == 32


@pytest.mark.parametrize(
    ("name", "compress", "units", "left"),
    [
        ("llava-1.5", "visionzip:64", (576,), 64),
        ("llava-1.5", "tome:192", (576,), 192),
        ("llava-next", "visionzip:64", (576,) * 5, 5 * 64),  # tile by tile; no ends of lines are left
        ("llava-next", "visionzip:576", (576,) * 5, 1948),  # nothing goes: the lines stay
        ("internvl", "visionzip:64", (256,) * 9, 9 * 64),
        ("internvl", "visionzip:0.25", (256,) * 9, 9 * 64),
        ("qwen2.5-vl", "divprune:100", (2691,), 100),
        ("smolvlm", "divprune:16", (64,) * 13, 13 * 16),
    ],
)
def test_the_connector_leaves_k_tokens_of_each_grid(name: str, compress: str, units: tuple, left: int) -> None:
    counts = counted(name, 1920, 1080, compress)
    assert counts.units == units
    assert (counts.llm_left, sum(counts.left)) == (left, left if left != 1948 else 5 * 576)


def test_a_class_token_stays_beside_what_is_left_of_a_tile() -> None:
    counts = counted("mllama", 1120, 1120, "divprune:100")
    assert (counts.units, counts.cross, counts.cross_left) == ((1600,) * 4, 4 * 1601, 4 * 101)


def test_stages_between_layers_count_images_or_tiles() -> None:
    assert counted("internvl", 1920, 1080, "fastv:100").stages == ((2, 9 * 100),)
    assert counted("llava-next", 1920, 1080, "fastv:100").stages == ((2, 100),)
    assert counted("qwen2.5-vl", 1920, 1080, "pyramiddrop").stages == ((8, 1346), (16, 673), (24, 336))
    stack = STACKS["internvl"]
    plan = stack.policy.plan(1920, 1080)
    assert rows_of(plan, count_tokens(plan, stack, Placement())) == (256,) * 9


def test_waste_is_told_apart() -> None:
    crop = waste_of(STACKS["llava-1.5"].policy.plan(1344, 672))
    assert (crop.padding, crop.enlarged, crop.overview) == (0, 0, 0)
    small = waste_of(STACKS["internvl"].policy.plan(112, 112))
    assert (small.padding, small.enlarged, small.overview) == (0, 1 - 1 / 16, 0)
    tiles = waste_of(find_stack("llava-next").policy.plan(1344, 672))  # 672 x 336 in two tiles, and an overview
    assert (tiles.padding, tiles.enlarged) == (0, 0)
    assert tiles.overview == pytest.approx(1 / 3)
    padded = waste_of(find_stack("mllama:max_tiles=1").policy.plan(1120, 560))
    assert (padded.padding, padded.enlarged, padded.overview) == (0.5, 0, 0)
    for name, stack in STACKS.items():
        for size in SIZES:
            plan = stack.policy.plan(*size)
            waste = waste_of(plan)
            assert waste.total == pytest.approx(plan.waste), name
            assert min(waste.padding, waste.enlarged, waste.overview) >= 0


@pytest.mark.parametrize(
    ("name", "compress", "message"),
    [
        ("internvl", "visionzap:64", "unknown method; known: ToMe, FasterVLM"),
        ("internvl", "visionzip:many", "'many' is neither a number of tokens nor a fraction"),
        ("internvl", "tome:64", "cannot merge tokens inside of the encoder of InternVL"),
        ("internvl", "evs:64", "it wants the frames of videos"),
        ("internvl", "visionzip:300", "keep 300 must lie in 1..256"),
        ("internvl", "mqt:64", "has weights of its own"),
        ("cogagent", "visionzip:64", "cogagent: no compressor has a place there"),
        ("mllama", "fastv:64", "it has no image rows"),
    ],
)
def test_what_has_no_place_is_refused(name: str, compress: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        counted(name, 1920, 1080, compress)


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_as_many_tokens_are_left_as_patch_leaves(name: str) -> None:
    """On tiny models of transformers, row by row."""
    kind = next(kind for kind in KINDS if kind.name == name)
    sides = {
        "llava": Fixed(image_size=28, patch_size=7),
        "internvl": InternVL(image_size=56, patch_size=7, max_tiles=1),
    }
    for number, keep in ((0, 2), (2, 0.5)):
        image = kind.images[number]
        policy = sides.get(name, AnyRes(image_size=28, patch_size=7, pinpoints=tuple(map(tuple, TILES))))
        height, width = image[1] if name == "llava_next" else (28, 28)
        stack = Stack(policy=policy, make=STACKS["internvl"].make, seam=SEAMS[name], about="")
        placement = find_placement(f"divprune:{keep}", stack, name)
        counts = count_tokens(policy.plan(width, height), stack, placement)
        batch = kind.rows((([1, 20], number, [22, 23]),))
        model = kind.build()
        before = model(**batch).logits.shape[1]
        patch(model, compress=f"divprune:{keep}")
        assert (before - 4, model(**batch).logits.shape[1] - 4) == (counts.llm, counts.llm_left)
