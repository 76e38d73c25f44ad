"""patch(compress=…) inside of the language model: as a loop over the layers of the unpatched model computes it."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_checks import distance
from stages_by_hand import answer, logits
from tiny_hf import LLAMA
from tiny_hf_compress import KINDS, QTEXT, ROWS

from fastmllm.compression import Placement, make
from fastmllm.hf import patch
from fastmllm.models.mllm import MLLM
from tests.support.tiny_mllm import oracle

EXACT = 1e-5  # fp64, of which transformers computes norms, rotations and softmax in fp32
GREEDY = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
TAKE = [kind for kind in KINDS if kind.name != "gemma3"]
SOME = [k for k in TAKE if k.name in ("llava", "paligemma", "qwen3_vl")]  # what differs in kind
DEPTH = 4


@pytest.fixture(autouse=True)
def deeper(monkeypatch):
    for config in (LLAMA, QTEXT):
        monkeypatch.setitem(config, "num_hidden_layers", DEPTH)


def stages(kind, scorer="last_row"):
    scorer = "norm" if kind.name == "paligemma" else scorer
    return tuple((layer, make("topk", keep, scorer=scorer)) for layer, keep in ((1, 0.5), (3, 0.25)))


def patched(kind, *args):
    model = kind.build()
    patch(model, compress=Placement(stages=stages(kind, *args)))
    return model


@pytest.mark.parametrize(("kind", "scorer"), [*((kind, "last_row") for kind in TAKE), (SOME[0], "text_rows")], ids=repr)
def test_logits_are_those_by_hand(kind, scorer):
    model = kind.build()
    with torch.no_grad():
        rows = [logits(model, kind, row, stages(kind, scorer)) for row in ROWS]
        patch(model, compress=Placement(stages=stages(kind, scorer)))
        for side in ("right", "left"):
            out = model(**kind.rows(side=side)).logits
            assert out.shape[1] == max(map(len, rows))
            own = [o[: len(e)] if side == "right" else o[-len(e) :] for o, e in zip(out, rows, strict=True)]
            assert distance(own, rows) < EXACT


@pytest.mark.parametrize("kind", SOME, ids=repr)
def test_loss_and_gradients_are_those_by_hand(kind):
    model = kind.build()
    answered = 0 if kind.name == "paligemma" else 4  # its batch has no suffix
    rows = [logits(model, kind, row, stages(kind), answer=answered) for row in ROWS]
    targets = torch.tensor([token for row in ROWS for token in row[-1][-4:]])
    loss = torch.nn.functional.cross_entropy(torch.cat([row[-5:-1] for row in rows]), targets)
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model = patched(kind).train()
    out = model(**kind.rows(labels=True))
    out.loss.backward()
    assert distance(out.loss.detach(), loss.detach()) < EXACT
    assert distance({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, grads) < EXACT


@pytest.mark.parametrize("kind", SOME, ids=repr)
def test_answers_are_those_by_hand(kind):
    """Without a cache, too: the question is judged by where it ended, not by what was said since."""
    model, batch = kind.build(), kind.rows(side="left")
    with torch.no_grad():
        said = torch.tensor([answer(model, kind, row, stages(kind), 2) for row in ROWS])
    patch(model, compress=Placement(stages=stages(kind)))
    for cached in (True, False):
        out = model.generate(**batch, use_cache=cached, **GREEDY)
        assert torch.equal(out[:, :-2], batch["input_ids"])
        assert torch.equal(out[:, -2:], said)


@pytest.mark.parametrize("kind", SOME, ids=repr)
def test_all_of_n_is_the_model_without(kind):
    model = kind.build()
    batch, prompt = kind.rows(labels=True), kind.rows(side="left")
    patch(model)
    with torch.no_grad():
        before, said = model(**batch), model.generate(**prompt, **GREEDY)
        patch(model, compress=Placement(stages=((1, make("topk", 1.0, scorer="norm")),)))
        now = model(**batch)
        assert torch.equal(now.logits, before.logits)
        assert torch.equal(now.loss, before.loss)
        assert torch.equal(model.generate(**prompt, **GREEDY), said)
        patch(model)
        assert torch.equal(model(**batch).logits, before.logits)


@pytest.mark.parametrize("name", ["llava", "qwen3_vl"])
def test_our_own_model_of_the_same_weights_agrees(name, tmp_path):
    model, batch = oracle(name)
    model.save_pretrained(tmp_path)
    ours, model = MLLM.from_pretrained(tmp_path), copy.deepcopy(model)
    ours.placement = Placement(stages=((1, make("topk", 0.5, scorer="last_row")),))
    patch(model, compress=ours.placement)
    with torch.no_grad():
        inputs = ours.inputs(batch)
        lengths = ours.start(inputs)[1].cu_seqlens.diff().tolist()
        out = model(**batch).logits
        assert distance(torch.cat([row[:n] for row, n in zip(out, lengths, strict=True)]), ours.logits(inputs)) < EXACT
