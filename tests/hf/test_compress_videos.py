"""patch(compress=…) on videos: one budget a video, as if the text had been written for the tokens that are left."""

from __future__ import annotations

import pytest
import torch
from hf_by_hand import answer, image_tokens, logits
from hf_checks import distance
from tiny_hf_compress import START, follow
from tiny_hf_video import MIXED, VIDEO_KINDS
from transformers import DynamicCache

from fastmllm.compression import Placement, TemporalDedup, make
from fastmllm.hf import patch

EXACT = 1e-5
QWEN = next(kind for kind in VIDEO_KINDS if kind.name == "qwen2_5_vl")
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
FILMS = (([1, START], 3, [22, 23, START], 4, [25, 26, 27, 28]), ([1, START], 4, [30, 31, 32, 33]))
OF = {  # the first frame of each video stays whole with EVS, every other or more with DyCoke
    "topk": ("topk", 4, {"scorer": "norm"}), "evs": ("temporal_dedup", 0.7, {}),
    "dycoke": ("temporal_dedup", 0.7, {"compare": "groups"}),
}  # fmt: skip


@pytest.fixture(params=VIDEO_KINDS, ids=repr)
def kind(request):
    return request.param


def made(kind, name, keep=None):
    method, own, options = OF[name]
    return make(method, keep or own, position="keep" if kind.mrope else "renumber", **options)


class Films:
    """Temporal deduplication as it is meant for images beside videos: they stay as they are."""

    def __init__(self, compressor):
        self.compressor = compressor

    def __call__(self, tokens):
        return (tokens, None) if tokens.grid[0][0] == 1 else self.compressor(tokens)


def by_hand(kind, compressor):
    model = kind.build()
    films = Films(compressor) if isinstance(compressor, TemporalDedup) else compressor
    return model, image_tokens(model, kind, films)


@pytest.mark.parametrize("rows", [MIXED, FILMS], ids=["mixed", "films"])
@pytest.mark.parametrize("name", OF)
def test_logits_loss_gradients_and_answers_are_those_by_hand(kind, name, rows):
    compressor = made(kind, name)
    model, images = by_hand(kind, compressor)
    hand = [logits(model, kind, images, row) for row in rows]
    targets = torch.tensor([token for row in rows for token in row[-1][-4:]])
    loss = torch.nn.functional.cross_entropy(torch.cat([row[-5:-1] for row in hand]), targets)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        _, images = by_hand(kind, compressor)
        said = torch.tensor([answer(model, kind, images, row, 4) for row in rows])
    patched = kind.build()
    patch(patched, compress=compressor)
    for side in ("right", "left"):
        with torch.no_grad():
            out = patched(**kind.rows(rows, side=side)).logits
        lengths = [len(row) for row in hand]
        assert out.shape[1] == max(lengths)
        own = [row[:n] if side == "right" else row[-n:] for row, n in zip(out, lengths, strict=True)]
        assert distance(own, [row.detach() for row in hand]) < EXACT
    found = patched.train()(**kind.rows(rows, labels=True)).loss
    found.backward()
    assert distance(found.detach(), loss.detach()) < EXACT
    assert distance({n: p.grad for n, p in patched.named_parameters() if p.grad is not None}, grads) < EXACT
    prompt = kind.rows(rows, side="left")
    generated = patched.eval().generate(**prompt, **GREEDY)
    assert torch.equal(generated[:, :-4], prompt["input_ids"])
    assert torch.equal(generated[:, -4:], said)


FRAMES = {  # of other methods, options, and what says no
    "pixel_shuffle": ({}, "wider"),
    "pool": ({}, None),
    "bipartite_merge": ({}, None),
    "dominant_contextual": ({"scorer": "received", "layer": -1}, None),
    "greedy_diverse": ({}, None),
    "pivot_dedup": ({"pivots": "norm", "states": "features"}, None),
    "conv_reduce": ({"design": "c_abstractor", "width": 48}, None),
    "attend": ({"design": "mqt", "width": 48}, None),
}


