"""temporal_dedup: EVS' and DyCoke's formulas in fp64, exactly K, as alone, launches."""

from __future__ import annotations

import pytest
import torch
from compressor_checks import (
    assert_compiles,
    assert_exact_and_as_alone,
    assert_planes_go_along,
    assert_selects_with_gradients,
)
from device_calls import launches
from visual_tokens import pictures

from fastmllm.compression.temporal_dedup import TemporalDedup
from fastmllm.compression.tokens import Tokens

VIDEOS = ((4, 2, 3), (8, 2, 2), (2, 1, 5))  # 24, 32 and 10 tokens
OPTIONS = ({}, {"compare": "groups"}, {"compare": "groups", "mode": "faithful"})


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keep", [0.6, 0.75, (20, 15, 6), (24, 13, 10)], ids=str)
def test_exactly_k_of_every_video_as_alone(options, keep):
    assert_exact_and_as_alone(lambda k: TemporalDedup(k, **options), keep, VIDEOS)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selects_tokens_with_all_that_is_theirs(options):
    assert_planes_go_along(TemporalDedup(0.6, **options), VIDEOS)
    assert_selects_with_gradients(TemporalDedup(0.6, **options), VIDEOS)


def _cosine(a, b):
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def _evs(x, grid, k):
    """Transcribe EVS: 1 - cosine to the frame before, 255 in the first one, the top K of the video."""
    frames = x.view(grid[0], grid[1] * grid[2], -1)
    change = torch.cat((torch.full_like(frames[:1, :, 0], 255), 1 - _cosine(frames[1:], frames[:-1])))
    return change.flatten().argsort(descending=True, stable=True)[:k].sort().values


def _dycoke(x, grid, each):
    """Transcribe DyCoke's temporal merging, in the order that it gives; `each` of n tokens stay of a compared frame."""
    count, n = grid[0], grid[1] * grid[2]
    ids = torch.arange(count * n).view(count, n)
    frames, kept = x.view(count, n, -1), {}

    def least(frame, before):
        return ids[frame][_cosine(frames[before], frames[frame]).topk(each, largest=False).indices]

    for t in range(0, count - 1, 2):
        kept[t], kept[t + 1] = ids[t], least(t + 1, t)
    for t in range(0, count - 4, 4):
        kept[t + 2] = least(t + 2, t)
    return torch.cat([kept[t] for t in sorted(kept)])


@pytest.mark.parametrize("mode", ["clean", "faithful"])
def test_equals_evs(mode):
    tokens, _ = pictures(VIDEOS, dtype=torch.float64)
    _, plan = TemporalDedup((11, 17, 7), mode=mode)(tokens)
    expected = [_evs(x, g, k) for x, g, k in zip(tokens.x.split((24, 32, 10)), VIDEOS, (11, 17, 7), strict=True)]
    assert torch.equal(plan.keep, torch.cat([e + o for e, o in zip(expected, (0, 24, 56), strict=True)]))


@pytest.mark.parametrize("frames", range(2, 11))
@pytest.mark.parametrize("each", [0, 2, 5])
def test_equals_dycoke(frames, each):
    grid = (frames, 2, 3)
    tokens, _ = pictures((grid,), dtype=torch.float64)
    expected = _dycoke(tokens.x, grid, each)
    _, plan = TemporalDedup(len(expected), compare="groups", mode="faithful")(tokens)
    assert torch.equal(plan.keep, expected)


def test_clean_groups_thin_every_third_frame_and_lose_none():
    tokens, _ = pictures(((7, 2, 2),))
    _, plan = TemporalDedup(8 + 5 * 2 + 3, compare="groups")(tokens)
    assert plan.keep.sort().values.equal(plan.keep)
    assert (plan.keep // 4).bincount().tolist() == [4, 3, 3, 3, 4, 2, 2]


def test_what_does_not_change_goes_first():
    frame = torch.randn(1, 4, 6)
    video = frame.repeat(3, 1, 1)
    video[1, 2] += torch.randn(6)
    video[2, 2] = video[1, 2]
    _, plan = TemporalDedup(5)(Tokens.of(video.flatten(0, 1), [(3, 2, 2)]))
    assert plan.keep.tolist() == [0, 1, 2, 3, 6]


def test_launches_and_waits():
    tokens, evidence = pictures(((32, 14, 14), (32, 14, 14)))
    assert launches(TemporalDedup(0.3), tokens, evidence) <= 19  # published: 19 a video, 1 wait
    for options in OPTIONS[1:]:
        assert launches(TemporalDedup(0.6, **options), tokens, evidence) <= 32


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_as_one_graph(options):
    assert_compiles(TemporalDedup(0.6, **options), VIDEOS)


@pytest.mark.parametrize(
    ("grid", "keep", "options", "message"),
    [
        ((3, 2, 2), 3, {}, r"keep 3 of video 0 must lie in 4\.\.12: 1 of its 3 frames, of 4 tokens, stay whole"),
        ((1, 3, 3), 4, {}, r"must lie in 9\.\.9"),
        ((5, 2, 2), 7, {"compare": "groups"}, r"must lie in 8\.\.20"),
        ((5, 2, 2), 17, {"compare": "groups", "mode": "faithful"}, r"must lie in 4\.\.16"),
    ],
)
def test_budgets_that_leave_no_room_are_refused(grid, keep, options, message):
    tokens, _ = pictures((grid,))
    with pytest.raises(ValueError, match=message):
        TemporalDedup(keep, **options)(tokens)


def test_missing_grids_and_unknown_options_are_refused():
    with pytest.raises(ValueError, match="needs the frames of each video"):
        TemporalDedup(2)(Tokens.of(torch.randn(1, 6, 4)))
    with pytest.raises(ValueError, match="compare 'next' is not one of previous, groups"):
        TemporalDedup(2, compare="next")
