"""topk: exactly K, every scorer, positions, side planes, mixed sizes, batch 1 equals batch n."""

from __future__ import annotations

import pytest
import torch
from device_calls import launches
from visual_tokens import GRIDS, pictures

from fastmllm.compression.bipartite_merge import BipartiteMerge
from fastmllm.compression.budget import tokens_to_keep
from fastmllm.compression.compressor import Evidence
from fastmllm.compression.scorers import ATTENTIVE, SCORERS
from fastmllm.compression.tokens import Tokens
from fastmllm.compression.topk import TopK


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("keep", [1, 7, 0.5, (15, 1, 6)])
def test_keeps_exactly_k_of_every_image_as_alone(scorer, keep):
    tokens, evidence = pictures()
    out, plan = TopK(keep, scorer=scorer)(tokens, evidence)
    assert out.seqlens == tokens_to_keep("", keep, tokens.seqlens)
    assert torch.equal(out.x, tokens.x[plan.keep])
    assert torch.equal(out.pos, tokens.pos[plan.keep])
    begin = 0
    for image, (grid, n) in enumerate(zip(GRIDS, out.seqlens, strict=True)):
        if scorer in ("external",):
            continue  # these come with the batch
        alone, own = pictures((grid,), seed=image)
        single, _ = TopK(n, scorer=scorer)(alone, own)
        assert torch.equal(single.x, out.x[begin : begin + n])
        begin += n


@pytest.mark.parametrize("scorer", ATTENTIVE)
def test_scores_are_the_attention_that_eager_would_give(scorer):
    tokens, evidence = pictures(dtype=torch.float64)
    probe, rows = evidence.probe, {"cls_row": 0, "last_row": -1, "text_rows": 0}.get(scorer)
    expected = []
    for a, b in zip(probe.cu_seqlens[:-1], probe.cu_seqlens[1:], strict=True):
        s = torch.einsum("qhd,khd->hqk", probe.q[a:b], probe.k[a:b]) / 4**0.5
        p = s.softmax(-1).mean(0)  # (n + 1, n + 1)
        expected.append((p.mean(0) if rows is None else p[rows])[1:])
    torch.testing.assert_close(SCORERS[scorer](tokens, evidence, ()), torch.cat(expected))


def test_planes_sizes_and_positions_go_with_their_tokens():
    tokens, _ = pictures()
    ids = torch.arange(len(tokens.x))
    tokens = Tokens.of(tokens.x, GRIDS, pos=ids[:, None].expand(-1, 3), planes=(ids, tokens.x * 2))
    out, plan = TopK(4, scorer="norm")(tokens)
    assert torch.equal(out.planes[0], plan.keep)
    assert torch.equal(out.planes[1], 2 * out.x)
    assert torch.equal(out.pos, plan.keep[:, None].expand(-1, 3))
    renumbered, _ = TopK(4, scorer="norm", position="renumber")(tokens)
    assert renumbered.pos[:, 0].tolist() == [0, 1, 2, 3] * 3
    calibrated, _ = TopK(4, scorer="norm", position="calibrate")(tokens)
    assert torch.equal(calibrated.pos, out.pos)
    torch.testing.assert_close(calibrated.size.view(3, 4).sum(1), torch.tensor([15.0, 16.0, 12.0]))


def test_gradients_reach_the_kept_tokens_alone():
    tokens, evidence = pictures()
    x = tokens.x.clone().requires_grad_()
    out, plan = TopK(4)(tokens.with_x(x), evidence)
    out.x.sum().backward()
    assert x.grad[plan.keep].eq(1).all()
    assert x.grad.sum() == out.x.numel()


def test_the_grid_is_spread_evenly_and_has_exactly_k_places():
    for rows in range(1, 6):
        for columns in range(1, 6):
            x = torch.zeros(rows * columns, 1)
            for keep in range(1, rows * columns + 1):
                tokens = Tokens.of(x, [(rows, columns)])
                marks = SCORERS["grid"](tokens, Evidence(), (keep,)).view(rows, columns)
                assert marks.sum() == keep
                used = marks.sum(1)[marks.sum(1) > 0]
                assert used.max() - used.min() <= 1


@pytest.mark.parametrize("keep", [0, 13, True, 0.0, 1.5, "4", (1, 2), (1, 2, 13), (2.5, 3.0, 1), (True, 1, 1)])
def test_budgets_that_do_not_fit_are_refused(keep):
    tokens, evidence = pictures()
    with pytest.raises(ValueError, match="topk: "):
        TopK(keep)(tokens, evidence)


def test_missing_evidence_is_named():
    tokens, _ = pictures()
    for scorer in (*ATTENTIVE, "external"):
        with pytest.raises(ValueError, match=f"'{scorer}' needs"):
            TopK(2, scorer=scorer)(tokens)
    with pytest.raises(ValueError, match="unknown scorer 'best'"):
        TopK(2, scorer="best")
    with pytest.raises(ValueError, match="position 'none'"):
        TopK(2, position="none")
    with pytest.raises(ValueError, match="mode 'faithful' is not one of clean"):
        TopK(2, mode="faithful")


def test_launches_and_waits():
    tokens, evidence = pictures(((1, 4, 4), (1, 4, 4)))
    counted = {scorer: launches(TopK(4, scorer=scorer), tokens, evidence) for scorer in SCORERS}
    assert counted["norm"] <= 4  # published: a topk, a sort and a gather beside the score
    assert all(n <= 12 for n in counted.values()), counted
    assert launches(BipartiteMerge(8), tokens, evidence) <= 19  # published for one round of Token Merging


def test_another_seed_draws_other_tokens():
    tokens, _ = pictures()
    drawn = [TopK(4, scorer="random", seed=seed)(tokens)[1].keep.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
