"""Policies that cut an image into tiles, against transformers 5.23: sizes, order, counts, pixels and text."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from pictures import image_sizes, picture
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got
from transformers.models.idefics3 import image_processing_pil_idefics3 as idefics3
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.mllama import image_processing_pil_mllama as mllama
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from fastmllm.data.resolution import ONEVISION_PINPOINTS, AnyRes, Fixed, Idefics3, InternVL, Mllama, NanoVLM

RAW = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
SIZES = [(75, 50), (50, 75), (28, 28), (90, 17), (13, 61), (200, 190), (9, 7), (112, 56)]  # (width, height)
SMALL_PINPOINTS = ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))


def channels_first(tiles):
    return tiles.numpy().transpose(0, 3, 1, 2)


# LLaVA ----------------------------------------------------------------------------------------------------------------
def count_features(processor, width, height, **settings):
    """Call the processor's own count on a stand-in that has what it reads."""
    stand_in = SimpleNamespace(**settings)
    stand_in._get_unpadded_features = functools.partial(processor._get_unpadded_features, stand_in)
    side = settings["image_size"]
    return processor._get_number_of_features(stand_in, height, width, side, side)


@pytest.mark.parametrize("most", [700, 5000])
def test_anyres_plans_equal_transformers(most):
    policy, pinpoints = AnyRes(), [list(p) for p in AnyRes().pinpoints]
    images = SimpleNamespace(image_grid_pinpoints=pinpoints)
    for width, height in image_sizes(1500, most):
        plan = policy.plan(width, height)
        down, across = select_best_resolution((height, width), pinpoints)
        assert plan.grid == (down // 336, across // 336)
        fitted = get_patch_output_size(np.empty((1, height, width), np.uint8), (down, across), "channels_first")
        assert plan.resized == fitted[::-1]
        assert plan.llm_tokens == count_features(
            LlavaNextProcessor, width, height, image_processor=images, image_size=336, patch_size=14,
            num_additional_image_tokens=0,
        )  # fmt: skip


@pytest.mark.parametrize("most", [1500, 6000])
def test_onevision_plans_equal_transformers(most):
    policy = AnyRes(image_size=384, pinpoints=ONEVISION_PINPOINTS, max_tiles=9)
    assert [list(p) for p in ONEVISION_PINPOINTS] == LlavaOnevisionImageProcessorPil.image_grid_pinpoints
    images = SimpleNamespace(image_grid_pinpoints=LlavaOnevisionImageProcessorPil.image_grid_pinpoints)
    for width, height in image_sizes(600, most):
        assert policy.plan(width, height).llm_tokens == count_features(
            LlavaOnevisionProcessor, width, height, image_processor=images, image_size=384, num_image_tokens=729,
            vision_aspect_ratio="anyres_max_9",
        )  # fmt: skip


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_anyres_pixels_equal_transformers(width, height):
    policy, image = AnyRes(image_size=28, pinpoints=SMALL_PINPOINTS), picture(width, height)
    pinpoints = [list(p) for p in SMALL_PINPOINTS]
    ours = channels_first(policy.apply(image)[0])
    next_ = LlavaNextImageProcessorPil(size={"shortest_edge": 28}, crop_size=28, image_grid_pinpoints=pinpoints)
    assert np.array_equal(ours, next_(images=image, **RAW)["pixel_values"][0])
    onevision = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints)
    assert np.array_equal(ours, onevision(images=image, **RAW)["pixel_values"][0])


def test_onevision_pads_each_of_several_images_to_a_square():
    policy = Fixed(image_size=28, fit="pad", newline=True)
    images = [picture(75, 50), picture(20, 31, seed=1)]
    processor = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28})
    theirs = processor(images=[images], **RAW)["pixel_values"]
    for image, expected in zip(images, theirs, strict=True):
        assert np.array_equal(channels_first(policy.apply(image)[0]), expected)
    assert policy.plan(75, 50).llm_tokens == 5  # 2 x 2 patches and one newline


