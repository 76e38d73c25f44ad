"""patch(compress=…) in every family: as if the text had been written for the tokens that are left."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hf_by_hand import answer, image_tokens, logits
from hf_checks import allowed, cast, distance, in_dtype
from tiny_hf_compress import KINDS, ROWS

from fastmllm.compression import make
from fastmllm.hf import patch, unpatch
from fastmllm.hf.compress.seams import SEAMS
from fastmllm.hf.rules import OPS

EXACT = 1e-5  # fp64, of which transformers computes norms, rotations and softmax in fp32


@pytest.fixture(params=KINDS, ids=repr)
def kind(request):
    return request.param


def compressor(kind, method="topk", keep=None):
    options = {"topk": {"scorer": "norm"}, "pool": {}, "bipartite_merge": {}}[method]
    return make(method, keep or kind.keep, position="keep" if kind.mrope else "renumber", **options)


@cache
def expected(kind, method="topk"):
    """Return logits of each row, the loss of all, its gradients, and four tokens that each row is answered with."""
    model = kind.build()
    images = image_tokens(model, kind, compressor(kind, method))
    rows = [logits(model, kind, images, row) for row in ROWS]
    # a prefix of PaliGemma sees all of itself, so its batch has no suffix here, and labels are prompt
    targets = torch.tensor([token for row in ROWS for token in row[-1][-4:]])
    loss = torch.nn.functional.cross_entropy(torch.cat([row[-5:-1] for row in rows]), targets)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        images = image_tokens(model, kind, compressor(kind, method))
        said = torch.tensor([answer(model, kind, images, row, 4) for row in ROWS])
    return [row.detach() for row in rows], loss.detach(), grads, said


def valid(kind, out, side):
    """Return the logits of each row's own tokens."""
    lengths = [len(row) for row in expected(kind)[0]]
    assert out.shape[1] == max(lengths)
    return [row[:n] if side == "right" else row[-n:] for row, n in zip(out, lengths, strict=True)]


def test_every_known_family_is_here():
    assert {kind.name for kind in KINDS} == set(SEAMS)


@pytest.mark.parametrize("side", ["right", "left"])
def test_logits_are_those_by_hand(kind, side):
    model = kind.build()
    patch(model, compress=compressor(kind))
    with torch.no_grad():
        out = model(**kind.rows(side=side)).logits
    assert distance(valid(kind, out, side), expected(kind)[0]) < EXACT


def test_loss_and_gradients_are_those_by_hand(kind):
    model = kind.build().train()
    patch(model, compress=compressor(kind))
    out = model(**kind.rows(labels=True))
    out.loss.backward()
    _, loss, grads, _ = expected(kind)
    assert distance(out.loss.detach(), loss) < EXACT
    assert distance({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads) < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beside_all_operators_in_the_dtypes_of_training(kind, dtype):
    model, batch = in_dtype(kind.build(), dtype), cast(kind.rows(), dtype)
    with torch.no_grad():
        alone = model(**batch).logits  # how far this dtype is off
        truth = kind.build()(**kind.rows()).logits
        report = patch(model, ops=OPS, compress=spread(kind))
        out = model(**batch).logits
        exact = kind.build()
        patch(exact, compress=spread(kind))
        expected = exact(**kind.rows()).logits
    assert not report.fallbacks()
    assert distance(out, expected) <= allowed(distance(alone, truth), dtype)


def spread(kind):
    """Return what keeps the same tokens in every dtype."""
    return make("topk", kind.keep, scorer="grid", position="keep" if kind.mrope else "renumber")


def test_generates_what_a_loop_without_cache_does(kind):
    model = kind.build()
    patch(model, compress=compressor(kind))
    lengths = []
    layer = next(m for n, m in model.named_modules() if n.endswith("layers.0") and ("language" in n or "text" in n))
    layer.register_forward_pre_hook(lambda module, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    prompt = kind.rows(side="left")
    said = model.generate(**prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert torch.equal(said[:, :-4], prompt["input_ids"])
    assert torch.equal(said[:, -4:], expected(kind)[3])
    assert lengths == [max(map(len, expected(kind)[0])), 1, 1, 1]  # the decoder never sees what was dropped


def test_a_row_is_the_same_alone(kind):
    model = kind.build()
    patch(model, compress=compressor(kind))
    for row, said in zip(ROWS, expected(kind)[3], strict=True):
        alone = model.generate(**kind.rows((row,)), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert torch.equal(alone[0, -4:], said)


def test_beams_bring_their_images_along(kind):
    model = kind.build()
    patch(model, compress=compressor(kind))
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    together = model.generate(**kind.rows(side="left"), **how)
    assert len(together) == 2 * len(ROWS)
    sure = {"num_return_sequences": 3, "do_sample": True, "top_k": 1, "max_new_tokens": 4, "min_new_tokens": 4}
    repeated = model.generate(**kind.rows(side="left"), **sure)
    assert torch.equal(repeated[:, -4:], expected(kind)[3].repeat_interleave(3, 0))
    for i, row in enumerate(ROWS):
        alone = model.generate(**kind.rows((row,)), **how)
        assert torch.equal(alone[:, -3:], together[2 * i : 2 * i + 2, -3:])


def test_all_tokens_kept_are_the_bits_without_compression(kind):
    batch = kind.rows(labels=True)
    found = []
    for keep in (None, 1.0):
        model = kind.build().train()
        patch(model, compress=None if keep is None else compressor(kind, keep=keep))
        loss = model(**batch).loss
        loss.backward()
        model.eval()
        with torch.no_grad():
            said = model.generate(**kind.rows(side="left"), max_new_tokens=3, do_sample=False)
            out = [loss.detach(), model(**batch).logits, said]
        found.append(out + [p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_unpatching_gives_back_the_bits(kind):
    model, batch = kind.build(), kind.rows()
    with torch.no_grad():
        before = model(**batch).logits
        keys, attributes = list(model.state_dict()), [set(m.__dict__) for m in model.modules()]
        patch(model, compress=compressor(kind))
        assert list(model.state_dict()) == keys
        model(**batch)
        unpatch(model)
        assert [set(m.__dict__) for m in model.modules()] == attributes
        assert torch.equal(model(**batch).logits, before)
