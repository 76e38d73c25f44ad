"""patch(compress=…) inside of the language model: what else comes with a call, over turns, and what is refused."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import transformers as hf
from hf_checks import distance, gradients
from stages_by_hand import answer, logits
from tiny_hf import LLAMA
from tiny_hf_compress import KINDS, NEXT, QTEXT, ROWS, follow
from transformers import DynamicCache, StaticCache

from fastmllm.compression import Placement, TopK, make
from fastmllm.hf import patch, unpatch
from fastmllm.hf.compress.cached import RECORD

EXACT = 1e-5
BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA, QWEN = BY_NAME["llava"], BY_NAME["qwen3_vl"]
GREEDY = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}


@pytest.fixture(autouse=True)
def deeper(monkeypatch):
    for config in (LLAMA, QTEXT):
        monkeypatch.setitem(config, "num_hidden_layers", 3)


def stage(layer=2, method="topk", keep=0.25, **options):
    return Placement(stages=((layer, make(method, keep, **(options or {"scorer": "last_row"}))),))


def patched(kind, placement=None):
    model = kind.build()
    patch(model, compress=placement or stage())
    return model


def asked(row, new=()):
    """Return the row that judges each image of two turns."""
    lengths = [sum(LLAVA.places[p] if isinstance(p, int) else len(p) for p in part) for part in (row, new)]
    images = [sum(isinstance(p, int) for p in part) for part in (row, new)]
    return (lengths[0] - 1,) * images[0] + (sum(lengths) - 1,) * images[1]


DART = {"method": "pivot_dedup", "pivots": "norm", "share": 2}


@pytest.mark.parametrize("options", [{}, {"scorer": "last_row", "position": "calibrate"}, DART], ids=str)
def test_a_forward_behind_a_cache_brings_a_new_image(options):
    """Each image is judged by the question that came with it; what is left of an earlier one stays left."""
    placement = Placement(stages=stage(1, **options).stages + stage(2, keep=2, **options).stages)
    model = patched(LLAVA, placement)
    before, new = LLAVA.rows(side="left"), LLAVA.rows(NEXT, side="left")
    with torch.no_grad():
        mask = torch.cat([before["attention_mask"], new.pop("attention_mask")], 1)
        # as `generate` counts them: the norms of turned keys (DART) are another at another place
        first, second = (mask.cumsum(1) - 1).clamp(min=0).tensor_split([before["input_ids"].shape[1]], 1)
        cache = model(**before, position_ids=first, use_cache=True).past_key_values
        out = model(**new, attention_mask=mask, position_ids=second, past_key_values=cache).logits
        unpatch(model)
        hand = [logits(model, LLAVA, (*row, *more), placement.stages, asked=asked(row, more))[-6:]
                for row, more in zip(ROWS, NEXT, strict=True)]  # fmt: skip
    assert out.shape[1] == 6
    assert distance(list(out), hand) < EXACT


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_keys_are_judged_where_generate_counts_them(name):
    """Rows padded in front, in a loop without position_ids; DART's norms are of turned keys."""
    kind = BY_NAME[name]
    model, batch = patched(kind, stage(1, **DART)), kind.rows(side="left")
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    first = int(name == "paligemma")  # counts from 1
    positions = (mask.cumsum(1) - 1).clamp(min=0) + first
    found = []
    with torch.no_grad():
        for at in ({}, {"position_ids": positions}):
            out = model(**batch, **{n: p[:, :-1] for n, p in at.items()}, use_cache=True)
            word = model(input_ids=torch.full((3, 1), 40), attention_mask=mask, past_key_values=out.past_key_values,
                         **{n: p[:, -1:] for n, p in at.items()})  # fmt: skip
            found.append(torch.cat([out.logits, word.logits], 1))
        assert torch.equal(*found)
        said = model.generate(**batch, **GREEDY)[:, -2]
        assert torch.equal(found[0][:, -2].argmax(-1), said)


def test_a_second_turn_with_a_new_image():
    model, cache = patched(LLAVA), DynamicCache()
    before = LLAVA.rows(side="left")
    first = model.generate(**before, past_key_values=cache, **GREEDY)
    batch = follow(LLAVA, before, first, NEXT)
    second = model.generate(**batch, past_key_values=cache, **GREEDY)
    assert torch.equal(second[:, :-2], batch["input_ids"])
    unpatch(model)
    with torch.no_grad():
        for row, new, one, two in zip(ROWS, NEXT, first[:, -2:].tolist(), second[:, -2:].tolist(), strict=True):
            judges = asked(row)[:1] * len(asked(row)) + asked((*row, one), new)[-1:]
            assert answer(model, LLAVA, (*row, one, *new), stage().stages, 2, asked=judges) == two