@pytest.mark.parametrize("method", FRAMES)
def test_other_methods_take_frames_for_one_grid(method):
    kind, row = QWEN, ([1, START], 4, [30, 31, 32, 33])
    options, why = FRAMES[method]
    torch.manual_seed(0)
    compressor = make(method, 0.25, **options)
    model = kind.build()
    if why is not None:
        with pytest.raises(ValueError, match=why):
            patch(model, compress=compressor)
        return
    with torch.no_grad():
        patched = kind.build()
        patch(patched, compress=compressor)
        out = patched(**kind.rows((row,))).logits[0]
        if compressor.layer is None:
            images = {4: image_tokens(model, kind, compressor, [4])[0]}
            assert distance(out, logits(model, kind, images, row)) < EXACT
        assert len(out) == 2 + 4 + 4


@pytest.mark.parametrize("name", ["topk", "evs"])
def test_all_tokens_kept_are_the_bits_without_compression(kind, name):
    found = []
    for given in (None, made(kind, name, 1.0)):
        model = kind.build().train()
        patch(model, compress=given)
        loss = model(**kind.rows(MIXED, labels=True)).loss
        loss.backward()
        with torch.no_grad():
            said = model.eval().generate(**kind.rows(MIXED, side="left"), max_new_tokens=3, do_sample=False)
            out = [loss.detach(), model(**kind.rows(MIXED)).logits, said]
        found.append(out + [p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_beams_and_turns_bring_their_videos_along(kind):
    compressor = made(kind, "evs")
    model, images = by_hand(kind, compressor)
    patched = kind.build()
    patch(patched, compress=compressor)
    with torch.no_grad():
        first = torch.tensor([answer(model, kind, images, row, 4) for row in MIXED])
        so_far = [(*row, list(words)) for row, words in zip(MIXED, first.tolist(), strict=True)]
        turn = (([50, START], 4, [51, 52]), ([53, START], 3, [54, 55]), ([56, START], 1, [57, 58]))
        second = [answer(model, kind, images, (*row, *more), 4) for row, more in zip(so_far, turn, strict=True)]
    before, cache = kind.rows(MIXED, side="left"), DynamicCache()
    sure = {**GREEDY, "num_return_sequences": 3, "do_sample": True, "top_k": 1}
    assert torch.equal(patched.generate(**before, **sure)[:, -4:], first.repeat_interleave(3, 0))
    said = patched.generate(**before, past_key_values=cache, **GREEDY)
    again = patched.generate(**follow(kind, before, said, turn), past_key_values=cache, **GREEDY)
    assert torch.equal(again[:, -4:], torch.tensor(second))


def test_what_cannot_be_right_is_refused_by_name():
    film = next(kind for kind in VIDEO_KINDS if kind.name == "llava_onevision")
    renumber = {"position": "renumber"}
    for compress, why in (
        (make("topk", 4, scorer="received", layer=-1, **renumber), "pooled from parts of patches"),
        (make("attend", 4, design="mqt", width=32, **renumber), "weights are for tokens in front of the projector"),
        (Placement(merge=8), "pooled as grids"),
    ):
        model = film.build()
        patch(model, compress=compress)
        with pytest.raises(ValueError, match=why):
            model(**film.rows(FILMS))
        model(**film.rows((MIXED[2][:2],)))  # an image alone is what it is for
    model = QWEN.build()
    patch(model, compress=make("topk", [5, 6], scorer="norm"))
    model(**QWEN.rows(FILMS[1:] * 2))
    with pytest.raises(ValueError, match="images and videos: give one"):
        model(**QWEN.rows(MIXED))
    patch(model, compress="EVS:0.2")
    with pytest.raises(ValueError, match=r"keep 5 of video 0 must lie in 9\.\.27: 1 of its 3 frames"):
        model(**QWEN.rows(FILMS))


@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_text_goes_on_behind_a_time_whose_frames_are_gone(seconds):
    """What is decoded in a loop stands where it stands without compression: behind the last frame's time."""
    row = ([1, START], 3, [30, 31])
    found = []
    for compress in (None, make("topk", 1, scorer="norm")):
        model = QWEN.build()
        patch(model, compress=compress)
        seen = []
        model.model.language_model.rotary_emb.register_forward_hook(
            lambda m, args, out, seen=seen: seen.append(args[1])
        )
        batch = {**QWEN.rows((row,)), "second_per_grid_ts": torch.tensor([seconds])}
        with torch.no_grad():
            cache = model(**batch, use_cache=True).past_key_values
            model(input_ids=torch.tensor([[40]]), past_key_values=cache)
        found.append(seen[-1].flatten().tolist())
    assert found[0] == found[1] == [max(2 + 3 + 2, 2 + 2 * int(seconds) + 1)] * 3
