"""patch(compress=…) where somebody else copies, wraps, replaces or derives from parts of the model."""

from __future__ import annotations

import copy
import pickle
import threading
from types import MethodType

import pytest
import torch
import transformers as hf
from hf_checks import distance, gradients
from tiny_hf_compress import KINDS, ROWS
from torch.nn.functional import cross_entropy

from fastmllm.compression import Placement
from fastmllm.hf import patch
from fastmllm.hf.compress.seams import KEY

BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA, QWEN = BY_NAME["llava"], BY_NAME["qwen2_5_vl"]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


class Plain(hf.LlavaForConditionalGeneration):
    pass


class Own(hf.LlavaForConditionalGeneration):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def patched(kind, compress=None):
    model = kind.build()
    patch(model, compress=compress or f"divprune:{kind.keep}")
    return model


def headless(self, *args, labels=None, **kwargs):
    """Score hidden states of the model without head, as TRL and Liger do."""
    hidden = self.base_model(*args, **kwargs)[0][:, :-1]
    return {"loss": cross_entropy(self.lm_head(hidden).flatten(0, 1), labels[:, 1:].flatten())}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS, ids=repr)
def test_a_forward_that_replaces_the_heads_scores_the_same_labels(kind, when):
    batch = kind.rows(labels=True)
    if kind.name == "paligemma":  # its prefix sees all of itself: in training it is told which
        batch["token_type_ids"] = (batch["labels"] != -100).long()
    expected = gradients(patched(kind).train(), batch)
    model = kind.build() if when == "before" else patched(kind)
    model.forward = MethodType(headless, model)
    if when == "before":
        patch(model, compress=f"divprune:{kind.keep}")
    model.train()
    model(**batch)["loss"].backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    assert distance(found, expected) < 1e-6
    assert model.base_model(**{**batch, "labels": None}, return_dict=False)[0].shape[1] == batch["input_ids"].shape[1]


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.mrope], ids=repr)
def test_a_connector_that_is_copied_to_be_trained_stays_a_part(kind):
    peft = pytest.importorskip("peft")
    model, batch = patched(kind), kind.rows(labels=True)
    expected = model(**batch).loss
    connector = "multi_modal_projector" if hasattr(model.model, "multi_modal_projector") else "connector"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=[connector])
    wrapped = peft.get_peft_model(model, config)
    loss = wrapped(**batch).loss
    assert distance([loss.detach()], [expected.detach()]) < 1e-9
    loss.backward()
    trained = [p.grad for n, p in wrapped.named_parameters() if "modules_to_save" in n]
    assert trained
    assert all(grad is not None for grad in trained)


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_layer_that_is_read_is_read_as_lora_leaves_it(when):
    peft = pytest.importorskip("peft")
    model, batch = LLAVA.build(), LLAVA.rows(labels=True)
    if when == "after":
        patch(model, compress="visionzip:8")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).double()
    if when == "before":
        patch(wrapped, compress="visionzip:8")
    adapted = wrapped(**batch).loss.detach()
    merged = wrapped.merge_and_unload()
    anew = copy.deepcopy(merged)
    patch(anew, compress="visionzip:8")
    expected = anew(**batch).loss.detach()
    assert distance([merged(**batch).loss.detach()], [expected]) < 1e-9
    assert distance([adapted], [expected]) < 1e-6


def test_copies_of_a_model_have_their_own_state():
    model, batch = patched(LLAVA, "visionzip:8"), LLAVA.rows()
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # a call leaves hooks that cannot be pickled
    expected = model(**batch).logits
    for copied in copies:
        assert torch.equal(copied(**batch).logits, expected)
        state = copied.model.__dict__[KEY]
        assert state is copied.model.multi_modal_projector.__dict__[KEY]
        assert state is not model.model.__dict__[KEY]
        assert (state.owner, state.head) == (copied.model, copied)
        assert state.tower.attention in set(copied.modules())
    alone = copy.deepcopy(model.model)
    assert alone.__dict__[KEY].head is None
    assert torch.equal(alone(**batch)[0], model.model(**batch)[0])


def test_a_subclass_is_its_base_unless_it_computes_by_itself():
    model, batch = patched(LLAVA), LLAVA.rows(labels=True)
    said, loss = model.generate(**LLAVA.rows(side="left"), **GREEDY), model(**batch).loss
    derived = LLAVA.build()
    derived.__class__ = Plain
    patch(derived, compress="divprune:4")
    assert torch.equal(derived(**batch).loss, loss)
    assert torch.equal(derived.generate(**LLAVA.rows(side="left"), **GREEDY), said)
    own = LLAVA.build()
    own.__class__ = Own
    with pytest.raises(ValueError, match="Own: it has a forward of its own"):
        patch(own, compress="divprune:4")


def test_another_thread_sees_nothing_of_a_call():
    model, batch, found = patched(LLAVA), LLAVA.rows(), []
    expected = model(**batch).logits

    def between(*_):  # in the middle of a call
        handle.remove()
        thread = threading.Thread(target=lambda: found.append(model(**LLAVA.rows((ROWS[2],))).logits))
        thread.start()
        thread.join()

    handle = model.model.language_model.register_forward_pre_hook(between)
    assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(found[0], model(**LLAVA.rows((ROWS[2],))).logits)


def test_an_assistant_that_is_compressed_is_refused():
    model, other, batch = patched(LLAVA), LLAVA.build(), LLAVA.rows((ROWS[2],))
    said = model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=other), said)
    patch(other, compress="divprune:4")
    with pytest.raises(ValueError, match="assistant_model is compressed too"):
        model.generate(**batch, **GREEDY, assistant_model=other)


def test_a_placement_that_compresses_nowhere_is_refused():
    with pytest.raises(ValueError, match="compresses nowhere"):
        patch(LLAVA.build(), compress=Placement())
