"""Head and loss in one: what transformers' loss takes, and what a caller sees."""

from __future__ import annotations

import threading
from functools import wraps

import pytest
import torch
from tiny_hf import BOS
from tiny_hf_llava import gemma3, gemma3_batch, llava, llava_batch, paligemma, paligemma_batch
from tiny_hf_qwen import FAMILIES as QWEN
from transformers.loss.loss_utils import ForCausalLMLoss

from fastmllm.hf import patch, unpatch
from fastmllm.hf.fused import loss as fused_loss
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
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out / 8)
    soft = model(**batch)
    hook.remove()
    model.loss_type, before = "ForMaskedLM", model.loss_type
    masked = model(**batch)
    unpatch(model)
    torch.testing.assert_close(masked.loss, model(**batch).loss)
    model.loss_type = before
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out / 8)
    torch.testing.assert_close(soft.loss, model(**batch).loss)
    hook.remove()
    assert len(report.fallbacks()) == 0  # unpatched: gone with the rest


def test_a_wrapped_loss_is_used_and_kept(model):
    @wraps(ForCausalLMLoss)
    def doubled(*args, **kwargs):
        return 2 * ForCausalLMLoss(*args, **kwargs)

    batch = llava_batch()
    patch(model.train(), ops=["linear_cross_entropy"])
    once = model(**batch).loss
    try:
        model.loss_function = doubled
        torch.testing.assert_close(model(**batch).loss, 2 * once)
        assert model.loss_function is doubled
        model.loss_function = ForCausalLMLoss  # said, not only meant
        assert model(**batch).logits is None
        assert model._loss_function is ForCausalLMLoss
    finally:
        del model._loss_function
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


@pytest.mark.parametrize("build, batch", [(paligemma, paligemma_batch), (gemma3, gemma3_batch)])
def test_masks_and_token_types_do_not_move_the_labels(build, batch):
    model, batch = build().train(), batch()
    batch["labels"][:, 2:4] = BOS  # of tokens that a mask of image blocks is about
    batch["attention_mask"][0, 0] = 0
    expected = model(**batch).loss
    patch(model, ops=["linear_cross_entropy"], strict=True)
    torch.testing.assert_close(model(**batch).loss, expected)


@pytest.mark.parametrize("share, learns, ours", [(0.6, True, True), (0.75, True, False), (1.0, False, True)])
def test_a_cpu_leaves_a_loss_of_many_rows_to_transformers(model, monkeypatch, share, learns, ours):
    batch = llava_batch()
    ids = batch["input_ids"]
    batch["labels"] = torch.where(torch.arange(ids.shape[1]) < share * ids.shape[1], ids, -100)
    expected = model.train()(**batch).loss
    calls = []
    monkeypatch.setattr(
        fused_loss,
        "linear_cross_entropy",
        lambda *a, f=fused_loss.linear_cross_entropy, **k: calls.append(a) or f(*a, **k),
    )
    model.lm_head.weight.requires_grad_(learns)
    report = patch(model, ops=["linear_cross_entropy"])
    found = model(**batch)
    unpatch(model)
    model.lm_head.weight.requires_grad_(True)
    assert len(calls) == ours
    assert found.logits is None
    torch.testing.assert_close(found.loss, expected)
    assert not report.fallbacks()


def test_autocast_has_the_same_loss_and_gradients(model):
    batch, head = llava_batch(), model.lm_head.weight
    model.train()

    def step():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        return loss, torch.autograd.grad(loss, head)[0]

    expected = step()
    patch(model, ops=["linear_cross_entropy"])
    found = step()
    unpatch(model)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, atol=0.02 * theirs.detach().abs().max().item(), rtol=0)


@pytest.mark.parametrize("dtype, ours", [(torch.float32, True), (torch.bfloat16, False)], ids=str)
def test_in_half_precision_parts_of_the_rows_count(monkeypatch, dtype, ours):
    head = torch.nn.Linear(8, 64, dtype=dtype)
    labels = torch.arange(100).masked_fill(torch.arange(100) < 60, -100)
    assert fused_loss._worth_it(head, labels, -100)
    monkeypatch.setattr(fused_loss, "CHUNK", 20 * 64)
    assert fused_loss._worth_it(head, labels, -100) == ours


def test_two_threads_train_one_model(model):
    """Both meet between the model's call and its head's."""
    batches = [llava_batch() for _ in range(2)]
    batches[1]["labels"] = batches[1]["input_ids"].roll(3, 1)
    batches[1]["labels"][:, :-7] = -100
    parameters = list(model.train().parameters())

    def step(batch):
        out = model(**batch)
        return out, torch.autograd.grad(out.loss, parameters, allow_unused=True)

    report = patch(model, ops=["linear_cross_entropy"])
    expected = [step(batch) for batch in batches]
    assert not torch.equal(expected[0][0].loss, expected[1][0].loss)
    meeting, found = threading.Barrier(2, timeout=30), [None, None]

    def meet(module, args, out):
        meeting.wait()

    hook = model.model.register_forward_hook(meet)

    def work(i):
        found[i] = step(batches[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hook.remove()
    assert not report.fallbacks()
    unpatch(model)
    for ours, alone in zip(found, expected, strict=True):
        assert ours is not None, "its thread raised"
        assert ours[0].logits is None
        torch.testing.assert_close(ours[0].loss, alone[0].loss, rtol=0, atol=0)
        for a, b in zip(ours[1], alone[1], strict=True):
            assert a is b is None or torch.equal(a, b)
    assert model.loss_function is ForCausalLMLoss
