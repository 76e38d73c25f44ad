"""dominant_contextual: VisionZip's and PruMerge's formulas in fp64, exactly K, as alone, gradients, launches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressor_checks import BUDGETS, assert_compiles, assert_exact_and_as_alone, assert_planes_go_along
from device_calls import launches
from visual_tokens import pictures

from fastmllm.compression.dominant_contextual import DominantContextual

VISIONZIP = {"contextual": 0.3}
PRUMERGE = {"contextual": 0, "merge": "neighbours"}
OPTIONS = (
    VISIONZIP,
    {**VISIONZIP, "scorer": "received"},
    {**VISIONZIP, "mode": "faithful"},
    {"contextual": 1},
    PRUMERGE,
    {**PRUMERGE, "contextual": 0.3},
    {**PRUMERGE, "mode": "faithful"},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("keep", BUDGETS, ids=str)
def test_exactly_k_of_every_image_as_alone(options, keep):
    assert_exact_and_as_alone(lambda k: DominantContextual(k, **options), keep)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_planes_and_sizes_go_along(options):
    assert_planes_go_along(DominantContextual(6, **options))


def _images(tokens, evidence):
    """Yield of each image features (n, C), the class token's query and keys (n + 1, H, D) with its own first."""
    probe = evidence.probe
    bounds = zip(tokens.cu_seqlens, tokens.cu_seqlens[1:], probe.cu_seqlens, probe.cu_seqlens[1:], strict=False)
    for a, b, c, d in bounds:
        yield tokens.x[a:b], probe.q[c], probe.k[c:d]


def _cosine(a, b):
    return torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T