def test_a_second_turn_of_text_goes_on_behind_positions_that_stay():
    """Of M-RoPE; a new image behind a cache is what transformers 5.23 itself cannot place for Qwen."""
    model, cache = patched(QWEN), DynamicCache()
    batch = QWEN.rows((ROWS[2],))
    said = model.generate(**batch, past_key_values=cache, **GREEDY)
    more = follow(QWEN, batch, said, (([60, 61],),))
    second = model.generate(**more, past_key_values=cache, **GREEDY)[0, -2:].tolist()
    unpatch(model)
    row, end = (*ROWS[2], [*said[0, -2:].tolist(), 60, 61]), batch["input_ids"].shape[1] - 1
    with torch.no_grad():
        assert answer(model, QWEN, row, stage().stages, 2, asked=(end,)) == second


def test_a_loop_of_forwards_takes_the_mask_of_the_whole_text():
    model, batch = patched(LLAVA), LLAVA.rows(side="left")
    said = model.generate(**batch, **GREEDY)[:, -2:]
    mask, words = batch["attention_mask"], []
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        for _ in range(2):
            words.append(out.logits[:, -1].argmax(-1, keepdim=True))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(input_ids=words[-1], attention_mask=mask, past_key_values=out.past_key_values)
    assert torch.equal(torch.cat(words, 1), said)


def test_what_was_said_behind_the_images_can_be_taken_back():
    model, batch = patched(LLAVA), LLAVA.rows(side="left")
    more, mask = torch.full((3, 2), 44), torch.nn.functional.pad(batch["attention_mask"], (0, 2), value=1)
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        assert [cache.get_seq_length(n) for n in range(3)] == [42, 42, 18]
        said = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        cache.crop(-2)
        assert torch.equal(model(input_ids=more, attention_mask=mask, past_key_values=cache).logits, said)
        twin = copy.deepcopy(cache)
        cache.crop(-8)
        with pytest.raises(ValueError, match="text behind its last image"):
            model(input_ids=more, attention_mask=mask, past_key_values=cache)
        twin.layers[0].crop(-2)
        with pytest.raises(ValueError, match="take as many off each"):
            model(input_ids=more, attention_mask=mask, past_key_values=twin)
        with pytest.raises(ValueError, match="the cache is of 3 rows, the text of 1"):
            model(input_ids=more[:1], past_key_values=twin)


class Noting(TopK):
    """Notes the grids that it is given."""

    grids = None

    def reduce(self, tokens, evidence, budgets):
        self.grids = tokens.grid
        return super().reduce(tokens, evidence, budgets)


def test_beams_and_sequences():
    """All beams of one row lose what the row loses, and each of its images has its own grid."""
    noting, batch = Noting(0.25, scorer="last_row"), QWEN.rows(side="left")
    model = patched(QWEN, Placement(stages=((2, noting),)))
    many = model.generate(**batch, **GREEDY, num_beams=2, num_return_sequences=2)
    assert len(many) == 6
    square, low, high = (1, 4, 4), (1, 2, 6), (1, 3, 4)
    assert noting.grids == (square, low, square, low, high, high)
    for number in (0, 2):
        alone = model.generate(**QWEN.rows((ROWS[number],)), **GREEDY, num_beams=2, num_return_sequences=2)
        assert torch.equal(many[2 * number :][:2, -2:], alone[:, -2:])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(reentrant):
    model, batch = patched(QWEN), QWEN.rows(labels=True)
    before = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert distance(gradients(model, batch), before) < 1e-9


def test_shifted_labels_score_what_labels_do():
    model, batch = patched(LLAVA), LLAVA.rows(labels=True)
    labels = batch.pop("labels")
    labels[0, 3 + LLAVA.places[0]] = 22  # the text right behind an image: its last row predicts it
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    found = [model(**batch, labels=labels, **more).loss for more in ({}, {"shift_labels": shifted})]
    assert torch.equal(*found)
    assert torch.isfinite(found[0])


