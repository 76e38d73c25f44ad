"""Masks, images and ways of a text whose layers lose columns, one by one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastmllm.compression import make
from fastmllm.hf.compress.cached import Held, Left, text
from fastmllm.hf.compress.layers import DECODERS, StagedLayer
from fastmllm.hf.compress.masks import mask_of
from fastmllm.hf.compress.passes import Pass
from fastmllm.hf.compress.prompt import Prompt, image_lengths, images_of_rows
from fastmllm.hf.compress.rows import PAD
from fastmllm.hf.fusion import fused_class

QUERIES = torch.tensor([[5, 7, 8], [PAD, 6, 8]])
KEYS = torch.tensor([[0, 2, 5, 7, 8], [1, PAD, PAD, 6, 8]])


def by_hand(sees):
    """Return (B, T', N') of a predicate on row, query and key; a row that is none sees itself."""
    out = torch.zeros(2, 3, 5, dtype=torch.bool)
    for b in range(2):
        for i, q in enumerate(QUERIES[b].tolist()):
            for j, k in enumerate(KEYS[b].tolist()):
                out[b, i, j] = (j == i + 2) if q == PAD else k != PAD and sees(b, q, k)
    return out


@pytest.mark.parametrize("kind", ["bool", "added", "none", "window"])
def test_a_mask_says_of_what_is_left_what_it_said(kind):
    """Four columns in the cache, five new ones; the second row's first column is padding; an arbitrary mask."""
    mask = torch.rand(2, 1, 5, 9, generator=torch.Generator().manual_seed(0)) > 0.3
    seen = by_hand(lambda b, q, k: bool(mask[b, 0, q - 4, k]))
    options = {"flash": False, "padded": True}
    if kind == "bool":
        assert torch.equal(mask_of(mask, QUERIES, KEYS, 9, **options)[:, 0], seen)
    elif kind == "added":
        least = torch.finfo(torch.float32).min
        out = mask_of(torch.where(mask, 0.0, least), QUERIES, KEYS, 9, **options)[:, 0]
        assert torch.equal(out, torch.where(seen, 0.0, least))
    elif kind == "window":  # the cache has let go of columns 0 to 2
        out = mask_of(mask[..., 3:], QUERIES, KEYS, 9, **options)[:, 0]
        assert torch.equal(out, by_hand(lambda b, q, k: k >= 3 and bool(mask[b, 0, q - 4, k])))
    else:
        assert torch.equal(mask_of(None, QUERIES, KEYS, 9, **options)[:, 0], by_hand(lambda b, q, k: k <= q))


def test_biases_are_added_to_what_is_seen():
    bias, least = torch.arange(10.0).view(2, 5), torch.finfo(torch.float64).min
    out = mask_of(None, QUERIES, KEYS, 9, flash=False, padded=True, bias=bias, dtype=torch.float64)
    seen = by_hand(lambda b, q, k: k <= q)
    assert torch.equal(out[:, 0], torch.where(seen, bias[:, None].double(), least))


def test_flash_takes_columns_and_nobody_takes_a_mask_that_says_nothing():
    mask = torch.ones(2, 9).long()
    mask[1, 1] = 0
    left = mask_of(mask, QUERIES, KEYS, 9, flash=True, padded=True)
    assert left.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert mask_of(None, QUERIES, KEYS, 9, flash=True, padded=True).tolist() == [[1] * 5, [1, 0, 0, 1, 1]]
    assert mask_of(None, QUERIES[:1], KEYS[:1], 9, flash=True, padded=False) is None
    assert mask_of(None, QUERIES[:1], QUERIES[:1], 9, flash=False, padded=False) is None
    assert mask_of(None, QUERIES[:1, 2:], KEYS[:1], 9, flash=False, padded=False) is None
    assert mask_of(None, QUERIES[:1], KEYS[:1], 9, flash=False, padded=False) is not None


def test_images_are_as_they_were_encoded_or_else_runs():
    places = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]]).bool()
    of = lambda x: image_lengths(SimpleNamespace(pooler_output=x), places)  # noqa: E731
    assert of(torch.zeros(4, 2, 3)) == (2, 2, 2, 2)  # two that stand side by side
    assert of([torch.zeros(4, 3), torch.zeros(2, 3), torch.zeros(2, 3)]) == (4, 2, 2)
    assert of([torch.zeros(2, 2, 3), torch.zeros(2, 2, 3)]) == (2, 2, 2, 2)
    assert of(torch.zeros(8, 3)) == (4, 2, 2)
    assert of(torch.zeros(1, 8, 3)) == (4, 2, 2)
    assert images_of_rows((2, 2, 2, 2), places) == [2, 2]
    assert images_of_rows((4, 2, 2), places) == [1, 2]


def test_answers_begin_behind_the_question():
    prompt = Prompt(ids=torch.zeros(1, 5), token=1, seqlens=(), asked=3)
    assert prompt.answers(torch.tensor([[False, True, True, True, True]])).tolist() == [-100, 0, 0, 0]
    assert Prompt(ids=torch.zeros(1, 3), token=1, seqlens=(), asked=3).answers(torch.ones(1, 3).bool()) is None


def test_a_text_without_images_goes_its_way_and_a_cache_is_remembered():
    stages, device = ((2, make("topk", 4, scorer="norm")),), torch.device("cpu")
    assert not Pass(stages, Held(0, [None]), (2, 5), device, None, False).loses
    left = Left(KEYS[:, :2], True)
    way = Pass(stages, Held(4, [left]), (2, 5), device, None, False)
    assert [way.lost(way.group(layer)) for layer in (0, 1, 2, 3)] == [False, False, True, True]
    assert torch.equal(way.whole(1).index, left.then(text(4, 5, 2, device)).index)


def test_layers_keep_their_names():
    layer = type("LlamaDecoderLayer", (torch.nn.Linear,), {})
    assert fused_class(layer, (StagedLayer,)).__name__ == "LlamaDecoderLayer"
    assert "llama" in DECODERS