def test_the_two_sources_of_anyres():
    """LLaVA reads pinpoints as (width, height) and cuts where transformers rounds to 7 digits."""
    pinpoints = AnyRes().pinpoints
    theirs, llava = AnyRes(), AnyRes(source="llava")
    swapped = AnyRes(source="llava", pinpoints=tuple((b, a) for a, b in pinpoints))
    ties = rounded = 0
    for width, height in [*image_sizes(1500, 1500), (110, 176), (198, 176), (376, 799)]:
        plan = llava.plan(width, height)
        across, down = select_best_resolution((width, height), pinpoints)  # symmetric: LLaVA's has widths first
        assert plan.grid == (down // 336, across // 336)
        ties += plan.grid != theirs.plan(width, height).grid
        assert swapped.plan(width, height).grid == theirs.plan(width, height).grid
        regrid = swapped.plan(width, height).regrid
        full_h, full_w = regrid.rows * 24, regrid.columns * 24
        if width / height > full_w / full_h:
            cut = (full_h - int(height * (full_w / width))) // 2
            assert (regrid.top, regrid.left, regrid.height, regrid.width) == (cut, 0, full_h - 2 * cut, full_w)
        else:
            cut = (full_w - int(width * (full_h / height))) // 2
            assert (regrid.top, regrid.left, regrid.height, regrid.width) == (0, cut, full_h, full_w - 2 * cut)
        rounded += regrid != theirs.plan(width, height).regrid
    assert ties > 0, "small squares: transformers' canvas lies, LLaVA's stands"
    assert rounded == 3
    assert (theirs.plan(100, 100).grid, llava.plan(100, 100).grid) == ((1, 2), (2, 1))
    two = {
        source: AnyRes(source=source, pinpoints=((672, 672),)).plan(99, 176).regrid
        for source in ("llava", "transformers")
    }
    assert two["llava"] != two["transformers"]


# InternVL -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("least", "most"), [(1, 12), (1, 6), (2, 4), (3, 3), (1, 1)])
def test_internvl_grids_equal_transformers(least, most):
    policy = InternVL(min_tiles=least, max_tiles=most)
    processor = got.GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448}, min_patches=least, max_patches=most, crop_to_patches=True
    )
    for width, height in image_sizes(800, 3000, seed=least):
        plan = policy.plan(width, height)
        columns, rows = got.get_optimal_tiled_canvas((height, width), (448, 448), least, most)
        assert plan.grid == (rows, columns)
        assert len(plan.tiles) == processor.get_number_of_image_patches(height, width)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_internvl_pixels_and_text_equal_transformers(width, height):
    policy, image = InternVL(image_size=28), picture(width, height)
    processor = got.GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=True)
    theirs = processor(images=image, **RAW)
    assert np.array_equal(channels_first(policy.apply(image)[0]), theirs["pixel_values"])
    stand_in = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<x>", image_seq_length=1
    )
    expected = InternVLProcessor.replace_image_token(stand_in, theirs, 0)
    assert policy.plan(width, height).prompt("<x>") == expected


@pytest.mark.parametrize(("least", "most"), [(1, 12), (2, 4), (6, 6)])
def test_internvl_grids_equal_its_own_code(least, most):
    """Its grids come out of a set, in another order than transformers': no size is known where that decides."""
    pairs = {(c, r) for c in range(1, most + 1) for r in range(1, most + 1) if least <= c * r <= most}
    grids = sorted(pairs, key=lambda pair: pair[0] * pair[1])
    policy = InternVL(min_tiles=least, max_tiles=most)
    for width, height in image_sizes(1000, 2000, seed=7):
        nearest, found = math.inf, (1, 1)
        for columns, rows in grids:
            distance = abs(width / height - columns / rows)
            if distance < nearest:
                nearest, found = distance, (rows, columns)
            elif distance == nearest and width * height > 0.5 * 448 * 448 * columns * rows:
                found = (rows, columns)
        assert policy.plan(width, height).grid == found


def test_internvl_ties_go_to_the_larger_grid_of_a_large_image():
    policy = InternVL()
    assert policy.plan(448, 448).grid == (1, 1)
    assert policy.plan(640, 640).grid == (2, 2)  # 409,600 pixels: more than half of 4 tiles
    assert policy.plan(633, 633).grid == (1, 1)
    assert len(policy.plan(448, 448).tiles) == 1, "one tile needs no thumbnail"


