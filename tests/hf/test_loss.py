"""Head and loss in one: what transformers' loss takes, and what a caller sees."""

from __future__ import annotations

import pytest
import torch
from tiny_hf_llava import llava, llava_batch
from tiny_hf_qwen import FAMILIES as QWEN

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused.loss import HeadLoss


@pytest.fixture(scope="module")
def model():
    return llava()


@pytest.mark.parametrize(
    "more",
    [{}, {"num_items_in_batch": 5}, {"num_items_in_batch": torch.tensor(7)}, {"ignore_index": 27}, {"shifted": True}],
    ids=str,
)
def test_equals_transformers_loss(model, more):
    batch = llava_batch()
    if more.pop("shifted", None):
        more = {"shift_labels": batch["labels"].roll(-1, 1)}
        more["shift_labels"][:, -1] = -100
    if "ignore_index" in more:
        batch["labels"] = batch["labels"].masked_fill(batch["labels"] == -100, 27)
    model.train()
    expected = model(**batch, **more).loss
    patch(model, ops=["linear_cross_entropy"])
    found = model(**batch, **more)
    unpatch(model)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits is None


def test_evaluation_and_tuples_keep_their_places(model):
    batch = llava_batch()
    patch(model, ops=["linear_cross_entropy"])
    assert model.eval()(**batch).logits is not None
    training = model.train()(**batch, return_dict=False)
    named = model(**batch)
    unpatch(model)
    assert len(training) == len(named.to_tuple())
    assert torch.equal(training[0], named.loss)


def test_what_the_operator_cannot_do_runs_transformers(model):
    batch = llava_batch()
    report = patch(model.train(), ops=["linear_cross_entropy"])
    assert model(**batch, logits_to_keep=batch["labels"].shape[1]).logits is not None
    model.loss_function = lambda logits, **_: logits.sum()
    assert model(**batch).logits is not None
    del model._loss_function
    assert list(report.fallbacks()[""].values()) == [1, 1]
    unpatch(model)


def test_a_capped_or_biased_head_is_left(model):
    assert HeadLoss.refuses(model) is None
    model.config.text_config.final_logit_softcapping = 30.0
    assert "capped" in HeadLoss.refuses(model)
    del model.config.text_config.final_logit_softcapping


@pytest.mark.parametrize("family", QWEN, ids=repr)
def test_positions_of_qwen_are_those_of_transformers(family):
    """Rope deltas are kept on the model for later turns, and returned by transformers before 5.20."""
    model, batch = family.build().train(), family.batch()
    expected = model(**batch)
    deltas, model.model.rope_deltas = model.model.rope_deltas, None
    patch(model, ops=["linear_cross_entropy", "insert_features"])
    found = model(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(model.model.rope_deltas, deltas)
    assert set(found) == set(expected) - {"logits"}
