"""patch(compress=…) over several turns: what a cache holds is shorter than the conversation that is given."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_by_hand import answer, image_tokens, logits
from hf_checks import distance
from tiny_hf import IMAGE
from tiny_hf_compress import KINDS, NEXT, ROWS, follow
from transformers import DynamicCache

from fastmllm.compression import make
from fastmllm.hf import patch
from fastmllm.hf.compress.cached import RECORD

EXACT = 1e-5
TURNS = ("llava", "internvl", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=[k for k in KINDS if k.name in TURNS], ids=repr)
def kind(request):
    return request.param


def compressor(kind):
    return make("topk", kind.keep, scorer="norm", position="keep" if kind.mrope else "renumber")


def conversation(kind, rows, turns):
    """Return what is answered at each turn, by a loop without cache."""
    model = kind.build()
    with torch.no_grad():
        images = image_tokens(model, kind, compressor(kind))
        said, so_far = [], [list(row) for row in rows]
        for new in turns:
            for row, more in zip(so_far, new, strict=True):
                row.extend(more)
            said.append(torch.tensor([answer(model, kind, images, tuple(row), 4) for row in so_far]))
            for row, words in zip(so_far, said[-1].tolist(), strict=True):
                row.append(words)
    return said


@pytest.mark.parametrize("first", ["images", "text"])
def test_a_second_turn_with_a_new_image(kind, first):
    rows = ROWS if first == "images" else (([1, 20, 21],), ([1, 40, 41, 42, 43],), ([1, 30],))
    expected = conversation(kind, rows, [((), (), ()), NEXT, tuple(([60, 61],) for _ in rows)])
    model, cache = kind.build(), DynamicCache()
    patch(model, compress=compressor(kind))
    before = kind.rows(rows, side="left")
    said = model.generate(**before, past_key_values=cache, **GREEDY)
    assert torch.equal(said[:, -4:], expected[0])
    for new, words in zip((NEXT, tuple(([60, 61],) for _ in rows)), expected[1:], strict=True):
        batch = follow(kind, before, said, new)
        said = model.generate(**batch, past_key_values=cache, **GREEDY)
        assert torch.equal(said[:, :-4], batch["input_ids"])
        assert torch.equal(said[:, -4:], words)
        before = batch


def test_the_cache_of_a_prompt_is_copied_for_several_questions(kind):
    expected = conversation(kind, ROWS, [((), (), ()), NEXT])
    model = kind.build()
    patch(model, compress=compressor(kind))
    before = kind.rows(side="left")
    out = model.generate(**before, return_dict_in_generate=True, **GREEDY)
    batch = follow(kind, before, out.sequences, NEXT)
    for _ in range(2):
        cache = copy.deepcopy(out.past_key_values)
        assert torch.equal(model.generate(**batch, past_key_values=cache, **GREEDY)[:, -4:], expected[1])


@pytest.mark.parametrize("kind", [k for k in KINDS if k.name in (*TURNS, "gemma3")], ids=repr)
def test_a_loop_of_forwards_takes_the_mask_of_the_whole_text(kind):
    """One of its words is the image's id, which without an image is a word like others."""
    model = kind.build()
    with torch.no_grad():
        images = image_tokens(model, kind, compressor(kind))
        patched = kind.build()
        patch(patched, compress=compressor(kind))
        batch = kind.rows(side="left")
        out = patched(**batch, use_cache=True)
        assert getattr(out.past_key_values, RECORD).given == batch["input_ids"].shape[1]
        mask, more = batch["attention_mask"], [44, IMAGE, 46]
        for i, token in enumerate(more):
            mask = torch.cat([mask, torch.ones(len(ROWS), 1, dtype=torch.long)], 1)
            ids = torch.full((len(ROWS), 1), token)
            out = patched(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
            hand = [logits(model, kind, images, row, tuple(more[: i + 1]))[-1] for row in ROWS]
            assert distance(list(out.logits[:, -1]), hand) < EXACT


def test_a_forward_behind_a_cache_brings_a_new_image(kind):
    model = kind.build()
    with torch.no_grad():
        images = image_tokens(model, kind, compressor(kind))
        patched = kind.build()
        patch(patched, compress=compressor(kind))
        batch = kind.rows(side="left")
        cache = patched(**batch, use_cache=True).past_key_values
        new = kind.rows(NEXT, side="left")
        mask = torch.cat([batch["attention_mask"], new.pop("attention_mask")], 1)
        out = patched(**new, attention_mask=mask, past_key_values=cache, use_cache=True)
        hand = [logits(model, kind, images, (*row, *more)) for row, more in zip(ROWS, NEXT, strict=True)]
    new_rows = [len(h) - len(logits(model, kind, images, row)) for h, row in zip(hand, ROWS, strict=True)]
    assert distance([o[-n:] for o, n in zip(out.logits, new_rows, strict=True)],
                    [h[-n:] for h, n in zip(hand, new_rows, strict=True)]) < EXACT  # fmt: skip


def test_a_mask_of_another_length_is_refused(kind):
    model = kind.build()
    patch(model, compress=compressor(kind))
    cache = model(**kind.rows(side="left"), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="goes with neither"):
        model(input_ids=torch.full((3, 1), 44), attention_mask=torch.ones(3, 9).long(), past_key_values=cache)


def test_what_was_said_behind_the_images_can_be_taken_back(kind):
    model = kind.build()
    patch(model, compress=compressor(kind))
    batch = kind.rows(side="left")
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        more, mask = torch.full((3, 2), 44), torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
        said = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        cache.crop(-2)
        assert torch.equal(model(input_ids=more, attention_mask=mask, past_key_values=cache).logits, said)
        cache.crop(-8)
        with pytest.raises(ValueError, match="text behind its last image"):
            model(input_ids=more, attention_mask=mask, past_key_values=cache)
        with pytest.raises(ValueError, match="the cache is of 3 rows, the text of 1"):
            model(input_ids=more[:1], past_key_values=cache)