# Idefics3, SmolVLM, nanoVLM -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("longest", "tile"), [(4 * 364, 364), (2048, 512), (300, 364), (5000, 512), (1000, 364)])
def test_idefics3_plans_equal_transformers(longest, tile):
    policy = Idefics3(longest_edge=longest, image_size=tile, patch_size=tile // 26 if tile == 364 else 16)
    processor = idefics3.Idefics3ImageProcessorPil()
    processor.resize = lambda image, size, resample=None: (size.height, size.width)
    for width, height in image_sizes(800, 4000, ratio=30):
        first = idefics3.get_resize_output_image_size(np.broadcast_to(np.uint8(0), (3, height, width)), longest)
        plan = policy.plan(width, height)
        assert (plan.views[0][0].width, plan.views[0][0].height) == first[::-1]
        stretched = processor.resize_for_vision_encoder(np.broadcast_to(np.uint8(0), (3, *first)), tile)
        assert plan.resized == stretched[::-1]
        # Not compared with get_number_of_image_patches: where longest_edge is no multiple of the tile, that count of
        # transformers 5.23 differs from what its preprocess cuts (573 x 389 with 1000 and 364: 2 x 3, where 3 x 3 are
        # cut), because it rounds up the height from before the stretch.
        assert plan.grid == (stretched[0] // tile, stretched[1] // tile)


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize(("width", "height"), SIZES)
def test_idefics3_pixels_and_text_equal_transformers(width, height, split):
    policy, image = Idefics3(longest_edge=112, image_size=28, split=split), picture(width, height)
    settings = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": split}
    ours, plan = channels_first(policy.apply(image)[0]), policy.plan(width, height)
    for processor in (idefics3.Idefics3ImageProcessorPil(**settings), SmolVLMImageProcessorPil(**settings)):
        theirs = processor(images=image, return_row_col_info=True, **RAW)
        assert np.array_equal(ours, theirs["pixel_values"][0])
        assert (theirs["rows"], theirs["cols"]) == (([[plan.grid[0]]], [[plan.grid[1]]]) if split else ([[0]], [[0]]))
    stand_in = SimpleNamespace(
        fake_image_token="<fake_token_around_image>", global_image_tag="<global-img>", image_token="<image>",
        image_seq_len=1,
    )  # fmt: skip
    assert plan.prompt("<image>") == Idefics3Processor.replace_image_token(stand_in, theirs, 0)
    assert plan.prompt("<image>").count("<image>") == plan.llm_tokens


def test_idefics3_names_rows_and_columns():
    plan = Idefics3().plan(640, 300)
    assert plan.grid == (2, 4)
    assert plan.text[:4] == (
        "<fake_token_around_image><row_1_col_1>", 169, "<fake_token_around_image><row_1_col_2>", 169
    )  # fmt: skip
    assert plan.text[8] == "\n<fake_token_around_image><row_2_col_1>"
    assert plan.text[-3:] == ("\n\n<fake_token_around_image><global-img>", 169, "<fake_token_around_image>")
    assert plan.llm_tokens == 9 * 169


def nanovlm_size(height, width, tile, longest, grow):
    """The rule of nanoVLM's DynamicResize, height first."""
    long, short = max(height, width), min(height, width)
    target = longest if grow else min(longest, math.ceil(long / tile) * tile)
    other = max(math.ceil(short * (target / long) / tile) * tile, tile)
    return (other, target) if width >= height else (target, other)


@pytest.mark.parametrize("grow", [True, False])
def test_nanovlm_puts_the_overview_first(grow):
    policy = NanoVLM(grow=grow)
    for width, height in image_sizes(800, 3000):
        down, across = nanovlm_size(height, width, 512, 2048, grow)
        plan = policy.plan(width, height)
        assert plan.resized == (across, down)
        rows, columns = down // 512, across // 512
        expected = "<|global_image|>" + "<|image|>" * 64
        if (rows, columns) != (1, 1):
            for row in range(rows):
                for column in range(columns):
                    expected += f"<row_{row + 1}_col_{column + 1}>" + "<|image|>" * 64
        assert plan.prompt("<|image|>") == expected
        assert len(plan.tiles) == expected.count("_image|>") + expected.count("_col_")
        assert plan.tiles[0].view == len(plan.views) - 1


# Mllama ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("most", [1, 2, 4, 6])
def test_mllama_plans_equal_transformers(most):
    policy = Mllama(max_tiles=most)
    for width, height in image_sizes(600, 3000, seed=most):
        down, across = mllama.get_optimal_tiled_canvas(height, width, most, 560)
        fitted = mllama.get_image_size_fit_to_canvas(height, width, down, across, 560)
        plan = policy.plan(width, height)
        assert plan.grid == (down // 560, across // 560)
        assert plan.resized == tuple(int(x) for x in fitted[::-1])
        assert policy.aspect_ratio_id(plan) == mllama.convert_aspect_ratios_to_ids_np([[plan.grid]], most)[0, 0]
        mask = mllama.build_aspect_ratio_mask_np([[plan.grid[::-1]]], most)
        assert policy.tile_mask(plan) == tuple(mask[0, 0].tolist())


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_mllama_pixels_equal_transformers(width, height):
    policy, image = Mllama(image_size=28), picture(width, height)
    processor = mllama.MllamaImageProcessorPil(size={"height": 28, "width": 28})
    theirs, plan = processor(images=image, **RAW), policy.plan(width, height)
    assert np.array_equal(channels_first(policy.apply(image)[0]), theirs["pixel_values"][0, 0, : len(plan.tiles)])
    assert not theirs["pixel_values"][0, 0, len(plan.tiles) :].any()
    assert theirs["num_tiles"] == [[len(plan.tiles)]]
    assert theirs["aspect_ratio_ids"].tolist() == [[policy.aspect_ratio_id(plan)]]


def test_mllama_reads_tiles_by_cross_attention():
    plan = Mllama().plan(1120, 1120)
    assert (plan.llm_tokens, plan.cross_tokens, plan.text) == (0, 4 * 1601, ("<|image|>",))
