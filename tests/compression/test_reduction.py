"""Visual tokens dropped between layers: against a dense transcription in fp64, with a cache, in training, merged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmllm.compression.bipartite_merge import BipartiteMerge
from fastmllm.compression.compressor import Probe
from fastmllm.compression.dominant_contextual import DominantContextual
from fastmllm.compression.pool import Pool
from fastmllm.compression.published import PUBLISHED, placement
from fastmllm.compression.reduction import Reduction, VisualRows
from fastmllm.compression.selection import take
from fastmllm.compression.topk import TopK
from fastmllm.models.language import LanguageConfig, LanguageModel

COUNTS = (11, 4, 13)  # tokens of each sequence: one image, none, two
IMAGES = ((1, 6), (16, 4), (22, 5))  # first row, tokens
VISIBLE = [row for first, n in IMAGES for row in range(first, first + n)]


def language(dtype: torch.dtype = torch.float64, depth: int = 4, **options) -> LanguageModel:
    torch.manual_seed(3)
    config = LanguageConfig(vocab_size=31, width=16, depth=depth, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=24,
                            **options)  # fmt: skip
    model = LanguageModel(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.35)
    return model


def batch(counts=COUNTS, images=IMAGES, prompts=None):
    """Embeddings, positions, boundaries, and where the images are."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 16, generator=generator, dtype=torch.float64)
    positions = torch.cat([torch.arange(n) for n in counts])
    bounds = torch.tensor([0, *counts]).cumsum(0).int()
    index = torch.tensor([row for first, n in images for row in range(first, first + n)])
    labels = None
    if prompts is not None:
        labels = torch.full((sum(counts),), -100)
        for row in prompts:
            labels[row] = row % 31
    visual = VisualRows.of_batch(index, [n for _, n in images], bounds, labels, torch.device("cpu"))
    return x, positions, bounds, visual


def run(model, x, positions, bounds, reduction=None, cache=None):
    longest = int(bounds.diff().max())
    return model(x, positions, bounds, longest, cache, reduction=reduction)


