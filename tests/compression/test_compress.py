"""Compressors: exactly K tokens, the identity at K = N, gradients, batch 1 equals batch n, clear errors."""

from __future__ import annotations

import pytest
import torch

import fastmllm
from fastmllm.compression import METHODS, compress

ALONE = ("pool", "bipartite_merge")  # these need no evidence and no weights


@pytest.mark.parametrize("method", ALONE)
@pytest.mark.parametrize("keep", [1, 4, 6, 9, 15])
def test_keeps_exactly_k(method, keep):
    tokens = torch.randn(3, 16, 5)
    if method == "pool" and keep == 15:
        with pytest.raises(ValueError, match="15 tokens do not form a grid"):
            compress(tokens, method, keep=keep)
        return
    out = compress(tokens, method, keep=keep)
    assert out.shape == (3, keep, 5)
    for i in range(3):
        torch.testing.assert_close(out[i : i + 1], compress(tokens[i : i + 1], method, keep=keep))


@pytest.mark.parametrize("method", ALONE)
def test_the_whole_grid_is_the_identity(method):
    tokens = torch.randn(2, 9, 4)
    assert compress(tokens, method, keep=9) is tokens


@pytest.mark.parametrize("method", ALONE)
def test_one_token_is_the_mean(method):
    tokens = torch.randn(2, 16, 4, dtype=torch.float64)
    torch.testing.assert_close(compress(tokens, method, keep=1)[:, 0], tokens.mean(1))


@pytest.mark.parametrize("method", ALONE)
def test_gradients_reach_every_token(method):
    tokens = torch.randn(2, 16, 4, requires_grad=True)
    compress(tokens, method, keep=4).sum().backward()
    # K means of disjoint sets: each set's gradients sum to one a channel
    torch.testing.assert_close(tokens.grad.sum(1), torch.full((2, 4), 4.0))
    assert (tokens.grad > 0).all()


def test_pool_is_row_major():
    tokens = torch.arange(16.0).view(1, 16, 1)
    assert compress(tokens, "pool", keep=4).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_merge_joins_equal_neighbours_and_keeps_order():
    values = torch.eye(4).repeat_interleave(2, 0)[None]  # a a b b c c d d
    torch.testing.assert_close(compress(values, "bipartite_merge", keep=4), torch.eye(4)[None])


@pytest.mark.parametrize("keep", [0, 17, -1])
def test_rejects_impossible_counts(keep):
    with pytest.raises(ValueError, match=r"keep .* must lie in 1\.\.16"):
        compress(torch.randn(1, 16, 4), "pool", keep=keep)


def test_rejects_unknown_methods_and_shapes():
    with pytest.raises(ValueError, match="unknown method 'prune'; known: "):
        compress(torch.randn(1, 4, 4), "prune", keep=1)
    with pytest.raises(ValueError, match=r"\(I, N, C\), or .* got \(4, 4\)"):
        compress(torch.randn(4, 4), "pool", keep=1)
    with pytest.raises(ValueError, match="no square grid"):
        compress(torch.randn(1, 6, 4), "pool", keep=2)


def test_ten_methods_have_names_and_the_function_stands_on_top():
    assert fastmllm.compress is compress
    assert sorted(METHODS) == sorted((
        "pixel_shuffle", "pool", "conv_reduce", "attend", "topk", "bipartite_merge", "dominant_contextual",
        "greedy_diverse", "pivot_dedup", "temporal_dedup",
    ))  # fmt: skip
