"""patch(compress=…): what else comes with a call, and what a model is wrapped in."""

from __future__ import annotations

import pytest
import torch
from hf_checks import distance, gradients
from tiny_hf import PAD
from tiny_hf_compress import KINDS, ROWS, START
from transformers import DynamicCache, GenerationConfig, StaticCache

from fastmllm.compression import make
from fastmllm.hf import patch

BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA, QWEN = BY_NAME["llava"], BY_NAME["qwen2_5_vl"]
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=["llava", "gemma3", "qwen2_5_vl"])
def kind(request):
    return BY_NAME[request.param]


def compressor(kind):
    return make("topk", kind.keep, scorer="norm", position="keep" if kind.mrope else "renumber")


def patched(kind):
    model = kind.build()
    patch(model, compress=compressor(kind))
    return model


def test_the_model_without_head_is_compressed_too(kind):
    model = patched(kind)
    with torch.no_grad():
        hidden = model(**kind.rows(), output_hidden_states=True).hidden_states[-1]
        inner = model.model(**kind.rows()).last_hidden_state
        bare = kind.build().model
        patch(bare, compress=compressor(kind))
        assert torch.equal(bare(**kind.rows()).last_hidden_state, inner)
    assert torch.equal(inner, hidden)


def test_arguments_by_place_are_arguments_by_name():
    batch = LLAVA.rows()
    model = patched(LLAVA)
    with torch.no_grad():
        by_name = model(**batch).logits
        assert torch.equal(model(batch["input_ids"], batch["pixel_values"], batch["attention_mask"]).logits, by_name)
        assert torch.equal(model(**batch, return_dict=False)[0], by_name)


def test_dictionaries_and_inputs_by_place_come_back_with_the_prompt(kind):
    model, batch = patched(kind), kind.rows(side="left")
    said = model.generate(**batch, **GREEDY)
    out = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences, said)
    assert len(out.scores) == 4
    ids = batch.pop("input_ids")
    assert torch.equal(model.generate(ids, **batch, **GREEDY), said)
    assert torch.equal(model.generate(ids, **batch, **GREEDY, use_cache=False), said)


def test_padding_is_recognised_without_a_mask(kind):
    model, batch = patched(kind), kind.rows(side="left")
    said = model.generate(**batch, **GREEDY)
    del batch["attention_mask"]
    assert torch.equal(model.generate(**batch, **GREEDY, pad_token_id=PAD), said)


def test_a_limit_counts_the_prompt_as_it_was_given(kind):
    model, batch = patched(kind), kind.rows(side="left")
    length = batch["input_ids"].shape[1] + 3
    said = model.generate(**batch, max_length=length, min_length=length, do_sample=False)
    assert said.shape[1] == length
    given = GenerationConfig(max_length=length, min_length=length, do_sample=False)
    ids = batch["input_ids"]
    more = {name: value for name, value in batch.items() if name != "input_ids"}
    assert torch.equal(model.generate(ids, given, **more), said)
    config = model.generation_config
    config.max_length, config.min_length = length, length
    assert torch.equal(model.generate(**batch, do_sample=False), said)


def test_a_static_cache_holds_what_is_left():
    model, batch = patched(LLAVA), LLAVA.rows(side="left")
    said = model.generate(**batch, **GREEDY)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=24)
    assert torch.equal(model.generate(**batch, past_key_values=cache, **GREEDY, disable_compile=True), said)


def test_a_question_without_images_is_asked_in_the_models_own_way(kind):
    text = kind.rows((ROWS[1],))
    model = kind.build()
    said, out = model.generate(**text, **GREEDY), model(**text).logits
    patch(model, compress=compressor(kind))
    assert torch.equal(model.generate(**text, **GREEDY), said)
    assert distance(model(**text).logits.detach(), out.detach()) < 1e-6


def test_positions_that_are_given_close_up():
    """Of a packed row, too, whose positions start anew; padding keeps nobody from counting."""
    batch = LLAVA.rows(side="left")
    model = patched(LLAVA)
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda m, a, kw: seen.append(kw["position_ids"]), with_kwargs=True
    )
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    model(**batch, position_ids=positions)
    assert [row.tolist()[-5:] for row in seen[0]] == [list(range(13, 18)), list(range(5)), list(range(6, 11))]
    row = LLAVA.rows((([1, 20, START], 0, [21, 1, START], 1, [22]),))
    packed = torch.cat([torch.arange(20), torch.arange(19)])[None]
    model(input_ids=row["input_ids"], pixel_values=row["pixel_values"], position_ids=packed)
    assert seen[1][0].tolist() == [*range(8), *range(7)]


