"""Fresh compositions: what must hold of every one that is allowed, and CogAgent against its formula."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from fastmllm.infer.generation import generate_tokens
from fastmllm.infer.sampling import SamplingParams
from fastmllm.models.compose import make_policy
from fastmllm.models.mllm import MLLM
from tests.support.tiny_compositions import IMAGE, LANGUAGE, allowed, labels, picture, redrawn, samples, tiny

ALLOWED = allowed()
ONE_A_FUSION = sorted(
    {(fusion, resolution): (e, resolution, c, fusion) for e, resolution, c, fusion in ALLOWED}.values()
)
names = {"ids": lambda parts: "-".join(parts)}


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}  # every parameter has one


@pytest.mark.parametrize("parts", ALLOWED, **names)
def test_packed_equals_unpacked_gradients_reach_every_parameter_and_pixels_count(parts):
    model, batch = redrawn(tiny(*parts)), samples()[:2]
    together = model.pack(batch, labels(batch))
    loss = model(together)
    found = gradients(model, loss)
    assert not [name for name, gradient in found.items() if not gradient.any()]
    alone = [model.pack([s], labels([s])) for s in batch]
    losses = [model(one) for one in alone]
    assert relative(loss, sum(losses)) <= 1e-6
    model.zero_grad()
    sum(losses).backward()
    largest = max(g.abs().max() for g in found.values())
    for name, p in model.named_parameters():
        assert (p.grad - found[name]).abs().max() <= 1e-5 * largest, name
    other = model(model.pack(samples(7)[:2], labels(batch)))
    assert loss.item() != other.item()
    moved = gradients(model, other)
    towers = [name for name in found if name.endswith("patch_embed.weight")]
    assert len(towers) == 1 + (parts[1] == "dual")
    assert all(relative(moved[name], found[name]) > 1e-3 for name in towers)


@pytest.mark.parametrize("parts", ALLOWED, **names)
def test_pictures_move_the_rows_behind_them_and_no_other_and_samples_do_not_meet(parts):
    model, before = redrawn(tiny(*parts)), samples()
    after = [list(s) for s in before]
    after[0][4] = 255 - before[0][4]  # the first sample's second picture
    packed = model.pack(before)
    tokens = packed.plan.input_ids.tolist()
    first = len(tokens) if parts[3] == "cogagent" else tokens.index(11) + 1  # behind the text between the pictures
    end = int(packed.cu_seqlens[1])
    with torch.no_grad():
        logits = model.logits(packed)
        same = (logits == model.logits(model.pack(after))).all(-1)
        assert relative(model.logits(model.pack(before[1:2])), logits[end : int(packed.cu_seqlens[2])]) <= 2e-6
    if parts[3] != "cogagent":  # there every row sees its sample's pictures
        assert same[:first].all()
    assert not same[end - 2 : end].any()
    assert same[end:].all()


@pytest.mark.parametrize("parts", ALLOWED, **names)
def test_text_alone_works(parts):
    model, batch = redrawn(tiny(*parts)), [[1, 30, 31], [1, 20, 21, 22]]
    packed = model.pack(batch, labels(batch))
    assert packed.images is None
    loss = model(packed)
    loss.backward()
    assert torch.isfinite(loss)
    mixed = model.pack([*samples()[:1], *batch])
    with torch.no_grad():
        assert relative(model.logits(mixed)[-7:], model.logits(packed)) <= 2e-6


@pytest.mark.parametrize("parts", ONE_A_FUSION, **names)
def test_generation_equals_recomputing_without_a_cache(parts):
    model, batch = redrawn(tiny(*parts)), samples()
    found = generate_tokens(model, model.pack(batch), SamplingParams(max_new_tokens=4), stop=[IMAGE])
    for sample, new in zip(batch, found, strict=True):
        for k, token in enumerate(new):
            with torch.no_grad():
                assert model.logits(model.pack([[*sample, *new[:k]]]))[-1].argmax() == token


@pytest.mark.parametrize("parts", [p for p in ONE_A_FUSION if p[3] in ("flamingo", "idefics", "mllama")], **names)
def test_a_fresh_model_with_gates_is_its_language_model(parts):
    model = MLLM.from_config(tiny(*parts))
    packed = model.pack(samples())
    plan = packed.plan
    with torch.no_grad():
        plain = model.language(
            model.language.embed(packed.input_ids), plan.position_ids, plan.cu_seqlens, plan.max_seqlen
        )
        assert torch.equal(model.start(packed)[0], plain)


def test_the_seed_decides_the_weights_and_nothing_else():
    config = tiny("vit", "fixed", "mlp", "flamingo")
    state = torch.get_rng_state()
    one, two, other = (MLLM.from_config(config, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["images.vision.patch_embed.weight"], other["images.vision.patch_embed.weight"])
    assert not any(one[name].any() for name in one if name.endswith("_gate"))
    assert one["language.cross_layers.1.q_proj.weight"].std() == pytest.approx(0.02, rel=0.2)


def test_rows_see_the_latest_picture_or_all_so_far():
    model, sample = redrawn(tiny("vit", "fixed", "mlp", "flamingo")), samples()[0]
    each = 16
    for sees, bounds in (
        ("latest", [(0, 0), (0, 1), (0, 1), (0, 1), (1, 2), (1, 2), (1, 2)]),
        ("all_previous", [(0, 0), (0, 1), (0, 1), (0, 1), (0, 2), (0, 2), (0, 2)]),
    ):
        packed = model.pack([sample], sees=sees)
        ranges = torch.stack([packed.media_start, packed.media_stop], 1) // each
        assert [tuple(r) for r in ranges.tolist()] == bounds
        assert packed.max_media == each * max(b - a for a, b in bounds)


@pytest.mark.parametrize("parts", [p for p in ALLOWED if p[1] in ("fixed", "anyres") and p[3] == "tokens"], **names)
def test_a_plan_says_what_stands_in_the_batch(parts):
    config, image = tiny(*parts), picture(5, 20, 44)
    plan = make_policy(config).plan(44, 20)
    assert redrawn(config).pack([[1, image, 2]]).max_seqlen == 2 + plan.llm_tokens


def test_native_grids_go_with_plain_positions_too():
    model = redrawn(replace(tiny("qwen", "native", "merger", "tokens"), language=LANGUAGE))
    packed = model.pack(samples(), labels(samples()))
    assert packed.position_ids.dim() == 1
    assert torch.isfinite(model(packed))


@pytest.mark.parametrize("parts", ONE_A_FUSION, **names)
def test_bfloat16(parts):
    model, packed = redrawn(tiny(*parts)), redrawn(tiny(*parts)).pack(samples())
    with torch.no_grad():
        expected, found = model.logits(packed), copy.deepcopy(model).bfloat16().logits(packed)
    assert found.dtype == torch.bfloat16
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.1


@pytest.mark.parametrize("parts", [("vit", "tiles", "pixel_shuffle", "tokens"), ("vit", "tiles", "ldp", "tokens")])
def test_a_head_that_is_the_table_stays_it(parts, tmp_path):
    model = redrawn(tiny(*parts, language=replace(LANGUAGE, tie_embeddings=True)))
    model.save_pretrained(tmp_path)
    again = MLLM.from_pretrained(tmp_path)
    assert again.language.lm_head.weight is again.language.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(again.logits(again.pack(samples())), model.logits(model.pack(samples())))


def test_what_pack_refuses():
    model = MLLM.from_config(tiny("vit", "fixed", "mlp", "tokens"))
    with pytest.raises(ValueError, match=r"labels of \[2\] for samples of \[3\]"):
        model.pack([[1, picture(0), 2]], [[1, 2]])
    with pytest.raises(ValueError, match="0 images are given, but the text has places for 1"):
        model.pack([[1, IMAGE, 2]])
    model.packing = None
    with pytest.raises(ValueError, match="names no resolution policy"):
        model.pack([[1, 2]])


@pytest.mark.parametrize("parts", ONE_A_FUSION, **names)
def test_a_saved_composition_is_the_same_model(parts, tmp_path):
    model = redrawn(tiny(*parts))
    model.save_pretrained(tmp_path)
    again = MLLM.from_pretrained(tmp_path)
    state = model.state_dict()
    assert again.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(again.logits(again.pack(samples())), model.logits(model.pack(samples())))
