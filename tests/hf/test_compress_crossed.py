"""patch(compress=…) where images are read by cross-attention: a token that is gone is one that nobody attends to."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hf_checks import cast, distance, gradients, in_dtype
from tiny_hf_fusion import FAMILIES, idefics

from fastmllm.compression import Placement, make
from fastmllm.hf import patch, unpatch
from fastmllm.hf.compress.crossed import CROSSED
from fastmllm.hf.rules import OPS

BY_NAME = {family.name: family for family in FAMILIES}
NAMES = ("mllama", "idefics", "blip_2", "instructblip")
KEEP = 5  # of 16 patches
EXACT = 1e-5  # fp64, of which transformers computes norms and softmax in fp32
GREEDY = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}


@pytest.fixture(params=NAMES)
def family(request):
    return BY_NAME[request.param]


def test_every_known_family_is_here():
    assert set(CROSSED) == set(NAMES)


def build(family):
    made = idefics(use_resampler=False) if family.name == "idefics" else family.build()
    return in_dtype(made, torch.float64)


def batch(family):
    return cast(family.batch(), torch.float64)


def compressor(keep=KEEP):
    return make("topk", keep, scorer="norm")


def tower_of(model):
    return next(m for n, m in model.named_modules() if n.endswith("vision_model"))


def hidden_from(family, model):
    """Let nobody attend to the patches that are not kept, with all of them there: transformers' own code with a mask.

    The class token of each image stays.
    """
    seen = {}

    def judge(module, args, out):
        x = out[0].detach()
        best = x[..., 1:, :].float().norm(dim=-1).topk(KEEP, -1).indices
        seen["keep"] = torch.zeros(x.shape[:-1], dtype=torch.bool).scatter(-1, best + 1, True)
        seen["keep"][..., 0] = True

    def mask(module, args, kwargs):
        lost, name = ~seen["keep"], "cross_attention_mask"
        if family.name == "mllama":  # (B, images, tiles, P)
            shown = kwargs[name]
            hidden = lost.flatten(1)[:, None, None].expand(shown.shape)
            kwargs[name] = shown.masked_fill(hidden, torch.finfo(shown.dtype).min)
        elif family.name == "idefics":  # (B * images, P)
            shown = kwargs["image_attention_mask"]
            hidden = lost.view(shown.shape[0], 1, 1, -1).expand(shown.shape)
            kwargs["image_attention_mask"] = shown.masked_fill(hidden, torch.finfo(shown.dtype).min)
        else:
            kwargs["encoder_attention_mask"] = kwargs["encoder_attention_mask"] * seen["keep"]
        return args, kwargs

    tower_of(model).register_forward_hook(judge)
    if family.name == "mllama":
        model.model.language_model.register_forward_pre_hook(mask, with_kwargs=True)
    elif family.name == "idefics":
        for layer in model.model.gated_cross_attn_layers:
            layer.register_forward_pre_hook(mask, with_kwargs=True)
    else:
        model.qformer.register_forward_pre_hook(mask, with_kwargs=True)
    return model


@cache
def expected(family):
    model = hidden_from(family, build(family))
    found = gradients(model, batch(family))
    with torch.no_grad():
        return model.eval()(**batch(family)).logits, found


def test_what_is_gone_is_what_nobody_attends_to(family):
    model = build(family)
    report = patch(model, ops=OPS, compress=compressor())
    (row,) = [row for row in report.replaced if row.op == "compress"]
    assert row.backend == f"topk, K = {KEEP}, clean, behind vision_model, for cross-attention"
    logits, grads = expected(family)
    found = gradients(model, batch(family))
    with torch.no_grad():
        assert distance(model.eval()(**batch(family)).logits, logits) < EXACT
    small = {n for n, g in grads.items() if float(g.abs().max()) == 0}  # of the tower, through what is gone
    assert found.keys() | small == grads.keys()
    assert distance(found, {n: grads[n] for n in found}) < EXACT


def test_keys_of_the_cross_attention_are_few(family):
    model, lengths = build(family), []
    name = {"mllama": "cross_attn.k_proj", "idefics": "cross_attn.k_proj"}.get(
        family.name, "crossattention.attention.key"
    )
    layer = next(m for n, m in model.named_modules() if n.endswith(name))
    patch(model, compress=compressor())
    layer.register_forward_pre_hook(lambda m, args: lengths.append(args[0].flatten(0, -2).shape[0]))
    given = batch(family)
    images = tower_images(family, given)
    with torch.no_grad():
        model(**given)
    assert lengths[0] == images * (1 + KEEP)


def tower_images(family, given):
    count = {"mllama": 3, "idefics": 2}.get(family.name, 1)
    return int(torch.tensor(given["pixel_values"].shape[:count]).prod())


def test_generates_with_a_cache_what_it_does_without(family):
    model = build(family)
    patch(model, compress=compressor())
    prompt = cast(family.prompt(), torch.float64)
    said = model.generate(**prompt, **GREEDY)
    assert torch.equal(said, model.generate(**prompt, **GREEDY, use_cache=False))
    masked = hidden_from(family, build(family))
    if family.name in ("blip_2", "instructblip"):  # the others' masks grow with their caches
        assert torch.equal(masked.generate(**prompt, **GREEDY), said)


@pytest.mark.parametrize("name", ["mllama", "blip_2"])
def test_all_tokens_kept_are_the_bits_without_compression(name):
    family, found = BY_NAME[name], []
    for compress in (None, compressor(1.0)):
        model = build(family)
        patch(model, compress=compress)
        grads = gradients(model, batch(family))
        with torch.no_grad():
            found.append([model.eval()(**batch(family)).logits, *grads.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_copies_and_the_way_back(family):
    model, given = build(family), batch(family)
    with torch.no_grad():
        before, keys = model(**given).logits, list(model.state_dict())
        patch(model, compress=compressor())
        assert list(model.state_dict()) == keys
        twin = copy.deepcopy(model)
        short = model(**given).logits
        assert short.shape == before.shape
        assert not torch.equal(short, before)
        assert torch.equal(unpatch(model)(**given).logits, before)
        assert torch.equal(twin(**given).logits, short)


@pytest.mark.parametrize("scorer", ["cls_row", "received"])
@pytest.mark.parametrize("name", ["idefics", "blip_2", "instructblip"])
def test_scores_are_those_of_the_towers_attention(name, scorer):
    family = BY_NAME[name]
    plain, model = build(family), build(family)
    plain.set_attn_implementation("eager")
    tower, given, weights = tower_of(plain), batch(family)["pixel_values"], []
    with torch.no_grad():
        layer = [m for n, m in tower.named_modules() if n.endswith("self_attn")][-1]
        layer.register_forward_hook(lambda m, args, out: weights.append(out[1]))
        out = tower(given.flatten(0, -4))
        seen = weights[0].mean(1)
        scores = seen[:, 0, 1:] if scorer == "cls_row" else seen[:, :, 1:].sum(1)
        best = scores.topk(KEEP).indices.sort(1).values + 1
        rows = torch.cat([torch.zeros(len(best), 1, dtype=torch.long), best], 1)
        expected = out.last_hidden_state.gather(1, rows[..., None].expand(-1, -1, 32))
        patch(model, compress=make("topk", KEEP, scorer=scorer, layer=-1))
        found = tower_of(model)(given.flatten(0, -4)).last_hidden_state
    assert distance(found, expected) < EXACT


def test_a_perceiver_reads_few_tokens():
    family, lengths = BY_NAME["idefics"], []
    model = in_dtype(idefics(), torch.float64)
    patch(model, compress=compressor())
    model.model.perceiver_resampler.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape))
    loss = model.train()(**batch(family)).loss
    loss.backward()
    assert lengths[0] == (6, 1 + KEEP, 32)
    assert all(float(p.grad.abs().max()) > 0 for p in model.model.perceiver_resampler.parameters() if p.requires_grad)


def test_llamas_turns_share_a_cache():
    from transformers import DynamicCache

    family = BY_NAME["mllama"]
    model = build(family)
    patch(model, compress=compressor())
    given = cast(family.prompt(), torch.float64)
    given = {n: v[:1] for n, v in given.items()}
    cache = DynamicCache(config=model.config.get_text_config())
    first = model.generate(**given, past_key_values=cache, **GREEDY)
    layers = model.config.text_config.cross_attention_layers
    assert {cache.layers[i].keys.shape[2] for i in layers} == {2 * 4 * (1 + KEEP)}
    ids = torch.cat([first, torch.tensor([[50, 51]])], 1)
    longer = given["cross_attention_mask"]
    longer = torch.cat([longer, longer[:, -1:].expand(-1, ids.shape[1] - longer.shape[1], -1, -1)], 1)
    one = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "cross_attention_mask": longer}
    images = {n: given[n] for n in ("pixel_values", "aspect_ratio_mask", "aspect_ratio_ids")}
    with torch.no_grad():
        whole = model(**one, **images).logits[:, -1]
        new = ids.shape[1] - first.shape[1] + 1  # the last word said is not in the cache yet
        at = torch.arange(ids.shape[1] - new, ids.shape[1])[None]
        part = {"input_ids": ids[:, -new:], "cross_attention_mask": longer}
        out = model(**part, attention_mask=one["attention_mask"], past_key_values=cache, position_ids=at)
    assert distance(out.logits[:, -1], whole) < EXACT


def test_what_cannot_be_right_is_refused_by_name():
    mllama = build(BY_NAME["mllama"])
    for compress, why in (
        (make("topk", KEEP, scorer="received"), "attends over all tiles"),
        (Placement(merge=4), "no layers of its tower"),
        (make("topk", KEEP, scorer="norm", position="calibrate"), "calibrate"),
        (make("pixel_shuffle", 4), "wider"),
    ):
        with pytest.raises(ValueError, match=why):
            patch(mllama, compress=compress)
    given = batch(BY_NAME["mllama"])
    plain = mllama.model.multi_modal_projector(
        mllama.model.vision_model(*(given[n] for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")))[0]
    )
    patch(mllama, compress=compressor())
    text = {n: given[n] for n in ("input_ids", "attention_mask", "cross_attention_mask")}
    with pytest.raises(ValueError, match="17 tokens a tile, but 6 are left"):
        mllama(**text, cross_attention_states=plain.flatten(0, 2))