def test_positions_of_qwen_that_are_given_are_those_that_are_computed():
    batch = QWEN.rows()
    plain = QWEN.build()
    positions, _ = plain.model.get_rope_index(**{k: v for k, v in batch.items() if k != "pixel_values"})
    model = patched(QWEN)
    with torch.no_grad():
        expected = model(**batch).logits
        text = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        for given in (positions, torch.cat([text[None], positions])):
            assert torch.equal(model(**batch, position_ids=given).logits, expected)


def test_shifted_labels_score_what_labels_do(kind):
    model, batch = patched(kind), kind.rows(labels=True)
    labels = batch.pop("labels")
    labels[0, 3 + kind.places[0]] = 22  # the text right behind an image: its last row predicts it
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    found = [model(**batch, labels=labels, **more).loss for more in ({}, {"shift_labels": shifted})]
    assert torch.equal(*found)
    assert int((shifted != -100).sum()) == 13


def test_a_step_with_many_rows_is_the_sum_of_its_rows(kind):
    """The labels that are scored stay as many, however the rows are padded."""
    model = patched(kind).train()
    together = gradients(model, {**kind.rows(labels=True), "num_items_in_batch": torch.tensor(12)})
    alone = [gradients(model, {**kind.rows((r,), labels=True), "num_items_in_batch": torch.tensor(12)}) for r in ROWS]
    for name, grad in together.items():
        total = sum(a[name] for a in alone if name in a)
        assert float((grad - total).abs().max()) < 1e-6, name


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(kind, reentrant):
    model, batch = patched(kind), kind.rows(labels=True)
    before = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert distance(gradients(model, batch), before) < 1e-9


def test_a_compiled_model_computes_the_same(request):
    request.addfinalizer(torch._dynamo.reset)  # frames of transformers count what all tests compile
    model, batch = patched(LLAVA), LLAVA.rows()
    with torch.no_grad():
        before = model(**batch).logits
        assert distance(torch.compile(model, backend="eager")(**batch).logits, before) < 1e-9


def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    batch, found = LLAVA.rows(labels=True), []
    for when in ("before", "after"):
        model = LLAVA.build()
        if when == "after":
            patch(model, compress="visionzip:4")
        torch.manual_seed(0)
        targets = r".*language_model.*(q|v)_proj|.*linear_[12]"
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
        model = model.double()
        if when == "before":
            patch(model, compress="visionzip:4")
        found.append((gradients(model, batch), model.generate(**LLAVA.rows(side="left"), **GREEDY)))
    assert found[0][0].keys() == found[1][0].keys()
    assert distance(found[0][0], found[1][0]) < 1e-6
    assert torch.equal(found[0][1], found[1][1])


def test_what_brings_tokens_in_past_the_compressor_is_refused():
    model, batch = patched(LLAVA), LLAVA.rows()
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    refused = [
        ({**batch, "pixel_values_videos": torch.zeros(1)}, "videos"),
        ({**batch, "mm_encoder_outputs": {"image": 1}}, "there already"),
        ({"inputs_embeds": embeds, "pixel_values": batch["pixel_values"]}, "not among inputs_embeds"),
        ({**batch, "attention_mask": torch.ones(3, 1, 4, 4)}, "must be"),
        ({**batch, "cu_seq_lens_q": torch.zeros(2)}, "boundaries"),
        ({**batch, "logits_to_keep": torch.tensor([3])}, "give a number"),
        ({**batch, "pixel_values": batch["pixel_values"][:2]}, "do not match"),
        ({**batch, "input_ids": ids.view(-1, 14), "attention_mask": None}, "two rows"),
    ]
    for call, why in refused:
        with pytest.raises(ValueError, match=why):
            model(**call)
    said = model.generate(inputs_embeds=embeds[:, :4], **GREEDY)  # text alone goes its own way
    assert said.shape == (3, 4)
    assert model(**batch).logits.shape[1] == 18  # and a call that failed leaves nothing behind


def test_positions_behind_a_shortened_cache_are_refused():
    model, batch = patched(LLAVA), LLAVA.rows(side="left")
    cache = DynamicCache()
    model(**batch, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="leave them out"):
        model(input_ids=torch.full((3, 1), 30), past_key_values=cache, position_ids=torch.full((3, 1), 42))
    one = LLAVA.rows((ROWS[0],))
    with pytest.raises(ValueError, match="the cache is of 3 rows"):
        model(**one, past_key_values=cache)
