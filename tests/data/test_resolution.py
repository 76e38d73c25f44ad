"""What all policies share, and those for one or two squares, against transformers 5.23's image processors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from pictures import image_sizes, picture
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from fastmllm.data.resolution import (
    ONEVISION_PINPOINTS,
    POLICIES,
    AnyRes,
    CogAgent,
    Fixed,
    Idefics3,
    InternVL,
    Mllama,
    NanoVLM,
    Native,
    Policy,
)

SIZES = [(336, 336), (640, 480), (1024, 1024), (1920, 1080), (1654, 2339), (2480, 3508)]
ONEVISION = AnyRes(image_size=384, pinpoints=ONEVISION_PINPOINTS, max_tiles=9)
TABLE = {  # (LLM tokens, encoder tokens) of each size: LLaVA-1.5 with its class token, Qwen without a limit
    Fixed(prefix_tokens=1): [(576, 577)] * 6,
    AnyRes(): [(1176, 1728), (2340, 2880), (2928, 2880), (1948, 2880), (2256, 2880), (2256, 2880)],
    ONEVISION: [(1485, 1458), (2929, 3645), (7371, 7290), (7269, 11664), (7353, 22599), (7353, 22599)],
    InternVL(): [(256, 1024), (3328, 13312), (2560, 10240), (2304, 9216), (1792, 7168), (1792, 7168)],
    Native(max_pixels=None): [(144, 576), (391, 1564), (1369, 5476), (2691, 10764), (4956, 19824), (11125, 44500)],
    Native(patch_size=16, min_pixels=None, max_pixels=None): [
        (100, 400), (300, 1200), (1024, 4096), (2040, 8160), (3796, 15184), (8580, 34320),
    ],
}  # fmt: skip
SMALL = [  # each policy at a size that tests can afford
    Fixed(image_size=28),
    Fixed(image_size=28, fit="pad", newline=True),
    Fixed(image_size=28, fit="resize", queries=4),
    Fixed(image_size=28, fit="resize", queries=4, cross=True),
    AnyRes(image_size=28, pinpoints=((28, 56), (56, 28), (56, 56))),
    AnyRes(image_size=28, pinpoints=((28, 56), (56, 28), (84, 84)), max_tiles=2, source="llava"),
    InternVL(image_size=28),
    InternVL(image_size=28, min_tiles=2, max_tiles=6, thumbnail=False),
    Idefics3(image_size=28, longest_edge=112),
    Idefics3(image_size=28, longest_edge=112, split=False),
    NanoVLM(image_size=32, longest_edge=128, shuffle=1),
    NanoVLM(image_size=32, longest_edge=128, shuffle=2, grow=False),
    Native(min_pixels=28 * 28, max_pixels=28 * 28 * 40),
    Mllama(image_size=28),
    CogAgent(image_size=28, cross_image_size=56),
]


@pytest.mark.parametrize("policy", TABLE, ids=lambda p: type(p).__name__)
def test_the_cost_of_an_image(policy):
    plans = [policy.plan(*size) for size in SIZES]
    assert [(plan.llm_tokens, plan.vit_tokens) for plan in plans] == TABLE[policy]
    assert all(plan.cross_tokens == 0 for plan in plans)


@pytest.mark.parametrize("policy", SMALL, ids=lambda p: type(p).__name__)
def test_a_plan_holds_together(policy):
    for width, height in [*image_sizes(60, 150), (1, 1), (1, 20), (20, 1)]:
        plan = policy.plan(width, height)
        assert sum(piece for piece in plan.text if isinstance(piece, int)) == plan.llm_tokens
        assert plan.llm_tokens + plan.cross_tokens > 0
        assert plan.vit_tokens > 0
        assert 0 < plan.effective_pixels <= width * height
        assert plan.effective_pixels <= plan.encoder_pixels
        assert 0.0 <= plan.waste < 1.0
        assert min(plan.resized) >= 1
        assert plan == policy.plan(width, height)
        assert hash(plan) == hash(policy.plan(width, height))
        pixels = policy.apply(picture(width, height))
        assert sum(len(part) for part in pixels) == len(plan.tiles)
        assert sum(part.numel() for part in pixels) == 3 * plan.encoder_pixels
        for encoder, part in enumerate(pixels):
            assert part.dtype == torch.uint8
            boxes = [tile.box for tile in plan.tiles if tile.encoder == encoder]
            assert {(b - t, r - x) for x, t, r, b in boxes} == {part.shape[1:3]}


def test_every_policy_has_a_name_and_its_defaults():
    assert {type(policy) for policy in SMALL} == set(POLICIES.values())
    for name, kind in POLICIES.items():
        plan = kind().plan(640, 480)
        assert plan.size == (640, 480), name
        assert issubclass(kind, Policy)
        assert dataclasses.is_dataclass(kind)


def test_tiles_join_to_the_view_that_they_are_cut_from():
    image, policy = picture(75, 50), InternVL(image_size=28)
    plan = policy.plan(75, 50)
    assert plan.grid == (2, 3)
    assert plan.resized == (84, 56)
    tiles = policy.apply(image)[0]
    rows = [torch.cat(tuple(tiles[3 * r : 3 * r + 3]), 1) for r in range(2)]
    whole = torch.from_numpy(np.array(image.resize((84, 56), Image.Resampling.BICUBIC)))
    assert torch.equal(torch.cat(rows), whole)


def test_arrays_and_other_modes_are_images_too():
    policy, image = Fixed(image_size=28), picture(40, 30)
    expected = policy.apply(image)[0]
    array = np.array(image)
    assert torch.equal(policy.apply(array)[0], expected)
    assert torch.equal(policy.apply(torch.from_numpy(array))[0], expected)
    clear = Image.new("RGBA", (40, 30))
    assert (policy.apply(clear)[0] == 255).all(), "transparency lies over white"
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, got \(30, 40\) uint8"):
        policy.apply(array[..., 0])
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8, got \(30, 40, 3\) float64"):
        policy.apply(array / 255)
    with pytest.raises(ValueError, match=r"a plan for \(30, 40\) does not fit an image of \(40, 30\)"):
        policy.apply(image, policy.plan(30, 40))


def test_effective_pixels_and_waste():
    whole = Fixed(image_size=28, fit="resize").plan(56, 14)
    assert whole.effective_pixels == 28 * 14, "half of the columns are lost, rows are only repeated"
    assert whole.waste == pytest.approx(0.5)
    crop = Fixed(image_size=28).plan(56, 28)
    assert crop.effective_pixels == 28 * 28
    assert crop.waste == 0.0
    pad = Fixed(image_size=28, fit="pad").plan(56, 28)
    assert pad.effective_pixels == 28 * 14
    assert pad.waste == pytest.approx(0.5)
    tiles = AnyRes(image_size=28, pinpoints=((56, 56),)).plan(112, 56)
    assert tiles.resized == (56, 28)
    assert tiles.effective_pixels == 56 * 28
    assert tiles.waste == pytest.approx(1 - 56 * 28 / (5 * 28 * 28))
    assert Fixed(image_size=28).plan(7, 7).effective_pixels == 49, "enlarging adds nothing"


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 41), (28, 28), (9, 100), (100, 9), (5, 7)])
@pytest.mark.parametrize(
    ("policy", "processor"),
    [
        (Fixed(image_size=28), CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28)),
        (
            Fixed(image_size=28, fit="pad"),
            LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, do_pad=True),
        ),
        (
            Fixed(image_size=28, fit="resize", resample="bilinear"),
            SiglipImageProcessorPil(size={"height": 28, "width": 28}, resample=2),
        ),
    ],
    ids=["CLIP", "LLaVA-1.5", "SigLIP"],
)
def test_fixed_equals_its_processor(policy, processor, width, height):
    image = picture(width, height)
    theirs = processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert np.array_equal(policy.apply(image)[0].numpy().transpose(0, 3, 1, 2), theirs)


def test_cogagent_has_a_small_image_and_a_large_one():
    plan = CogAgent().plan(640, 480)
    assert (plan.llm_tokens, plan.cross_tokens, plan.vit_tokens) == (258, 6400, 256 + 6400)
    image = picture(64, 48)
    low, high = CogAgent(image_size=28, cross_image_size=56).apply(image)
    assert np.array_equal(low[0].numpy(), np.array(image.resize((28, 28), Image.Resampling.BICUBIC)))
    assert np.array_equal(high[0].numpy(), np.array(image.resize((56, 56), Image.Resampling.BICUBIC)))


def test_resamplers_and_cross_attention_count_apart():
    flamingo = Fixed(image_size=224, queries=64, cross=True).plan(640, 480)
    assert (flamingo.llm_tokens, flamingo.cross_tokens, flamingo.text) == (0, 64, ())
    blip2 = Fixed(image_size=224, fit="resize", queries=32, prefix_tokens=1).plan(640, 480)
    assert (blip2.vit_tokens, blip2.llm_tokens, blip2.text) == (257, 32, (32,))
    assert Fixed(image_size=448, shuffle=2).plan(9, 9).llm_tokens == 256


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(resample="area"), "Fixed: resample 'area' must be one of"),
        (lambda: Fixed(fit="fill"), "Fixed: fit 'fill' must be one of"),
        (lambda: Fixed(shuffle=5), "Fixed: image_size 336 and patch_size 14 make 24 patches a side, which 5 must"),
        (lambda: Fixed(image_size=7), "Fixed: image_size 7 and patch_size 14 make 0 patches"),
        (lambda: Fixed(queries=0), "queries must be at least 1"),
        (lambda: AnyRes(pinpoints=((336, 500),)), r"AnyRes: pinpoints \[\(336, 500\)\] must be one or more multiples"),
        (lambda: AnyRes(pinpoints=()), r"AnyRes: pinpoints \[\] must be"),
        (lambda: AnyRes(source="hf"), "AnyRes: source 'hf' must be one of"),
        (lambda: AnyRes(max_tiles=0), "AnyRes: max_tiles must be at least 1"),
        (lambda: InternVL(min_tiles=4, max_tiles=3), "InternVL: max_tiles 3 is less than min_tiles 4"),
        (lambda: Idefics3(longest_edge=0), "Idefics3: longest_edge must be at least 1, got 0"),
        (lambda: NanoVLM(longest_edge=500), "NanoVLM: longest_edge 500 must be 1 to 8 times image_size 512"),
        (lambda: NanoVLM(longest_edge=512 * 9), "NanoVLM: longest_edge 4608 must be 1 to 8 times"),
        (lambda: Native(min_pixels=100, max_pixels=50), "Native: min_pixels 100 and max_pixels 50 leave no size"),
        (lambda: Native(video_budget="clip"), "Native: video_budget 'clip' must be one of"),
        (lambda: Native(merge_size=0), "Native: merge_size must be at least 1, got 0"),
        (lambda: Mllama(max_tiles=0), "Mllama: max_tiles must be at least 1, got 0"),
        (lambda: CogAgent(border_tokens=-1), "CogAgent: border_tokens must be at least 0, got -1"),
        (lambda: Fixed().plan(0, 5), "Fixed: an image of 0 x 5 pixels; both must be at least 1"),
        (lambda: Fixed().plan(1, 9000), "Fixed: 1 x 9000 would become 336 x 3024000 pixels, more than"),
        (lambda: AnyRes().plan(1, 2000), "AnyRes: 1 x 2000 is too narrow"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
