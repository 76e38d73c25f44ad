"""Native resolution against transformers 5.23: sizes, grids, pixels, videos and their text."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import image_sizes, picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as smart_resize_video

from fastmllm.data.resolution import Native

QWEN3 = Native(
    patch_size=16, min_pixels=65536, max_pixels=16777216, video_min_pixels=4096, video_max_pixels=25165824,
    video_budget="video",
)  # fmt: skip


@pytest.mark.parametrize("policy", [Native(), QWEN3, Native(min_pixels=200_000, max_pixels=300_000)])
def test_sizes_equal_smart_resize(policy):
    block = policy.patch_size * policy.merge_size
    for width, height in image_sizes(3000, 4000, ratio=190):
        expected = smart_resize(height, width, block, policy.min_pixels, policy.max_pixels)
        plan = policy.plan(width, height)
        assert plan.resized == expected[::-1]
        grid = (1, expected[0] // policy.patch_size, expected[1] // policy.patch_size)
        assert plan.grid_thw == grid
        assert plan.vit_tokens == grid[1] * grid[2] == 4 * plan.llm_tokens
        assert plan.text == ("<|vision_start|>", plan.llm_tokens, "<|vision_end|>")


@pytest.mark.parametrize(("width", "height"), [(75, 50), (50, 75), (28, 28), (200, 9), (300, 290), (5, 7), (42, 70)])
def test_pixels_equal_transformers(width, height):
    limits = {"min_pixels": 56 * 56, "max_pixels": 112 * 112}
    policy, image = Native(**limits), picture(width, height)
    theirs = Qwen2VLImageProcessorPil(**limits)(images=image, do_rescale=False, do_normalize=False, return_tensors="np")
    plan, pixels = policy.plan(width, height), policy.apply(image)[0]
    assert theirs["image_grid_thw"].tolist() == [list(plan.grid_thw)]
    _, h, w = plan.grid_thw
    patches = theirs["pixel_values"].reshape(h // 2, w // 2, 2, 2, 3, 2, 14, 14)[:, :, :, :, :, 0]
    whole = patches.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * 14, w * 14, 3)
    assert np.array_equal(pixels[0].numpy(), whole)


def test_without_limits_a_size_is_only_rounded():
    policy = Native(min_pixels=None, max_pixels=None)
    assert policy.plan(9000, 7000).resized == (round(9000 / 28) * 28, 7000)
    assert policy.plan(3, 3).resized == (28, 28)
    assert policy.plan(100, 1).resized[1] == 28


def test_a_narrow_image_is_refused():
    assert Native().plan(2000, 10).llm_tokens > 0
    with pytest.raises(ValueError, match=r"the aspect ratio of 2001 x 10 is 200.1, more than 200: crop it"):
        Native().plan(2001, 10)


def test_videos_by_frame_have_the_size_of_an_image():
    policy = Native(video_min_pixels=56 * 56, video_max_pixels=28 * 28 * 20)
    for frames in (1, 2, 5, 8):
        plan = policy.plan_video(333, 222, frames)
        down, across = smart_resize(222, 333, 28, 56 * 56, 28 * 28 * 20)
        assert plan.grid_thw == (-(-frames // 2), down // 14, across // 14)
        assert plan.llm_tokens == plan.vit_tokens // 4 == plan.grid_thw[0] * down * across // 784
        assert plan.text == ("<|vision_start|>", plan.llm_tokens, "<|vision_end|>")
        assert plan.frames == frames


def test_videos_as_a_whole_equal_transformers():
    for index, (width, height) in enumerate(image_sizes(2000, 2500, ratio=150)):
        frames = 2 + index % 61
        plan = QWEN3.plan_video(width, height, frames)
        expected = smart_resize_video(frames, height, width, 2, 32, 4096, 25165824)
        assert plan.resized == expected[::-1]
        assert plan.grid_thw == ((frames + 1) // 2, expected[0] // 16, expected[1] // 16)


@pytest.mark.parametrize("frames", [2, 5])
def test_the_time_stands_in_front_of_frames(frames):
    plan = QWEN3.plan_video(64, 64, frames, seconds=[i / 4 for i in range(frames)])
    stand_in = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2), vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>", video_token="<v>",
    )  # fmt: skip
    stand_in._calculate_timestamps = functools.partial(Qwen3VLProcessor._calculate_timestamps, stand_in)
    video = {
        "video_grid_thw": np.array([plan.grid_thw]),
        "video_metadata": [SimpleNamespace(fps=4, frames_indices=list(range(frames)))],
    }
    assert plan.prompt("<v>") == Qwen3VLProcessor.replace_video_token(stand_in, video, 0)
    assert sum(piece for piece in plan.text if isinstance(piece, int)) == plan.llm_tokens


def test_frames_are_resized_alone_and_the_last_one_repeated():
    policy = Native(video_min_pixels=28 * 28, video_max_pixels=56 * 56)
    frames = [picture(75, 50, seed) for seed in range(3)]
    (pixels,) = policy.apply_video(frames)
    plan = policy.plan_video(75, 50, 3)
    assert pixels.shape == (4, plan.grid_thw[1] * 14, plan.grid_thw[2] * 14, 3)
    assert torch.equal(pixels[3], pixels[2])
    for frame, found in zip(frames, pixels, strict=False):
        assert np.array_equal(found.numpy(), np.array(frame.resize(plan.resized, 3)))
    assert plan.effective_pixels <= 3 * 75 * 50


def test_videos_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="0 frames with None times"):
        Native().plan_video(64, 64, 0)
    with pytest.raises(ValueError, match="3 frames with 2 times"):
        QWEN3.plan_video(64, 64, 3, seconds=[0.0, 1.0])
    with pytest.raises(ValueError, match="1 frames do not fill a patch of 2"):
        QWEN3.plan_video(64, 64, 1)
    with pytest.raises(ValueError, match="a video of 0 x 64 pixels"):
        Native().plan_video(0, 64, 2)
    with pytest.raises(ValueError, match=r"must have one size, got \[\(64, 64\), \(75, 50\)\]"):
        Native().apply_video([picture(64, 64), picture(75, 50)])
    with pytest.raises(ValueError, match="a plan for 4 frames does not fit 2"):
        Native().apply_video([picture(64, 64)] * 2, Native().plan_video(64, 64, 4))
