"""greedy_diverse: DivPrune's and CDPruner's formulas in fp64, exactly K, as alone, launches."""

from __future__ import annotations

from dataclasses import replace

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

from fastmllm.compression.compressor import Evidence
from fastmllm.compression.greedy_diverse import GreedyDiverse

OPTIONS = (
    {"objective": "max_min"},
    {"objective": "dpp", "relevance": "given"},
    {"objective": "dpp"},
    {"objective": "coverage", "relevance": "cls_row"},
    {"objective": "residual", "relevance": "given"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keep", BUDGETS, ids=str)
def test_exactly_k_of_every_image_as_alone(options, keep):
    assert_exact_and_as_alone(lambda k: GreedyDiverse(k, **options), keep)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selects_tokens_with_all_that_is_theirs(options):
    assert_planes_go_along(GreedyDiverse(5, **options))
    assert_selects_with_gradients(GreedyDiverse(5, **options))


def _divprune(x, k):
    """Transcribe arXiv 2503.02175: the distance to the nearest neighbour first, then to the nearest picked one."""
    unit = x / x.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    picked = [int(distance.topk(2, dim=0, largest=False).values[1].argmax())]
    while len(picked) < k:
        picked.append(int(distance[picked].amin(0).argmax()))
    return sorted(picked)


def _cdpruner(x, relevance, k):
    """Transcribe arXiv 2506.10967: greedy MAP of the DPP whose kernel is r cos r, by Cholesky rows."""
    unit = x / x.norm(dim=1, keepdim=True)
    r = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = r[:, None] * (unit @ unit.T) * r
    left, rows, picked = kernel.diag().clone(), [], []
    for _ in range(k):
        j = int(left.argmax())
        row = (kernel[j] - sum(c[j] * c for c in rows)) / left[j].sqrt()
        rows.append(row)
        left -= row**2
        left[j] = -torch.inf
        picked.append(j)
    return sorted(picked)


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("mode", ["clean", "faithful"])
def test_equals_the_published_formulas(k, mode):
    tokens, evidence = pictures(dtype=torch.float64)
    signed = replace(evidence, relevance=evidence.relevance.double() - 0.5)  # a negated cosine, as published
    _, divprune = GreedyDiverse(k, mode=mode)(tokens)
    _, cdpruner = GreedyDiverse(k, objective="dpp", relevance="given", mode=mode)(tokens, signed)
    for i, (a, b) in enumerate(zip(tokens.cu_seqlens[:-1], tokens.cu_seqlens[1:], strict=True)):
        here = slice(i * k, (i + 1) * k)
        assert (divprune.keep[here] - a).tolist() == _divprune(tokens.x[a:b], k)
        assert (cdpruner.keep[here] - a).tolist() == _cdpruner(tokens.x[a:b], signed.relevance[a:b], k)


def test_equal_relevance_weighs_nothing():
    tokens, _ = pictures()
    same = Evidence(relevance=torch.full((len(tokens.x),), 0.3))
    weighed, _ = GreedyDiverse(5, objective="dpp", relevance="given")(tokens, same)
    assert torch.equal(weighed.x, GreedyDiverse(5, objective="dpp")(tokens)[0].x)


def test_the_scores_of_another_image_change_nothing():
    tokens, evidence = pictures()
    other = evidence.relevance.clone()
    other[15:] *= 100
    runs = [
        GreedyDiverse(4, objective="dpp", relevance="given")(tokens, Evidence(relevance=r))[1].keep[:4]
        for r in (evidence.relevance, other)
    ]
    assert torch.equal(*runs)


def test_launches_and_waits():
    tokens, evidence = pictures(((1, 24, 24), (1, 24, 24)))
    assert launches(GreedyDiverse(64), tokens, evidence) <= 10  # published: 386 an image
    dpp = {"objective": "dpp", "relevance": "given"}
    for mode in ("clean", "faithful"):  # published: 1113
        assert launches(GreedyDiverse(64, mode=mode, **dpp), tokens, evidence) <= 20
    for options in OPTIONS:
        launches(GreedyDiverse((7, 64), **options), tokens, evidence)


@pytest.mark.parametrize("options", OPTIONS[1:2], ids=str)
def test_compiles_as_one_graph(options):
    assert_compiles(GreedyDiverse(5, **options))


def test_what_does_not_fit_is_refused():
    tokens, _ = pictures()
    with pytest.raises(ValueError, match="objective 'best' is not one of max_min"):
        GreedyDiverse(2, objective="best")
    with pytest.raises(ValueError, match="relevance 'text' is not one of given"):
        GreedyDiverse(2, objective="dpp", relevance="text")
    with pytest.raises(ValueError, match="max_min takes no relevance"):
        GreedyDiverse(2, relevance="given")
    with pytest.raises(ValueError, match="'faithful' is for max_min, dpp, not for coverage"):
        GreedyDiverse(2, objective="coverage", mode="faithful")
    with pytest.raises(ValueError, match=r"Evidence\(relevance=...\) of shape \(43,\)"):
        GreedyDiverse(2, objective="dpp", relevance="given")(tokens)
    assert GreedyDiverse(2, objective="coverage", relevance="cls_row").layer == -2
    assert GreedyDiverse(2).layer is None
