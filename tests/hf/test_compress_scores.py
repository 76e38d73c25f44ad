"""patch(compress=…) by the tower's attention where a connector's token is made of r x r patches."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from hf_by_hand import image_tokens, logits
from hf_checks import distance
from tiny_hf_compress import KINDS, ROWS
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from fastmllm.compression import TopK, make
from fastmllm.compression.selection import take
from fastmllm.hf import patch
from fastmllm.hf.compress.seams import KEY

BY_NAME = {kind.name: kind for kind in KINDS}
MERGED = [BY_NAME[n] for n in ("internvl", "gemma3", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")]
EXACT = 1e-6  # Qwen turns queries and keys in fp32


def position(kind):
    return "keep" if kind.mrope else "renumber"


def tower_of(model):
    return next(getattr(model.model, n) for n in ("vision_tower", "vision_model", "visual") if hasattr(model.model, n))


def last_layer(tower):
    return [m for n, m in tower.named_modules() if n.endswith(("self_attn", ".attn", ".attention"))][-1]


def by_formula(kind, number):
    """Return of one image's patches, in the order of its tokens (N, M): received by all, by the first row, and keys.

    Of eager attention of the unpatched model, encoded alone; in fp64.
    """
    model = kind.build()
    tower = tower_of(model)
    tower.set_attn_implementation("eager")
    seen = {}

    def look(module, args, kwargs, out):
        if kind.mrope:
            x, heads = args[0], module.num_heads
            q, k, _ = module.qkv(x).view(len(x), 3, heads, -1).unbind(1)
            cos, sin = kwargs["position_embeddings"]
            q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
            seen["p"] = torch.einsum("qhd,khd->hqk", q, k).mul(module.scaling).softmax(-1)
            seen["k"] = k.mean(1)
        else:
            seen["p"] = out[1][0]
            x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            norm = getattr(module, "k_norm", torch.nn.Identity())
            seen["k"] = norm(module.k_proj(x))[0].unflatten(-1, (-1, module.head_dim)).mean(1)

    last_layer(tower).register_forward_hook(look, with_kwargs=True)
    batch = kind.rows((([1], number, [20]),))
    pixels = {k: v for k, v in batch.items() if k in ("pixel_values", "image_grid_thw")}
    if kind.mrope:
        tower.merger.register_forward_hook(lambda m, a, out: seen.update(merged=out))
    with torch.no_grad():
        out = model.model.get_image_features(**pixels, return_dict=True)
    received, first, keys = seen["p"].mean((0, 1)), seen["p"].mean(0)[0], seen["k"]
    if kind.mrope:  # which merged rows the tower gives in which order
        order = (out.pooler_output[0][:, None] - seen["merged"][None]).abs().sum(2).argmin(1)
        return received.view(-1, 4)[order], None, keys.view(-1, 4, keys.shape[1])[order]
    lead = len(received) - 64

    def blocks(x):
        return x[lead:].view(4, 2, 4, 2, *x.shape[1:]).transpose(1, 2).reshape(16, 4, *x.shape[1:])

    return blocks(received), blocks(first) if lead else None, blocks(keys)


class Recorder(TopK):
    """Keeps the evidence that it is given."""

    def reduce(self, tokens, evidence, budgets):
        self.probe = evidence.probe
        return super().reduce(tokens, evidence, budgets)


class Chosen(TopK):
    """Keeps what a list says of each image, one image after the other."""

    def __init__(self, best, position):
        super().__init__(len(best[0]), scorer="norm", position=position)
        self.best = list(best)

    def reduce(self, tokens, evidence, budgets):
        return take(tokens, self.best.pop(0), budgets)


@pytest.mark.parametrize("kind", MERGED, ids=repr)
def test_a_token_scores_the_mean_of_its_patches(kind):
    model = kind.build()
    recorder = Recorder(kind.keep, scorer="received", layer=-1, position=position(kind))
    patch(model, compress=recorder)
    with torch.no_grad():
        out = model(**kind.rows()).logits
        found = [by_formula(kind, number) for number in range(3)]
        received = [f[0].mean(1) for f in found]
        assert distance(recorder.probe.received("all"), torch.cat(received)) < EXACT
        assert distance(recorder.probe.keys().double(), torch.cat([f[2].mean(1) for f in found])) < EXACT
        if found[0][1] is not None:
            assert distance(recorder.probe.received("first"), torch.cat([f[1].mean(1) for f in found])) < EXACT
        best = [r.topk(kind.keep).indices.sort().values for r in received]
        plain = kind.build()
        images = image_tokens(plain, kind, Chosen(best, position(kind)))
        expected = [logits(plain, kind, images, row) for row in ROWS]
    assert distance([o[: len(e)] for o, e in zip(out, expected, strict=True)], expected) < 1e-5


@pytest.mark.parametrize("kind", [BY_NAME[n] for n in ("internvl", "gemma3", "qwen3_vl")], ids=repr)
def test_published_methods_generate_and_learn(kind):
    model = kind.build()
    options = {"scorer": "received", "layer": -1, "position": position(kind)}
    patch(model, compress=make("dominant_contextual", kind.keep, **options))
    prompt, how = kind.rows(side="left"), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    said = model.generate(**prompt, **how)
    assert torch.equal(said, model.generate(**prompt, **how, use_cache=False))
    assert not model.model.__dict__[KEY].tower.now.watched
    model.train()
    model(**kind.rows(labels=True)).loss.backward()
    grads = [p.grad for p in tower_of(model).parameters() if p.grad is not None]
    assert any(float(g.abs().max()) > 0 for g in grads)


def test_windows_tell_nothing_of_the_whole_image():
    kind = BY_NAME["qwen2_5_vl"]
    with pytest.raises(ValueError, match="inside of windows alone: take one of layers 1"):
        patch(kind.build(), compress=make("topk", 4, scorer="received", layer=0))


@pytest.mark.parametrize("kind", [k for k in KINDS if not k.name.startswith(("llava", "idefics2"))], ids=repr)
def test_a_tower_without_class_token_says_so(kind):
    options = {"layer": -1, "position": position(kind)}
    if kind.name == "internvl":
        patch(kind.build(), compress=make("topk", 4, scorer="cls_row", **options))
        return
    for method, more in (
        ("topk", {"scorer": "cls_row"}), ("dominant_contextual", {}), ("pivot_dedup", {"pivots": "score"}),
        ("greedy_diverse", {"objective": "coverage", "relevance": "cls_row"}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="no class token"):
            patch(kind.build(), compress=make(method, 4, **more, **options))
    patch(kind.build(), compress=make("pivot_dedup", 4, pivots="norm", **options))  # reads keys alone


def test_normed_queries_are_those_that_are_compared():
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "image_size": [56, 56], "patch_size": [7, 7], "use_qk_norm": True}  # fmt: skip
    plain = BY_NAME["internvl"]
    config = plain.build().config

    def build():
        torch.manual_seed(0)
        made = hf.InternVLConfig(vision_config=vision, text_config=config.text_config, image_token_id=9,
                                 image_seq_length=16)  # fmt: skip
        made.image_token_id = config.image_token_id
        model = hf.InternVLForConditionalGeneration(made).double().eval()
        for name, p in model.named_parameters():
            if "_norm" in name and "vision" in name:
                torch.nn.init.uniform_(p, 0.5, 2.0)
        return model

    kind = type(plain)(**{**vars_of(plain), "build": build})
    model = build()
    recorder = Recorder(4, scorer="received", layer=-1, position="renumber")
    patch(model, compress=recorder)
    with torch.no_grad():
        model(**kind.rows())
    expected = torch.cat([by_formula(kind, n)[0].mean(1) for n in range(3)])
    assert distance(recorder.probe.received("all"), expected) < EXACT


def vars_of(kind):
    return {name: getattr(kind, name) for name in kind.__dataclass_fields__}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_inside_of_an_image_is_refused_and_a_mask_of_ones_is_not(implementation):
    kind = BY_NAME["idefics3"]
    model = kind.build()
    model.set_attn_implementation(implementation)
    patch(model, compress=make("topk", 4, scorer="received", layer=-1, position="renumber"))
    batch = kind.rows()
    pixels = batch["pixel_values"]
    mask = torch.ones(*pixels.shape[:2], *pixels.shape[-2:], dtype=torch.long)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, pixel_attention_mask=mask).logits, expected)
        mask[0, 0, 28:] = 0
        with pytest.raises(ValueError, match="padding that is masked"):
            model(**batch, pixel_attention_mask=mask)
