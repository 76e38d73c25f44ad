"""patch(compress=Placement(merge=…)): Token Merging inside of the tower, against its formula in fp64."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
import transformers as hf
from hf_by_hand import answer, logits
from hf_checks import distance, gradients, in_dtype
from merge_by_hand import merge_round
from tiny_hf import CLIP, LLAMA
from tiny_hf_compress import KINDS, ROWS

from fastmllm.compression import Placement, make
from fastmllm.compression.merge_schedule import merge_schedule
from fastmllm.hf import patch, unpatch

BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA = BY_NAME["llava"]
FAMILIES = [BY_NAME[n] for n in ("llava", "llava_next", "llava_onevision", "paligemma")]
KEEP = 5
EXACT = 1e-6  # transformers computes softmax of the language model in fp32
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=FAMILIES, ids=repr)
def kind(request):
    return request.param


def encoder_of(model):
    return next(
        m for n, m in model.model.vision_tower.named_modules() if n.endswith("encoder") and hasattr(m, "layers")
    )


def by_formula(model, kind, number):
    """Return (tiles * K, D) behind the projector of an image that is encoded alone, layer by layer, tile by tile."""
    owner, encoder = model.model, encoder_of(model)
    pixels = kind.images[number][0] if kind.tiles[number] > 1 else kind.images[number][None]
    seen = []
    hook = encoder.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs.get("inputs_embeds", args[0] if args else None)), with_kwargs=True
    )
    owner.vision_tower(pixels)
    hook.remove()
    layer = getattr(model.config, "vision_feature_layer", None)
    lead = int(getattr(model.config, "vision_feature_select_strategy", "full") == "default")
    used = len(encoder.layers) if layer is None else len(encoder.layers) + 1 + layer
    tiles = []
    for x in seen[0]:
        schedule = [r[0] for r in merge_schedule([len(x)], [KEEP + lead], used, lead)]
        size = torch.ones(len(x), dtype=x.dtype)
        for block, r in zip(encoder.layers, schedule, strict=False):
            y, at = block.layer_norm1(x), block.self_attn
            q, k, v = (p(y).unflatten(-1, (at.num_heads, -1)) for p in (at.q_proj, at.k_proj, at.v_proj))
            scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5 + size.log()
            x = x + at.out_proj(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1))
            x, size = merge_round(x, k.mean(1), size, r, lead)
            x = x + block.mlp(block.layer_norm2(x))
        assert int(size.sum()) == len(seen[0][0])
        tiles.append(x[lead:] if layer is not None else owner.vision_tower.post_layernorm(x))
    return owner.multi_modal_projector(torch.stack(tiles)).flatten(0, 1)


@cache
def expected(kind):
    model = kind.build()
    images = [(by_formula(model, kind, number), [], None) for number in range(3)]
    return model, images, [logits(model, kind, images, row) for row in ROWS]


def test_logits_loss_and_gradients_are_those_by_hand(kind):
    by_hand, _, rows = expected(kind)
    targets = torch.tensor([token for row in ROWS for token in row[-1][-4:]])
    loss = torch.nn.functional.cross_entropy(torch.cat([row[-5:-1] for row in rows]), targets)
    loss.backward()
    truth = {n: p.grad for n, p in by_hand.named_parameters() if p.grad is not None}
    model = kind.build()
    report = patch(model, compress=Placement(merge=KEEP))
    (row,) = [row for row in report.replaced if row.op == "compress"]
    assert row.backend == f"bipartite_merge, K = {KEEP}, clean, inside of vision_tower"
    with torch.no_grad():
        out = model(**kind.rows()).logits
        assert distance([o[: len(r)] for o, r in zip(out, rows, strict=True)], [r.detach() for r in rows]) < EXACT
    model.train()
    found = model(**kind.rows(labels=True))
    found.loss.backward()
    assert distance(found.loss.detach(), loss.detach()) < EXACT
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert distance({n: grads[n] for n in truth}, truth) < EXACT


def test_generates_what_a_loop_without_cache_does(kind):
    by_hand, images, _ = expected(kind)
    with torch.no_grad():
        said = torch.tensor([answer(by_hand, kind, images, row, 4) for row in ROWS])
    model = kind.build()
    patch(model, compress=Placement(merge=KEEP))
    prompt = kind.rows(side="left")
    out = model.generate(**prompt, **GREEDY)
    assert torch.equal(out[:, :-4], prompt["input_ids"])
    assert torch.equal(out[:, -4:], said)


@pytest.mark.parametrize("kind", [BY_NAME["llava"], BY_NAME["llava_next"]], ids=repr)
def test_all_tokens_kept_are_the_bits_without_merging(kind):
    found = []
    for compress in (None, Placement(merge=1.0)):
        model = kind.build().train()
        patch(model, compress=compress)
        grads = gradients(model, kind.rows(labels=True))
        with torch.no_grad():
            found.append([model.eval()(**kind.rows()).logits, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same(reentrant):
    model, batch = LLAVA.build(), LLAVA.rows(labels=True)
    patch(model, compress=Placement(merge=KEEP))
    before = gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
        model.model.vision_tower.embeddings.register_forward_hook(lambda m, a, out: out.requires_grad_())
    after = gradients(model, batch)
    assert after.keys() == before.keys()
    assert distance(after, before) < 1e-9


def test_published_names_copies_and_the_way_back():
    model, batch = LLAVA.build(), LLAVA.rows()
    with torch.no_grad():
        plain = model(**batch).logits
        tower = model.model.vision_tower(batch["pixel_values"]).last_hidden_state
        keys = list(model.state_dict())
        patch(model, compress=f"tome:{KEEP}")
        assert list(model.state_dict()) == keys
        short = model(**batch).logits
        assert short.shape[1] == plain.shape[1] - 2 * (16 - KEEP)
        assert torch.equal(model.model.vision_tower(batch["pixel_values"]).last_hidden_state, tower)  # asked for alone
        twin = copy.deepcopy(model)
        unpatch(model)
        assert torch.equal(twin(**batch).logits, short)
        assert torch.equal(model(**batch).logits, plain)


def test_several_turns_are_one_conversation():
    from transformers import DynamicCache

    kind, row = LLAVA, ROWS[0]
    model = kind.build()
    patch(model, compress=Placement(merge=KEEP))
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**kind.rows((row,)), past_key_values=cache, **GREEDY)
    ids = torch.cat([first, torch.tensor([[50, 51]])], 1)
    pixels = kind.rows((row,))["pixel_values"]
    said = model.generate(input_ids=ids, past_key_values=cache, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(said, model.generate(input_ids=ids, pixel_values=pixels, **GREEDY))


def llava(layer, strategy, **vision):
    return hf.LlavaForConditionalGeneration(hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**{**CLIP, **vision}), text_config=hf.LlamaConfig(**LLAMA), image_token_id=9,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy,
    ))  # fmt: skip


def refused():
    yield BY_NAME["internvl"].build(), Placement(merge=4), "merged tokens are no grid"
    yield BY_NAME["gemma3"].build(), "tome:4", "merged tokens are no grid"
    yield BY_NAME["qwen2_5_vl"].build(), "tome:4", "merged tokens are no grid"
    yield LLAVA.build(), Placement(merge=4, connector=make("topk", 2, position="renumber")), "choose one"
    yield llava([-2, -1], "default"), "tome:4", "of which each would have other tokens"
    yield llava(0, "default"), "tome:4", "what goes into its first layer"
    yield llava(-2, "full"), "tome:4", "stands among the tokens"


def test_what_cannot_be_right_is_refused_by_name():
    for model, compress, why in refused():
        with pytest.raises(ValueError, match=why):
            patch(model, compress=compress)


def test_calls_that_merging_cannot_take():
    model = in_dtype(llava(-2, "default", attention_dropout=0.5), torch.float64).train()
    model.config.image_token_id = LLAVA.build().config.image_token_id
    patch(model, compress="tome:5")
    with pytest.raises(ValueError, match="without attention dropout"):
        model(**LLAVA.rows())
    with pytest.raises(ValueError, match="vision_feature_layer=-1"):
        model(**LLAVA.rows(), vision_feature_layer=-1)
    model.model.vision_tower.config.attention_dropout = 0.0
    patch(model, compress="tome:1")
    with pytest.raises(ValueError, match="do not get from 17 tokens to 2"):
        model.eval()(**LLAVA.rows())
