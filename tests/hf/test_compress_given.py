"""patch(compress=…) by what the caller knows of the tokens: `fastmllm.hf.relevance`."""

from __future__ import annotations

import threading

import pytest
import torch
from hf_by_hand import answer, image_tokens, logits
from hf_checks import distance, gradients
from tiny_hf_compress import KINDS, ROWS
from tiny_hf_video import MIXED, VIDEO_KINDS

from fastmllm.compression import Compressor, Evidence, make
from fastmllm.compression.selection import select
from fastmllm.hf import patch, relevance, unpatch
from fastmllm.hf.compress.fitting import check
from fastmllm.hf.compress.seams import SEAMS

BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA = BY_NAME["llava"]
QWEN = next(kind for kind in VIDEO_KINDS if kind.name == "qwen2_5_vl")
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
BY = {
    "cdpruner": ("greedy_diverse", {"objective": "dpp", "relevance": "given"}),
    "external": ("topk", {"scorer": "external"}),
}


def made(kind, by, keep=4):
    method, options = BY[by]
    return make(method, keep, position="keep" if kind.mrope else "renumber", **options)


def drawn(lengths):
    """Return one tensor an image, from -1 to 1 as a cosine."""
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(n, generator=generator) * 2 - 1 for n in lengths]


class Told:
    """A compressor that is told of each image in turn."""

    def __init__(self, compressor, scores):
        self.compressor, self.scores = compressor, iter(scores)

    def __call__(self, tokens):
        scores = torch.cat([next(self.scores) for _ in tokens.seqlens]).double()
        return self.compressor(tokens, Evidence(relevance=scores, scores=scores))


CASES = [
    (LLAVA, ROWS, [16] * 3, []),
    (BY_NAME["llava_next"], ROWS, [16] * 11, []),  # of each tile
    (QWEN, MIXED, [16, 12, 12], [27, 16]),
]


@pytest.mark.parametrize("by", BY)
@pytest.mark.parametrize(("kind", "rows", "images", "videos"), CASES, ids=["llava", "tiles", "videos"])
def test_logits_and_answers_are_those_by_hand(kind, rows, images, videos, by):
    model, scores = kind.build(), drawn([*images, *videos])
    with torch.no_grad():
        tokens = image_tokens(model, kind, Told(made(kind, by), scores))
        hand = [logits(model, kind, tokens, row) for row in rows]
        said = torch.tensor([answer(model, kind, tokens, row, 4) for row in rows])
        patch(model, compress=made(kind, by))
        order = [part for row in rows for part in row if isinstance(part, int)]
        if videos:  # the batch has two images of three, and both videos
            given = [scores[i] for i in order if i < len(images)]
            more = {"videos": torch.cat([scores[i] for i in order if i >= len(images)])}
        else:
            given, more = scores, {}
        for scored in (given, torch.cat(given)):
            with relevance(model, scored, **more):
                out = model(**kind.rows(rows)).logits
                generated = model.generate(**kind.rows(rows, side="left"), **GREEDY)
            assert distance([o[: len(h)] for o, h in zip(out, hand, strict=True)], hand) < 1e-5
            assert torch.equal(generated[:, -4:], said)


def test_a_published_name_learns_by_given_relevance():
    batch, scores = LLAVA.rows(labels=True), torch.stack(drawn([16] * 3))
    found = []
    for numbers in (scores, -scores):
        model = LLAVA.build().train()
        patch(model, compress="CDPruner:4")
        with relevance(model, numbers):
            found.append(gradients(model, batch))
    assert distance(found[0], found[1]) > 1e-3


def test_what_is_given_is_checked():
    model, batch, scores = LLAVA.build(), LLAVA.rows(), torch.stack(drawn([16] * 3))
    with pytest.raises(ValueError, match="nothing is compressed"), relevance(model, scores):
        pass
    patch(model, compress="divprune:4")
    with pytest.raises(ValueError, match="does not judge by it"), relevance(model, scores):
        pass
    patch(model, compress=made(LLAVA, "cdpruner"))
    with pytest.raises(ValueError, match=r"images have none: call the model inside of `with fastmllm\.hf\.relevance"):
        model(**batch)
    for wrong, why in (
        (scores[:2], r"tensors of \(16, 16\) numbers for 48 tokens: 3 images"),
        (scores.flatten()[:-1], r"shape \(47,\) for 48"),
        (list(scores[:, :, None]), "tensors of"),
    ):
        with pytest.raises(ValueError, match=why), relevance(model, wrong):
            model(**batch)
    with pytest.raises(ValueError, match="finite"), relevance(model, scores / 0):
        pass
    weighed = make("greedy_diverse", 4, objective="coverage", relevance="given", position="renumber")
    patch(model, compress=weighed)
    with pytest.raises(ValueError, match="at least 0"), relevance(model, scores):
        pass
    with relevance(model, scores.abs()):
        assert model(**batch).logits.shape[1] == 18
    assert unpatch(model)(**batch).logits.shape[1] == 42


def test_a_block_is_of_its_thread_and_ends():
    model, batch, scores = LLAVA.build(), LLAVA.rows(), torch.stack(drawn([16] * 3))
    patch(model, compress=made(LLAVA, "external"))
    seen = []

    def other():
        try:
            model(**batch)
        except ValueError as error:
            seen.append(str(error))

    with relevance(model, scores):
        with relevance(model, -scores):
            turned = model(**batch).logits
        kept = model(**batch).logits
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert "images have none" in seen[0]
    assert not torch.equal(turned, kept)
    with pytest.raises(ValueError, match="images have none"):
        model(**batch)


def test_all_tokens_kept_ask_for_nothing():
    model, batch = LLAVA.build(), LLAVA.rows()
    patch(model)
    with torch.no_grad():
        expected = model(**batch).logits
        patch(model, compress=made(LLAVA, "cdpruner", 1.0))
        assert torch.equal(model(**batch).logits, expected)


class Loudest(Compressor):
    """A compressor of the caller's own."""

    name = "loudest"

    def reduce(self, tokens, evidence, budgets):
        return select(tokens, evidence.relevance + evidence.scores, budgets)


def test_a_compressor_of_ones_own_reads_either_name():
    model, batch, scores = LLAVA.build(), LLAVA.rows(), torch.stack(drawn([16] * 3))
    found = []
    for compressor in (made(LLAVA, "external"), Loudest(4, position="renumber")):
        patch(model, compress=compressor)
        with relevance(model, scores):
            found.append(model(**batch).logits)
    assert torch.equal(*found)


def test_temporal_methods_fit_where_there_are_videos():
    for name, seam in SEAMS.items():
        model = BY_NAME[name].build()
        compressor = make("temporal_dedup", 0.5, position="keep" if seam.mrope else "renumber")
        if name in ("qwen2_vl", "qwen2_5_vl", "llava_onevision"):
            check(compressor, seam, model)
        else:
            with pytest.raises(ValueError, match="frames of videos"):
                check(compressor, seam, model)
