"""The picture of a plan: tiles lie where the policy cut them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pictures import picture
from PIL import Image, ImageColor

from fastmllm.compression import Placement
from fastmllm.data.resolution import Plan
from fastmllm.plan.picture import FOOT, LONGEST, MARGIN, PADDING, TILE, draw, frames, save_picture
from fastmllm.plan.stacks import STACKS, find_stack
from fastmllm.plan.tokens import TokenCounts, count_tokens


def planned(name: str, width: int, height: int) -> tuple[Plan, TokenCounts]:
    stack = find_stack(name)
    plan = stack.policy.plan(width, height)
    return plan, count_tokens(plan, stack, Placement())


def test_stretched_tiles_cover_the_image() -> None:
    plan, _ = planned("internvl", 1920, 1080)
    *detail, overview = frames(plan)
    assert [view for view, _ in detail] == [0] * 8
    assert detail[0][1] == pytest.approx((0, 0, 480, 540))
    assert detail[7][1] == pytest.approx((1440, 540, 1920, 1080))
    assert overview == (1, pytest.approx((0, 0, 1920, 1080)))


def test_padding_lies_outside_of_the_image_and_what_is_cropped_outside_of_the_tile() -> None:
    padded = frames(planned("mllama:max_tiles=1", 1120, 560)[0])
    assert padded[0][1] == pytest.approx((0, 0, 1120, 1120))
    centred = frames(planned("llava-next", 1344, 1300)[0])  # into 672 x 672
    assert centred[1][1] == pytest.approx((0, -22, 672, 672 - 22))  # 11 rows of padding, at half the size
    cropped = frames(planned("llava-1.5", 672, 336)[0])
    assert cropped[0][1] == pytest.approx((168, 0, 504, 336))


@pytest.mark.parametrize("name", STACKS)
def test_every_policy_is_drawn(name: str) -> None:
    plan, tokens = planned(name, 300, 200)
    drawn = draw(plan, tokens, "a title")
    assert max(drawn.width, drawn.height - FOOT) == LONGEST
    assert tuple(ImageColor.getrgb(TILE)) in {colour for _, colour in drawn.getcolors(1 << 24)}


def test_the_image_and_its_padding_are_seen() -> None:
    plan, tokens = planned("mllama:max_tiles=1", 400, 200)
    drawn = np.array(draw(plan, tokens, "", Image.new("RGB", (400, 200), "#00ff00")))
    half = (LONGEST - 2 * MARGIN) // 2
    greens = (drawn == (0, 255, 0)).all(-1).sum(1)
    assert (greens[MARGIN + 10 : MARGIN + half - 10] > 0).mean() > 0.9  # between the lines of tokens
    assert not greens[MARGIN + half + 10 :].any()
    assert (drawn[MARGIN + half + 10 :] == ImageColor.getrgb(PADDING)).all(-1).any()


def test_a_file_is_drawn_and_a_long_title_is_not_cut(tmp_path: Path) -> None:
    picture(20, 200).save(tmp_path / "a.png")
    plan, tokens = planned("qwen2.5-vl", 20, 200)
    save_picture(plan, tokens, "qwen2.5-vl", str(tmp_path / "a.png"), tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as drawn:
        assert drawn.width > 400
        assert drawn.height == LONGEST + FOOT
