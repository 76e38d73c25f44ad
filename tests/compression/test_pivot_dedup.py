"""pivot_dedup: DART's and VisPruner's formulas in fp64, exactly K, as alone, launches."""

from __future__ import annotations

import pytest
import torch
from compressor_checks import (
    BUDGETS,
    assert_compiles,
    assert_exact_and_as_alone,
    assert_planes_go_along,
    assert_selects_with_gradients,
)
from device_calls import launches
from visual_tokens import pictures

from fastmllm.compression.pivot_dedup import PivotDedup

OPTIONS = (
    {},
    {"share": 3, "states": "features"},
    {"share": 0.25},
    {"pivots": "score"},
    {"pivots": "score", "mode": "faithful"},
    {"pivots": "score", "share": 2, "scorer": "received"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keep", BUDGETS, ids=str)
def test_exactly_k_of_every_image_as_alone(options, keep):
    assert_exact_and_as_alone(lambda k: PivotDedup(k, **options), keep)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selects_tokens_with_all_that_is_theirs(options):
    assert_planes_go_along(PivotDedup(6, **options))
    assert_selects_with_gradients(PivotDedup((2, 16, 7), **options))


def _dart(x, norms, k, pivots):
    """Transcribe arXiv 2502.11494: each pivot, largest norm first, adds the least similar tokens that are left."""
    unit = torch.nn.functional.normalize(x, dim=1)
    chosen = norms.topk(pivots).indices.tolist()
    each, more = divmod(k - pivots, pivots)
    for i, pivot in enumerate(chosen[:]):
        left = [j for j in range(len(x)) if j not in chosen]
        cosine = unit[left] @ unit[pivot]
        chosen += [left[j] for j in cosine.topk(each + (i < more), largest=False).indices]
    return sorted(chosen)


def _vispruner(x, attention, k, share):
    """Transcribe arXiv 2412.01818: the best by attention, then rounds that drop 8 of the even places."""
    unit = torch.nn.functional.normalize(x, dim=1)
    order = attention.argsort(descending=True)
    important = int(k * share)
    wanted, rest = k - important, order[important:]
    while wanted > 0 and len(rest) > wanted:
        r = min(8, len(rest) - wanted)
        even, odd = rest[::2], rest[1::2]
        similarity = (unit[even] @ unit[odd].T).max(1).values
        rest = torch.cat((even[similarity.argsort(descending=True)[r:]], odd))
    return sorted(order[:important].tolist() + (rest.tolist() if wanted else []))


GRIDS = ((1, 6, 7), (1, 5, 9), (1, 4, 4))


@pytest.mark.parametrize(("k", "pivots"), [(5, 1), (8, 4), (13, 4), (12, 8)])
@pytest.mark.parametrize("mode", ["clean", "faithful"])
def test_equals_dart(k, pivots, mode):
    tokens, evidence = pictures(GRIDS, dtype=torch.float64)
    _, plan = PivotDedup(k, share=pivots, mode=mode)(tokens, evidence)
    norms = evidence.probe.k[evidence.probe.columns].abs().sum((1, 2))
    for i, (a, b) in enumerate(zip(tokens.cu_seqlens[:-1], tokens.cu_seqlens[1:], strict=True)):
        expected = _dart(tokens.x[a:b], norms[a:b], k, pivots)
        assert (plan.keep[i * k : (i + 1) * k] - a).tolist() == expected


@pytest.mark.parametrize(("k", "share"), [(2, 0.5), (5, 0.5), (10, 0.2), (15, 0.9), (4, 1.0), (6, 0.0)])
@pytest.mark.parametrize("grids", [GRIDS, GRIDS[:1] * 2], ids=str)
def test_equals_vispruner(k, share, grids):
    tokens, evidence = pictures(grids, dtype=torch.float64)
    _, plan = PivotDedup(k, pivots="score", share=share, mode="faithful")(tokens, evidence)
    attention = evidence.probe.received("first")
    for i, (a, b) in enumerate(zip(tokens.cu_seqlens[:-1], tokens.cu_seqlens[1:], strict=True)):
        expected = _vispruner(tokens.x[a:b], attention[a:b], k, share)
        assert (plan.keep[i * k : (i + 1) * k] - a).tolist() == expected


def test_copies_go_first():
    tokens, evidence = pictures(((1, 6, 8),))
    x = torch.eye(6).repeat_interleave(8, 0) * torch.rand(48, 1).add(0.5)
    for mode in ("clean", "faithful"):
        out, _ = PivotDedup(12, pivots="score", share=0.0, mode=mode)(tokens.with_x(x), evidence)
        assert out.x.argmax(1).unique().numel() == 6


def test_launches_and_waits():
    tokens, evidence = pictures(((1, 24, 24), (1, 24, 24)))
    assert launches(PivotDedup(64), tokens, evidence) <= 50  # published: 120 and 58 waits
    assert launches(PivotDedup(64, pivots="score", mode="faithful"), tokens, evidence) <= 345  # published: 519
    assert launches(PivotDedup(64, pivots="score"), tokens, evidence) <= 75
    for options in OPTIONS:
        launches(PivotDedup((7, 64), **options), tokens, evidence)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[4]], ids=str)
def test_compiles_as_one_graph(options):
    assert_compiles(PivotDedup(9, **options))


def test_what_does_not_fit_is_refused():
    tokens, _ = pictures()
    for share, pivots in ((0, "norm"), (1.5, "score"), (-1, "score"), (0.0, "norm")):
        with pytest.raises(ValueError, match="pivot_dedup: share"):
            PivotDedup(4, share=share, pivots=pivots)
    with pytest.raises(ValueError, match="pivots 'best' is not one of norm, score"):
        PivotDedup(4, pivots="best")
    with pytest.raises(ValueError, match="states 'values' is not one of keys, features"):
        PivotDedup(4, states="values")
    with pytest.raises(ValueError, match="unknown scorer 'best'"):
        PivotDedup(4, scorer="best")
    with pytest.raises(ValueError, match="needs the attention of a layer"):
        PivotDedup(4)(tokens)
    assert PivotDedup(4).layer == -2
    assert PivotDedup(4, states="features").layer is None
    assert PivotDedup(4, pivots="score", scorer="norm").layer is None
