"""patch(compress=…): which methods a model takes, by what they judge, and what it refuses by which reason."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
import transformers as hf
from hf_by_hand import image_tokens, logits
from hf_checks import distance
from tiny_hf import CLIP, LLAMA, finish
from tiny_hf_compress import KINDS, ROWS

from fastmllm.compression import METHODS, Attend, Placement, TopK, make
from fastmllm.compression.published import PUBLISHED
from fastmllm.compression.selection import take
from fastmllm.hf import patch, relevance, unpatch
from fastmllm.hf.compress.connector import Connector
from fastmllm.hf.compress.listening import Watched
from fastmllm.hf.compress.seams import KEY

BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA, QWEN = BY_NAME["llava"], BY_NAME["qwen2_5_vl"]
RENUMBER = {"position": "renumber"}
TAKEN = {  # of each method, options, and what says no in LLaVA (None: it is taken)
    "pixel_shuffle": ({}, "wider"),
    "pool": ({}, None),
    "conv_reduce": ({"design": "c_abstractor", "width": 32}, None),
    "attend": ({"design": "mqt", "width": 32}, None),
    "topk": ({"scorer": "cls_row"}, None),
    "bipartite_merge": ({"metric": "keys"}, None),
    "dominant_contextual": ({}, None),
    "greedy_diverse": ({}, None),
    "pivot_dedup": ({}, None),
    "temporal_dedup": ({}, "frames of videos"),
}
# what says no to a published line in LLaVA
SAID = {
    "DART": "language model has 2", "FastV": "language model has 2",
    "PyramidDrop": "language model has 2", "SparseVLM": "language model has 2",
    "DeepSeek-OCR": "inside of the encoder", "EVS": "frames of videos",
    "DyCoke TTM": "frames of videos", "Perceiver": "weights of its own", "Q-Former": "weights of its own",
    "MQT": "weights of its own", "TokenPacker": "weights of its own", "C-Abstractor": "weights of its own",
    "LDPv2": "weights of its own", "InternVL pixel shuffle": "weights of its own",
    "InternVL pixel shuffle, v1": "weights of its own", "Qwen2-VL merger": "weights of its own",
    "Idefics3 pixel shuffle": "wider",
}  # fmt: skip


def stages(*budgets):
    return Placement(stages=tuple((layer, make("topk", keep, scorer="norm")) for layer, keep in budgets))


NEVER = [  # what no image can be left with, whatever its size
    ("DivPrune:many", "neither a number"),
    ("DivPrune:4:2", "neither a number"),
    ("DivPrune:inf", "neither a number"),
    ("nobody:4", "unknown method"),
    (7, "must be a Placement"),
    ("DivPrune:0", r"patch: .* keep 0 must lie in 1\.\.N"),
    ("VisionZip:-3", "keep -3 must lie"),
    ("VisionZip:0.0", "keep 0.0 is a fraction"),
    ("DivPrune:1.5", "keep 1.5 is a fraction"),
    ("ToMe:0", "keep 0 must lie"),
    (make("topk", True, scorer="norm", **RENUMBER), "must be a number of tokens"),
    (Placement(merge=1.5), "keep 1.5 is a fraction"),
    (Placement(connector="VisionZip"), "takes compressors, got 'VisionZip'"),
    (stages((1, 0)), "keep 0 must lie"),
    (stages((1, 4), (1, 2)), "one a layer"),
    (stages((2, 4), (1, 2)), "the first one first"),
    (stages((1, 0.25), (2, 0.5)), "cannot grow"),
]


def run(model, kind=LLAVA):
    with torch.no_grad():
        return model(**kind.rows()).logits


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_taken_or_refused_by_name(method):
    options, why = TAKEN[method]
    model = LLAVA.build()
    if why is not None:
        with pytest.raises(ValueError, match=why):
            patch(model, compress=make(method, 4, **options, **RENUMBER))
        return
    compressor = make(method, 4, **options, **RENUMBER)
    report = patch(model, compress=compressor)
    (row,) = [row for row in report.replaced if row.op == "compress"]
    assert row.backend == f"{method}, K = 4, clean, in front of multi_modal_projector"
    assert row.module == "model"
    assert run(model).shape[1] == 3 + 4 + 3 + 4 + 4


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_name_is_taken_or_refused_by_name(name):
    model = LLAVA.build()
    if name in SAID:
        with pytest.raises(ValueError, match=SAID[name]):
            patch(model, compress=name)
    else:
        patch(model, compress=f"{name.lower()}:{9 if 'PruMerge+' in name else 4}")
        told = relevance(model, torch.rand(48)) if name == "CDPruner" else nullcontext()
        with told:
            assert torch.isfinite(run(model)).all()


def test_budgets_behind_a_name():
    model = LLAVA.build()
    patch(model, compress="DivPrune:0.25")
    assert run(model).shape[1] == 18
    patch(model, compress="DivPrune:5")
    assert run(model).shape[1] == 20
    for wrong, why in NEVER:
        with pytest.raises(ValueError, match=why):
            patch(model, compress=wrong)
    assert run(model).shape[1] == 20  # a model that was patched stays so
    patch(model, compress="DivPrune:17")
    with pytest.raises(ValueError, match=r"keep 17 must lie in 1\.\.16"):
        run(model)
    assert run(unpatch(model)).shape[1] == 42  # and nothing is left of the call that failed


@pytest.mark.parametrize("layer", [-2, -1])
@pytest.mark.parametrize("scorer", ["cls_row", "received"])
def test_scores_are_those_of_the_towers_attention(scorer, layer):
    """The kept tokens are the most attended ones of eager attention, while the tower runs with SDPA."""
    model = LLAVA.build()
    pixels = LLAVA.rows()["pixel_values"]
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = tower(pixels, output_attentions=True).attentions[layer].mean(1)  # (I, 17, 17)
        scores = seen[:, 0, 1:] if scorer == "cls_row" else seen[:, :, 1:].sum(1)
        best = scores.topk(4).indices.sort(1).values
        images = image_tokens(model, LLAVA, Chosen(best))
        expected = [logits(model, LLAVA, images, row) for row in ROWS]
        patch(model, compress=TopK(4, scorer=scorer, layer=layer, position="renumber"))
        out = run(model)
    assert distance([o[: len(e)] for o, e in zip(out, expected, strict=True)], expected) < 1e-6


def test_one_layer_is_watched_and_only_while_images_are_encoded():
    model = LLAVA.build()
    patch(model, compress="visionzip:4")
    parts = {n: f for n, m in model.named_modules() for f in getattr(type(m), "_fastmllm_fusions", ())}
    assert parts["model.multi_modal_projector"] is Connector
    watched = [n.split("layers.")[1] for n, f in parts.items() if issubclass(f, Watched)]
    assert watched == ["1.self_attn.k_proj", "1.self_attn.q_proj"]  # of three layers
    run(model)
    state = model.model.__dict__[KEY]
    assert not state.tower.now.watched
    model.model.vision_tower(LLAVA.rows()["pixel_values"])  # as gradient checkpointing runs it again
    assert not state.tower.now.watched


class Chosen(TopK):
    """Keeps what a list says of each image, one image after the other."""

    def __init__(self, best):
        super().__init__(4, scorer="norm", position="renumber")
        self.best = list(best)

    def reduce(self, tokens, evidence, budgets):
        return take(tokens, self.best.pop(0), budgets)


def test_attention_is_refused_where_tokens_are_latents():
    for tried in ("visionzip:4", make("topk", 4, scorer="received", **RENUMBER)):
        with pytest.raises(ValueError, match="stand latents"):
            patch(BY_NAME["idefics2"].build(), compress=tried)


def test_latents_are_no_grid():
    kind = BY_NAME["idefics2"]
    model = kind.build()
    patch(model, compress=make("pool", 1, **RENUMBER))
    with pytest.raises(ValueError, match="grid"):
        run(model, kind)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.grid], ids=repr)
def test_pooling_sees_the_grid(kind):
    keep = 0.25 if kind.mrope else 4
    compressor = make("pool", keep, position="keep" if kind.mrope else "renumber")
    model = kind.build()
    with torch.no_grad():
        images = image_tokens(model, kind, compressor)
        expected = [logits(model, kind, images, row) for row in ROWS]
        patch(model, compress=compressor)
        out = run(model, kind)
    assert distance([o[: len(e)] for o, e in zip(out, expected, strict=True)], expected) < 1e-5


def test_qwen_may_renumber_and_keep_other_numbers():
    """Renumbered tokens stand as text does; a row alone then counts its columns."""
    model = QWEN.build()
    seen = []
    model.model.language_model.rotary_emb.register_forward_hook(lambda m, args, out: seen.append(args[1]))
    patch(model, compress=make("topk", [3, 5, 4], scorer="norm", position="renumber"))
    out = run(model, QWEN)
    assert out.shape[1] == 3 + 3 + 3 + 5 + 4
    assert torch.equal(seen[0][:, 0], torch.arange(18).expand(3, -1))
    assert model.model.rope_deltas.flatten().tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="3 budgets for 1 images"):
        model(**QWEN.rows((ROWS[2],)))


def test_weights_learn_outside_of_the_state_dict():
    model = LLAVA.build().train()
    queries = Attend(4, design="mqt", width=32, **RENUMBER)
    keys = list(model.state_dict())
    patch(model, compress=queries)
    assert list(model.state_dict()) == keys
    assert next(queries.parameters()).dtype == torch.float64
    model(**LLAVA.rows(labels=True)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in queries.parameters() if p.requires_grad)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copies_compress_by_themselves(copied):
    model = LLAVA.build()
    patch(model, compress="visionzip:4")
    twin = copied(model)  # before it has run: transformers hangs hooks on it then that are never pickled
    before = run(model)
    unpatch(model)
    assert torch.equal(run(twin), before)
    assert torch.equal(run(unpatch(twin)), run(model))


REFUSED = [
    (LLAVA, make("topk", 4, scorer="norm"), "position='renumber'"),
    (LLAVA, make("topk", 4, scorer="norm", position="calibrate"), "calibrate"),
    (LLAVA, make("topk", 4, scorer="last_row", **RENUMBER), "does not see"),
    (LLAVA, make("topk", [4, 4, 4], scorer="norm", **RENUMBER), "one number or fraction"),
    (LLAVA, make("topk", 4, layer=-9, **RENUMBER), "has 3 whose queries"),
]


@pytest.mark.parametrize(("kind", "compress", "why"), REFUSED)
def test_what_has_no_place_is_refused(kind, compress, why):
    model = kind.build()
    with pytest.raises(ValueError, match=why):
        patch(model, compress=compress)
    assert run(model).shape[1] == 42


def families_without_places():
    yield hf.CLIPVisionModel(hf.CLIPVisionConfig(**CLIP)), "known families"
    yield torch.nn.Linear(2, 2), "known families"
    sequence = hf.Gemma3ForSequenceClassification(BY_NAME["gemma3"].build().config)
    yield sequence, "reads the whole text"


def test_models_without_places_are_refused():
    for model, why in families_without_places():
        with pytest.raises(ValueError, match=why):
            patch(model, compress="divprune:4")


def test_a_tower_that_packs_its_images_is_refused():
    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
              "num_attention_heads": 4, "image_size": 28, "patch_size": 7}  # fmt: skip
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**LLAMA), vision_feature_layer=-1)
    with pytest.raises(ValueError, match="packs images"):
        patch(finish(hf.LlavaForConditionalGeneration(config)), compress="divprune:4")