def dense(model, x, positions, allowed, layers):
    """Run some layers on one sequence with matrices; return hidden states and the last layer's probabilities."""
    probabilities = None
    frequencies = 10000.0 ** (-torch.arange(0, 4, 2, dtype=torch.float64) / 4)
    angles = positions[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def turn(t):
        a, b = t.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    for layer in layers:
        attn, y = layer.self_attn, layer.input_layernorm(x)
        q = turn(attn.q_proj(y).unflatten(-1, (4, 4)))
        k, v = (p(y).unflatten(-1, (2, 4)).repeat_interleave(2, 1) for p in (attn.k_proj, attn.v_proj))
        scores = torch.einsum("qhd,khd->hqk", q, turn(k)) / 2 + allowed
        probabilities = scores.softmax(-1)
        x = x + attn.o_proj(torch.einsum("hqk,khd->qhd", probabilities, v).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return x, probabilities


def causal(n):
    return torch.full((n, n), -torch.inf, dtype=torch.float64).triu(1)


def transcription(model, x, positions, images, stages, row=-1):
    """FastV and PyramidDrop on one sequence: the last row's attention in the layer in front, the mean over heads."""
    rows, at = torch.arange(len(x)), 0
    visible = [list(range(first, first + n)) for first, n in images]
    for layer, keep in [*stages, (4, None)]:
        x, p = dense(model, x, positions[rows], causal(len(x)), model.model.layers[at:layer])
        at = layer
        if keep is None:
            break
        dropped = set()
        for image, places in enumerate(visible):
            here = [int((rows == place).nonzero()) for place in places]
            score = p[:, row, here].mean(0)
            best = sorted(score.argsort(descending=True)[:keep].tolist())
            dropped |= set(places) - {places[i] for i in best}
            visible[image] = [places[i] for i in best]
        left = torch.tensor([i for i, place in enumerate(rows.tolist()) if place not in dropped])
        x, rows = x[left], rows[left]
    return model.model.norm(x), rows


@pytest.mark.parametrize("stages", [[(2, 3)], [(1, 4), (2, 2), (3, 1)]], ids=["FastV", "PyramidDrop"])
def test_equals_the_transcription_sequence_by_sequence(stages):
    model, (x, positions, bounds, visual) = language(), batch()
    reduction = Reduction([(layer, TopK(keep, scorer="last_row")) for layer, keep in stages], visual)
    out = run(model, x, positions, bounds, reduction)
    assert len(out) == len(reduction.rows) == int(reduction.cu_seqlens[-1])
    own = {0: [(1, 6)], 1: [], 2: [(1, 4), (7, 5)]}
    for s, images in own.items():
        a, b = int(bounds[s]), int(bounds[s + 1])
        want, rows = transcription(model, x[a:b], positions[a:b], images, stages)
        c, d = reduction.cu_seqlens[s : s + 2].tolist()
        torch.testing.assert_close(out[c:d], want)
        assert torch.equal(reduction.rows[c:d], rows + a)


def test_all_tokens_kept_is_the_plain_model():
    model, (x, positions, bounds, visual) = language(), batch()
    reduction = Reduction([(2, TopK(1.0, scorer="last_row"))], visual)
    assert torch.equal(run(model, x, positions, bounds, reduction), run(model, x, positions, bounds))


@pytest.mark.parametrize("position", ["keep", "calibrate"])
def test_decoding_with_a_cache_equals_running_everything(position):
    model, (x, positions, bounds, visual) = language(), batch()
    new = torch.randn(3, 3, 16, dtype=torch.float64)  # (S, steps, D)
    cache = model.new_cache(3, 20)
    kind = [(1, TopK(3, scorer="last_row", position=position)), (2, TopK(2, scorer="last_row", position=position))]
    with torch.no_grad():
        run(model, x, positions, bounds, Reduction(kind, visual), cache)
        assert cache.lengths == list(COUNTS)
        assert [keys.shape[2] for keys in cache.keys] == [20] * 4  # the text-only sequence loses nothing
        for step in range(3):
            after = torch.tensor(cache.next_positions)
            got = model(new[:, step], after, torch.arange(4, dtype=torch.int32), 1, cache)
            pieces, places, index, at = [], [], [], 0
            for s, n in enumerate(COUNTS):
                pieces += [x[bounds[s] : bounds[s + 1]], new[s, : step + 1]]
                places.append(torch.arange(n + step + 1))
                index += [at + row - int(bounds[s]) for row in VISIBLE if bounds[s] <= row < bounds[s + 1]]
                at += n + step + 1
            counts = [n + step + 1 for n in COUNTS]
            ends = torch.tensor([0, *counts]).cumsum(0).int()
            asking = torch.zeros(sum(counts)).index_fill(0, ends[:-1].long() + torch.tensor(COUNTS) - 1, 1.0)
            whole = VisualRows(index=torch.tensor(index), seqlens=visual.seqlens, owners=visual.owners,
                               counts=tuple(counts), asking=asking)  # fmt: skip
            reduction = Reduction(kind, whole)
            want = run(model, torch.cat(pieces), torch.cat(places), ends, reduction)
            torch.testing.assert_close(got, want[reduction.cu_seqlens[1:].long() - 1])
        kept = cache.select([2, 0])
        again = model(new[[2, 0], 0], torch.tensor(kept.next_positions), torch.arange(3, dtype=torch.int32), 1, kept)
        both = model(new[:, 0], torch.tensor(cache.next_positions), torch.arange(4, dtype=torch.int32), 1, cache)
        torch.testing.assert_close(again, both[[2, 0]])


def test_later_layers_cache_what_is_left():
    model, (x, positions, bounds, visual) = language(), batch((11, 13), ((1, 6), (12, 4), (18, 5)))
    cache = model.new_cache(2, 16)
    with torch.no_grad():
        run(model, x, positions, bounds, Reduction([(2, TopK(2, scorer="last_row"))], visual), cache)
    assert [keys.shape[2] for keys in cache.keys] == [16, 16, 12, 12]  # at least four are dropped of each
    assert cache.next_positions == [11, 13]


def test_training_scores_by_the_prompt_and_carries_the_labels():
    model = language()
    x, positions, bounds, visual = batch(prompts=(8, 9, 12, 26, 27))
    assert visual.asking.nonzero().flatten().tolist() == [8, 12, 26]
    assert visual.text.nonzero().flatten().tolist() == [0, 7, 8, 11, 12, 14, 15, 20, 21]  # no images, no answers
    labels = torch.arange(28) % 31
    labels[VISIBLE[:-1]] = -100  # behind the last image its text follows at once: its last row predicts it
    reduction = Reduction([(1, TopK(2, scorer="last_row"))], visual, labels)
    out = run(model, x, positions, bounds, reduction)
    changed = x.clone()
    changed[[9, 10, 13, 14, 27]] += 1  # answers: what is kept does not depend on them
    other = Reduction([(1, TopK(2, scorer="last_row"))], visual, labels)
    run(model, changed, positions, bounds, other)
    assert torch.equal(reduction.rows, other.rows)
    targets = reduction.labels[reduction.labels != -100]
    assert torch.equal(targets, labels[labels != -100])
    last = reduction.visual.index[-1]
    assert reduction.labels[last] == labels[VISIBLE[-1]]
    out.square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "embed" not in name and "head" not in name)


def test_merged_tokens_weigh_what_they_stand_for():
    model, (x, positions, bounds, visual) = language(), batch((9,), ((1, 6),))
    x[1:7] = x[1]  # six equal tokens at one position merge into one of the same value and six times the weight
    positions[1:7] = 3
    reduction = Reduction([(2, BipartiteMerge(1))], visual)
    whole = run(model, x, positions, bounds)
    merged = run(model, x, positions, bounds, reduction)
    torch.testing.assert_close(reduction.key_bias.exp().float(), torch.tensor([1.0, 6.0, 1.0, 1.0]))
    assert len(merged) == 4
    assert not torch.allclose(whole[-1], merged[-1])  # the layers in front saw six tokens that differ by then
    reduction = Reduction([(0, BipartiteMerge(1))], visual)
    first = run(model, x, positions, bounds, reduction)
    single = torch.cat([x[:1], x[6:]])
    p = torch.cat([positions[:1], positions[6:]])
    bias = torch.tensor([1.0, 6.0, 1.0, 1.0], dtype=torch.float64).log()
    want, _ = dense(model, single, p, causal(4) + bias, model.model.layers)
    torch.testing.assert_close(first, model.model.norm(want))


def test_positions_are_renumbered_in_front_of_the_first_layer_alone():
    model, (x, positions, bounds, visual) = language(), batch((9,), ((1, 6),))
    reduction = Reduction([(0, TopK(2, scorer="norm", position="renumber"))], visual)
    cache = model.new_cache(1, 12)
    with torch.no_grad():
        out = run(model, x, positions, bounds, reduction, cache)
    assert cache.next_positions == [5]
    short = x[reduction.rows]
    torch.testing.assert_close(out, run(model, short, torch.arange(5), torch.tensor([0, 5], dtype=torch.int32)))


def test_a_sequence_does_not_depend_on_its_neighbours():
    model, (x, positions, bounds, visual) = language(), batch()
    stages = [(1, TopK(0.75, scorer="text_rows")), (3, TopK(2, scorer="received"))]
    together = Reduction(stages, visual)
    out = run(model, x, positions, bounds, together)
    alone = VisualRows(index=torch.arange(1, 7), seqlens=(6,), owners=(0,), counts=(11,))
    single = Reduction(stages, alone)
    got = run(model, x[:11], positions[:11], bounds[:2], single)
    torch.testing.assert_close(got, out[: len(got)])
    assert torch.equal(single.rows, together.rows[: len(got)])


def test_what_does_not_fit_is_refused():
    model, (x, positions, bounds, visual) = language(), batch()
    with pytest.raises(ValueError, match="layers \\[2, 1\\] must ascend"):
        Reduction([(2, TopK(1)), (1, TopK(1))], visual)
    with pytest.raises(ValueError, match="in front of layer 0 there is none"):
        Reduction([(0, TopK(1))], visual)
    with pytest.raises(ValueError, match="renumbers positions in front of layer 1"):
        Reduction([(1, TopK(1, position="renumber"))], visual)
    with pytest.raises(ValueError, match="layer 4, the model has 4"):
        run(model, x, positions, bounds, Reduction([(4, TopK(1))], visual))
    with pytest.raises(ValueError, match="no square grid"):
        run(model, x, positions, bounds, Reduction([(1, Pool(1))], visual))
    with pytest.raises(ValueError, match="do not fit images"):
        VisualRows(index=torch.arange(3), seqlens=(2,), owners=(0,), counts=(5,))
    slides = language(sliding_window=4)
    with pytest.raises(ValueError, match="full sliding window"):
        run(slides, x, positions, bounds, Reduction([(2, TopK(1))], visual))


@pytest.mark.parametrize("name", [name for name, line in PUBLISHED.items() if line["at"].startswith("language")])
def test_published_methods_run_inside_of_a_decoder(name):
    model, (x, positions, bounds, visual) = language(depth=25), batch()
    keep = (4, 2, 1) if "/" in PUBLISHED[name]["at"] else 2
    options = {"share": 1} if name == "DART" else {}
    reduction = Reduction(placement(name, keep, **options).stages, visual)
    out = run(model, x, positions, bounds, reduction)
    last = keep[-1] if isinstance(keep, tuple) else keep
    assert reduction.visual.seqlens == (last,) * 3
    assert len(out) == len(x) - len(VISIBLE) + 3 * last


def test_compiles_whole():
    model, (x, positions, bounds, visual) = language(), batch()

    def call(x, positions, bounds):
        reduction = Reduction([(1, BipartiteMerge(4)), (2, TopK(3, scorer="last_row"))], visual)
        return model(x, positions, bounds, max(COUNTS), None, reduction=reduction), reduction.rows

    want = call(x, positions, bounds)
    got = torch.compile(call, fullgraph=True, backend="aot_eager")(x, positions, bounds)
    torch.testing.assert_close(got[0], want[0])
    assert torch.equal(got[1], want[1])


@pytest.mark.parametrize(
    "compressor", [Pool(9), Pool(4, interpolation="bilinear"), DominantContextual(5, merge="neighbours", contextual=2)]
)
def test_mixtures_go_into_the_decoder_as_they_are(compressor):
    model, (x, positions, _, visual) = language(), batch((19,), ((2, 16),))
    visual = replace(visual, grid=((1, 4, 4),))
    layer = 0 if compressor.layer is None else 2
    seen = []
    compressor.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    reduction = Reduction([(layer, compressor)], visual)
    x, _, _ = reduction.apply(layer, x, positions, _probe(model, 19) if layer else None)
    torch.testing.assert_close(x[reduction.visual.index], seen[0].x)


def _probe(model, n):
    q = torch.randn(n, 4, 4, dtype=torch.float64)
    k, starts = torch.randn(n, 2, 4, dtype=torch.float64), torch.tensor([0, n], dtype=torch.int32)
    lse = torch.zeros(4, n, dtype=torch.float64)
    return Probe(q=q, k=k, lse=lse, cu_seqlens=starts, max_seqlen=n, causal=True, cls_token=True)


def test_learned_positions_are_those_of_what_is_left():
    model = language(learned_positions=True, max_positions=64)
    x, positions, bounds, visual = batch((9,), ((1, 6),))
    reduction = Reduction([(0, TopK(2, scorer="norm", position="renumber"))], visual)
    out = run(model, x, positions, bounds, reduction)
    short = torch.tensor([0, 5], dtype=torch.int32)
    torch.testing.assert_close(out, run(model, x[reduction.rows], torch.arange(5), short))


def test_labels_fall_to_the_last_row_whatever_the_order_of_the_plan():
    class Backwards(TopK):
        def reduce(self, tokens, evidence, budgets):
            return take(tokens, torch.tensor([4, 1]), budgets)

    model, (x, positions, bounds, visual) = language(), batch((9,), ((1, 6),))
    labels = torch.full((9,), -100)
    labels[6] = 7  # the last row of the image predicts the text behind it
    reduction = Reduction([(0, Backwards(2, scorer="norm"))], visual, labels)
    run(model, x, positions, bounds, reduction)
    assert reduction.rows.tolist() == [0, 2, 5, 7, 8]
    assert reduction.labels.tolist() == [-100, -100, 7, -100, -100]


def test_fractions_are_of_the_tokens_in_front_of_the_first_stage():
    model, (x, positions, bounds, visual) = language(), batch((9,), ((1, 5),))
    reduction = Reduction([(n, TopK(f, scorer="norm")) for n, f in ((1, 0.5), (2, 0.25), (3, 0.2))], visual)
    assert list(reduction.budgets.values()) == [(3,), (1,), (1,)]
    run(model, x, positions, bounds, reduction)
    with pytest.raises(ValueError, match=r"layer 2 .* are to be left of"):
        Reduction([(1, TopK(2, scorer="norm")), (2, TopK(3, scorer="norm"))], visual)


def test_text_goes_on_behind_an_image_that_ends_a_prompt():
    model = language(mrope_section=(1, 1, 0))
    x, _, bounds, visual = batch((7,), ((1, 6),))
    grid = torch.tensor([[1] * 6, [1, 1, 2, 2, 3, 3], [1, 2, 1, 2, 1, 2]])
    positions = torch.cat([torch.zeros(3, 1, dtype=torch.int64), grid], 1)
    cache = model.new_cache(1, 9)
    with torch.no_grad():
        model(x, positions, bounds, 7, cache, reduction=Reduction([(1, TopK(1, scorer="norm"))], visual))
    assert cache.next_positions == [4]


def test_every_question_counts_and_an_image_that_nobody_asks_about_is_seen_by_the_end():
    x, positions, bounds, visual = batch((16,), ((1, 4), (8, 4)), prompts=(6,))
    assert visual.asking.nonzero().flatten().tolist() == [6, 15]  # the answer stands in front of the second image
    model = language()
    reduction = Reduction([(1, TopK(2, scorer="last_row"))], visual)
    run(model, x, positions, bounds, reduction)
    assert reduction.rows.tolist() != [0, 1, 2, 5, 6, 7, 8, 9, 12, 13, 14, 15]  # not just the first of each


def test_a_decoder_has_no_class_token():
    model, (x, positions, bounds, visual) = language(), batch()
    with pytest.raises(ValueError, match="there is no class token"):
        run(model, x, positions, bounds, Reduction([(2, TopK(2))], visual))


def test_nothing_waits_for_the_device():
    model, (x, positions, bounds, visual) = language(), batch()
    asking = torch.zeros(len(x))
    visual = replace(visual, index=visual.index.to("meta"), asking=asking.to("meta"))
    reduction = Reduction([(1, BipartiteMerge(4)), (2, TopK(3, scorer="last_row"))], visual, positions.to("meta"))
    out = model.to("meta")(x.to("meta"), positions.to("meta"), bounds.to("meta"), max(COUNTS), reduction=reduction)
    assert len(out) == len(x) - len(VISIBLE) + 9


def test_recomputed_layers_see_the_same_rows():
    gradients = []
    for recompute in (False, True):
        model, (x, positions, bounds, visual) = language(), batch()
        model.gradient_checkpointing = recompute
        stages = [(1, TopK(4, scorer="last_row", position="calibrate")), (2, BipartiteMerge(2))]
        run(model, x, positions, bounds, Reduction(stages, visual)).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)