def test_a_copy_listens_to_each_of_its_own_layers(monkeypatch):
    monkeypatch.setitem(LLAMA, "num_hidden_layers", 4)
    stages = tuple((n, make("topk", keep, scorer="last_row")) for n, keep in ((1, 0.5), (3, 0.25)))
    model, batch = patched(LLAVA, Placement(stages=stages)), LLAVA.rows()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch).logits
        assert torch.equal(twin(**batch).logits, before)
        unpatch(model)
        assert torch.equal(twin(**batch).logits, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_drop_by_themselves_and_unpatching_ends_it(copied):
    model, batch = patched(QWEN), QWEN.rows(side="left")
    twin = copied(model)
    with torch.no_grad():
        before = model(**batch).logits
        unpatch(model)
        assert torch.equal(twin(**batch).logits, before)
        assert torch.equal(unpatch(twin)(**batch).logits, model(**batch).logits)


def test_lora_before_and_after():
    peft = pytest.importorskip("peft")
    found = []
    for when in ("before", "after"):
        model = LLAVA.build()
        if when == "after":
            patch(model, compress=stage())
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*(q|k|v)_proj", init_lora_weights=False)
        model = peft.get_peft_model(model, config).double()
        if when == "before":
            patch(model, compress=stage())
        found.append((gradients(model, LLAVA.rows(labels=True)), model.generate(**LLAVA.rows(side="left"), **GREEDY)))
    assert distance(found[0][0], found[1][0]) < 1e-6
    assert torch.equal(found[0][1], found[1][1])


def test_a_compiled_model_computes_the_same(request):
    request.addfinalizer(torch._dynamo.reset)  # frames of transformers count what all tests compile
    model, batch = patched(LLAVA), LLAVA.rows()
    with torch.no_grad():
        before = model(**batch).logits
        assert distance(torch.compile(model, backend="eager")(**batch).logits, before) < 1e-9


def test_beside_a_compressor_at_the_connector():
    """The connector leaves 8 of 16, the stage 2 of 8; the text is given as it was."""
    both = Placement(
        connector=make("topk", 8, scorer="norm", position="renumber"), stages=stage(scorer="norm").stages
    )  # fmt: skip
    model, batch = patched(LLAVA, both), LLAVA.rows(side="left")
    with torch.no_grad():
        out = model(**batch, use_cache=True)
        assert out.logits.shape[1] == 14
        assert [out.past_key_values.get_seq_length(n) for n in range(3)] == [26, 26, 14]
    said = model.generate(**batch, **GREEDY)
    assert torch.equal(said, model.generate(**batch, **GREEDY, use_cache=False))
    assert torch.equal(said[:, :-2], batch["input_ids"])


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_of_a_test"])
def test_attention_of_other_kinds(implementation):
    """Eager attention adds its mask, flash takes two dimensions: what each is given says the same."""
    batch, alone = LLAVA.rows(), LLAVA.rows((ROWS[0],))
    with torch.no_grad():
        model = patched(LLAVA)
        expected, said = model(**batch).logits, model.generate(**alone, **GREEDY)
        model = LLAVA.build()
        if implementation != "eager":
            hf.AttentionInterface.register(implementation, partial(_flash))
            hf.AttentionMaskInterface.register(implementation, lambda *a, attention_mask=None, **k: attention_mask)
        model.model.language_model.config._attn_implementation = implementation
        patch(model, compress=stage())
        out = model(**batch).logits
        assert distance([o[:n] for o, n in zip(out, (18, 5, 11), strict=True)],
                        [e[:n] for e, n in zip(expected, (18, 5, 11), strict=True)]) < EXACT  # fmt: skip
        assert torch.equal(model.generate(**alone, **GREEDY), said)


def _flash(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    assert attention_mask is None or attention_mask.dim() == 2
    rows, columns = query.shape[2], key.shape[2]
    seen = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    if attention_mask is not None:
        seen = seen & (attention_mask[:, None, None] != 0)
        seen = seen | torch.eye(columns, dtype=torch.bool)[-rows:]
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def test_a_sliding_window_counts_the_columns_of_the_text():
    text = {"model_type": "mistral", "sliding_window": 12, **LLAMA}
    kind = BY_NAME["idefics2"]
    model = kind.build()
    config = copy.deepcopy(model.config)
    config.text_config = hf.MistralConfig(**{k: v for k, v in text.items() if k != "model_type"})
    model = hf.Idefics2ForConditionalGeneration(config).eval().double()
    placement = stage(scorer="norm")
    with torch.no_grad():
        rows = [logits(model, kind, row, placement.stages, window=12) for row in ROWS]
        said = torch.tensor([answer(model, kind, row, placement.stages, 2, window=12) for row in ROWS])
        patch(model, compress=placement)
        out = model(**kind.rows(side="left")).logits
        assert distance([o[-len(e) :] for o, e in zip(out, rows, strict=True)], rows) < EXACT
        assert torch.equal(model.generate(**kind.rows(side="left"), **GREEDY)[:, -2:], said)
        patch(model, compress=stage())
        with pytest.raises(ValueError, match="longer than the sliding window of 12"):
            model(**kind.rows())


@pytest.mark.parametrize(
    "compressor",
    [make("bipartite_merge", 4), make("topk", 4, scorer="norm", position="calibrate")],
    ids=lambda c: c.name,
)
def test_tokens_that_stand_for_several_weigh_as_much(compressor):
    placement, batch = Placement(stages=((1, compressor),)), LLAVA.rows(side="left")
    model = LLAVA.build()
    with torch.no_grad():
        rows = [logits(model, LLAVA, row, placement.stages) for row in ROWS]
        said = torch.tensor([answer(model, LLAVA, row, placement.stages, 2) for row in ROWS])
        patch(model, compress=placement)
        out = model(**batch).logits
        assert distance([o[-len(e) :] for o, e in zip(out, rows, strict=True)], rows) < EXACT
        assert torch.equal(model.generate(**batch, **GREEDY)[:, -2:], said)


REFUSED = [
    ("llava", stage(layer=0, scorer="norm"), r"Placement\(connector=…\)"),
    ("llava", stage(layer=3), "its language model has 3"),
    ("llava", "PyramidDrop", "its language model has 3"),
    ("llava", stage(scorer="norm", position="renumber"), "position='keep'"),
    ("llava", stage(scorer="cls_row"), "no class token"),
    ("llava", stage(scorer="external"), "nobody gives"),
    ("llava", stage(method="temporal_dedup", compare="previous"), "frames of videos"),
    ("paligemma", stage(), "sees all of itself"),
    ("gemma3", stage(), "take turns with a sliding window"),
]


@pytest.mark.parametrize(("name", "compress", "why"), REFUSED, ids=[f"{n}-{w[:9]}" for n, _, w in REFUSED])
def test_what_cannot_be_right_is_refused(name, compress, why):
    with pytest.raises(ValueError, match=why):
        patch(BY_NAME[name].build(), compress=compress)


def test_calls_that_cannot_be_right_are_refused():
    model, batch = patched(LLAVA), LLAVA.rows(side="left")
    config = model.config.get_text_config()
    static = StaticCache(config=config, max_cache_len=60)
    refused = [
        ({**batch, "past_key_values": static}, "a cache of StaticLayer"),
        ({**batch, "pixel_values_videos": torch.zeros(1)}, "videos"),
        ({**batch, "cu_seq_lens_q": torch.zeros(2)}, "boundaries"),
        ({**batch, "logits_to_keep": torch.tensor([3])}, "give a number"),
        ({**batch, "attention_mask": torch.ones(3, 1, 4, 4)}, "must be"),
        ({**batch, "pixel_values": batch["pixel_values"][:2]}, "do not match"),
    ]
    for call, why in refused:
        with pytest.raises(ValueError, match=why):
            model(**call)
    with pytest.raises(ValueError, match="prefill_chunk_size=8 cuts the prompt"):
        model.generate(**batch, **GREEDY, prefill_chunk_size=8)
    assert model(**batch).logits.shape[1] == 18
    assert not hasattr(static, RECORD)
    model.__dict__["forward"] = partial(type(model).forward, model)  # as TRL puts one there
    with pytest.raises(ValueError, match="where an answer begins"):
        model.train().model(**batch)
    assert model.eval().model(**batch).last_hidden_state.shape[1] == batch["input_ids"].shape[1]


def test_the_report_names_layer_and_method():
    report = patch(LLAVA.build(), compress="FastV:0.25")
    (row,) = [row for row in report.replaced if row.op == "compress"]
    assert row.module == "model.language_model.layers.2"
    assert row.backend == "topk, K = 0.25, clean, in front of it"


def test_budgets_of_several_layers_stand_behind_a_name(monkeypatch):
    monkeypatch.setitem(LLAMA, "num_hidden_layers", 16)
    model = LLAVA.build()
    report = patch(model, compress="SparseVLM:12/6/4")
    said = {row.module: row.backend for row in report.replaced if row.op == "compress"}
    assert [name.rsplit(".", 1)[1] for name in said] == ["2", "6", "15"]
    with torch.no_grad():
        cache = model(**LLAVA.rows(side="left"), use_cache=True).past_key_values
    assert [cache.get_seq_length(n) for n in (1, 2, 6, 15)] == [42, 34, 22, 18]
    with pytest.raises(ValueError, match="3 budgets"):
        patch(model, compress="SparseVLM:12")