def _visionzip(x, query, keys, dominant, contextual, added):
    """Transcribe arXiv 2412.04467, without the class token."""
    attention = torch.einsum("hd,khd->hk", query, keys).mul(keys.shape[2] ** -0.5).softmax(-1).sum(0)[1:]
    metric = keys[1:].mean(1)
    first = attention.topk(dominant).indices.sort().values
    rest = torch.tensor([i for i in range(len(x)) if i not in first])
    step = max(1, len(rest) // contextual)
    targets = rest[torch.arange(0, len(rest), step)[:contextual]]
    others = torch.tensor([i for i in rest if i not in targets], dtype=torch.int64)
    to = _cosine(metric[others], metric[targets]).argmax(1)
    merged = []
    for c, target in enumerate(targets):
        assigned = x[others[to == c]]
        if added:
            merged.append(x[target] + assigned.sum(0) / max(1, len(assigned)))
        else:
            merged.append(torch.cat((x[target][None], assigned)).mean(0))
    keep = torch.cat((first, targets))
    out = torch.cat((x[first], torch.stack(merged)))
    return out if added else out[keep.argsort()]


@pytest.mark.parametrize(("k", "contextual"), [(7, 2), (10, 1), (3, 3), (11, 4)])
@pytest.mark.parametrize("mode", ["clean", "faithful"])
def test_equals_visionzip(k, contextual, mode):
    tokens, evidence = pictures(dtype=torch.float64)
    out, plan = DominantContextual(k, contextual=contextual, mode=mode)(tokens, evidence)
    expected = [_visionzip(*i, k - contextual, contextual, mode == "faithful") for i in _images(tokens, evidence)]
    torch.testing.assert_close(out.x, torch.cat(expected))
    assert torch.equal(plan.assign[plan.keep], torch.arange(3 * k))  # each output row has its own token
    assert torch.equal(out.size, plan.assign.bincount().float())


def _prumerge(x, query, keys, k):
    """Transcribe arXiv 2403.15388's released code at K = k, with its one token more."""
    flat = keys.flatten(1)
    attention = (query.flatten() @ flat.T * flat.shape[1] ** -0.5).softmax(-1)[1:]
    cosine = _cosine(flat[1:], flat[1:]).fill_diagonal_(-2)
    keep = attention.topk(k - 1).indices
    near = cosine[keep].topk(min(32, len(x) - 1)).indices
    rows = [x[i] + (attention[n, None] * x[n]).sum(0) for i, n in zip(keep, near, strict=True)]
    gone = torch.ones(len(x), dtype=torch.bool).index_fill(0, keep, False)
    return torch.stack([*rows, (attention[gone, None] * x[gone]).sum(0)])


@pytest.mark.parametrize("k", [1, 4, 11])
@pytest.mark.parametrize("grids", [((1, 3, 5), (1, 4, 4)), ((1, 6, 7), (1, 5, 7))], ids=str)
def test_equals_prumerge(k, grids):
    tokens, evidence = pictures(grids, dtype=torch.float64)
    out, _ = DominantContextual(k, mode="faithful", **PRUMERGE)(tokens, evidence)
    torch.testing.assert_close(out.x, torch.cat([_prumerge(*i, k) for i in _images(tokens, evidence)]))


def test_clean_neighbours_are_means():
    tokens, evidence = pictures(((1, 6, 7),), dtype=torch.float64)
    ones = replace(tokens, x=torch.ones_like(tokens.x))
    out, _ = DominantContextual(5, **PRUMERGE)(ones, evidence)
    torch.testing.assert_close(out.x, torch.ones_like(out.x))


def test_clean_contextual_tokens_are_means_by_size():
    tokens, evidence = pictures(dtype=torch.float64)
    size = torch.arange(len(tokens.x)).remainder(3).add(1).float()
    out, plan = DominantContextual(4)(replace(tokens, size=size), evidence)
    sums = torch.zeros_like(out.x).index_add(0, plan.assign, tokens.x * size[:, None])
    mass = torch.zeros(12).index_add(0, plan.assign, size)
    torch.testing.assert_close(out.size, mass)
    torch.testing.assert_close(out.x, sums / mass[:, None])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("sized", [False, True])
def test_gradients(options, sized):
    tokens, evidence = pictures(((1, 2, 3), (1, 2, 4)), dtype=torch.float64)
    size = torch.arange(14.0).remainder(3).add(1) if sized else None
    compressor = DominantContextual((6, 3), **options)

    def run(x):
        return compressor(replace(tokens, x=x, size=size), evidence)[0].x

    assert torch.autograd.gradcheck(run, tokens.x.requires_grad_())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_half_precision_stays_half(options):
    tokens, evidence = pictures()
    out, _ = DominantContextual(5, **options)(tokens.with_x(tokens.x.bfloat16()), evidence)
    exact, _ = DominantContextual(5, **options)(tokens.with_x(tokens.x.bfloat16().float()), evidence)
    assert out.x.dtype == torch.bfloat16
    torch.testing.assert_close(out.x.float(), exact.x, rtol=1e-2, atol=2e-2)


def test_launches_and_waits():
    tokens, evidence = pictures(((1, 24, 24), (1, 24, 24)))
    attention = 4  # the mean of a row over heads, of which the published count knows nothing: it was there
    for mode in ("clean", "faithful"):
        count = launches(DominantContextual(64, contextual=10, mode=mode), tokens, evidence)
        assert count - attention <= 37  # published: 37 and 5 waits
        assert launches(DominantContextual(64, mode=mode, **PRUMERGE), tokens, evidence) <= 70  # published: 815
    for options in OPTIONS:
        launches(DominantContextual((7, 64), **options), tokens, evidence)


@pytest.mark.parametrize("options", OPTIONS[2:3] + OPTIONS[-2:], ids=str)
def test_compiles_as_one_graph(options):
    assert_compiles(DominantContextual(5, **options))


def test_what_does_not_fit_is_refused():
    tokens, evidence = pictures()
    for contextual, merge in ((0, "nearest"), (0.0, "neighbours"), (1.5, "nearest"), (-1, "neighbours")):
        with pytest.raises(ValueError, match="dominant_contextual: contextual"):
            DominantContextual(4, contextual=contextual, merge=merge)
    with pytest.raises(ValueError, match="5 contextual tokens are more than keep 4"):
        DominantContextual(4, contextual=5)(tokens, evidence)
    with pytest.raises(ValueError, match="merge 'all' is not one of nearest, neighbours"):
        DominantContextual(4, merge="all")
    with pytest.raises(ValueError, match="scorer 'norm' is not one of cls_row, received"):
        DominantContextual(4, scorer="norm")
    with pytest.raises(ValueError, match="faithful neighbours are of contextual=0"):
        DominantContextual(4, merge="neighbours", mode="faithful")
    with pytest.raises(ValueError, match="needs the attention of a layer"):
        DominantContextual(4)(tokens)
    grouped = replace(evidence, probe=replace(evidence.probe, k=evidence.probe.k[:, :1]))
    with pytest.raises(ValueError, match="as many heads of keys as of queries, got 1 and 2"):
        DominantContextual(4, mode="faithful", **PRUMERGE)(tokens, grouped)
