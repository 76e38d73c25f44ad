"""Inserted layers: where they run, what they see, what is projected once; DeepStack against transformers' Qwen3-VL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastmllm.models.language import LanguageConfig, LanguageModel
from fastmllm.models.media import Deepstack, Media
from fastmllm.ops import cross_attention, media_ranges

DEPTH, WIDTH, MEDIA_WIDTH, HEADS, HEAD_DIM = 3, 32, 20, 2, 8
LENGTHS = (9, 4, 6)
IMAGES = {2: 5, 6: 3, 14: 4}  # row of the packed text: tokens of its image; the second sequence has none


class Look(nn.Module):
    """A cross-attention layer with a feed-forward branch, as small as the slots allow; counts its projections."""

    def __init__(self) -> None:
        super().__init__()
        inner = HEADS * HEAD_DIM
        self.q, self.kv = nn.Linear(WIDTH, inner), nn.Linear(MEDIA_WIDTH, 2 * inner)
        self.out, self.ffn = nn.Linear(inner, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.projected = self.ran = 0

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.projected += 1
        k, v = self.kv(tokens).view(len(tokens), 2, HEADS, HEAD_DIM).unbind(1)
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor, start: Tensor, stop: Tensor, max_tokens: int) -> Tensor:
        self.ran += 1
        q = self.q(x).view(len(x), HEADS, HEAD_DIM)
        x = x + self.out(cross_attention(q, k, v, start, stop, max_seqlen_k=max_tokens).flatten(1))
        return x + self.ffn(x).tanh()

    def dense(self, x: Tensor, media: Media) -> Tensor:
        """The same with a mask, in plain torch."""
        q = self.q(x).view(len(x), HEADS, HEAD_DIM)
        k, v = self.kv(media.tokens).view(-1, 2, HEADS, HEAD_DIM).unbind(1)
        place = torch.arange(len(media.tokens))
        hidden = (place < media.start[:, None]) | (place >= media.stop[:, None])
        scores = torch.einsum("thd,nhd->htn", q, k) / math.sqrt(HEAD_DIM)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num()  # rows that see nothing: zeros
        x = x + self.out(torch.einsum("htn,nhd->thd", weights, v).flatten(1))
        return x + self.ffn(x).tanh()


def tiny(before: tuple[int, ...] = (0, 2, DEPTH), inside: tuple[int, ...] = (1, 2)) -> LanguageModel:
    torch.manual_seed(0)
    config = LanguageConfig(
        vocab_size=50, width=WIDTH, depth=DEPTH, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=40
    )
    model = LanguageModel(config).eval()
    for layer in before:
        model.cross_layers[str(layer)] = Look()
    for layer in inside:
        model.inner_layers[str(layer)] = Look()
    return model


def looks(model: LanguageModel) -> list[Look]:
    return [module for module in model.modules() if isinstance(module, Look)]


def batch() -> tuple[Tensor, Tensor, Tensor, int]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (sum(LENGTHS),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    return ids, positions, torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32), max(LENGTHS)


def some_media(starts: Tensor, gated: bool = False, **change: object) -> Media:
    tokens = torch.randn(sum(IMAGES.values()), MEDIA_WIDTH, generator=torch.Generator().manual_seed(2))
    is_media = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    is_media[list(IMAGES)] = True
    bounds = torch.tensor([0, *IMAGES.values()]).cumsum(0).to(torch.int32)
    start, stop = media_ranges(is_media, starts, bounds)
    gate = stop > start if gated else None
    fields = {"tokens": tokens, "start": start, "stop": stop, "max_tokens": 5, "gate": gate}
    return Media(**(fields | change))


def run(model: LanguageModel, media: Media | None = None) -> Tensor:
    ids, positions, starts, longest = batch()
    return model(model.embed(ids).detach(), positions, starts, longest, media=media)


def test_without_media_the_slots_change_no_bit() -> None:
    model, plain = tiny(), tiny((), ())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "_layers" not in k})
    assert torch.equal(run(model), run(plain))
    assert set(plain.state_dict()) == {k for k in model.state_dict() if "_layers" not in k}
    assert not any(look.ran for look in looks(model))


@pytest.mark.parametrize("gated", [False, True])
def test_slots_stand_before_inside_and_behind_the_layers(gated: bool) -> None:
    model = tiny()
    ids, positions, starts, longest = batch()
    media, context = some_media(starts, gated), model._context(positions, starts, longest, None, 0, None, None)

    def shown(look: nn.Module, x: Tensor) -> Tensor:
        assert isinstance(look, Look)
        y = look.dense(x, media)
        return torch.where(media.gate[:, None], y, x) if gated else y

    expected = model.embed(ids)
    for index, layer in enumerate(model.model.layers):
        if index != 1:
            expected = shown(model.cross_layers[str(index)], expected)
        expected = expected + layer.self_attn(layer.input_layernorm(expected), context)
        if index:
            expected = shown(model.inner_layers[str(index)], expected)
        expected = expected + layer.mlp(layer.post_attention_layernorm(expected))
    expected = model.model.norm(shown(model.cross_layers[str(DEPTH)], expected))
    hidden = run(model, media)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(hidden[:2], run(model)[:2]) or gated  # the feed-forward runs where nothing is seen
    if gated:  # a sequence without an image is the plain decoder's, bit for bit
        assert torch.equal(hidden[9:13], run(model)[9:13])
    hidden.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for look in looks(model) for p in look.parameters())


def test_packed_equals_unpacked_and_a_later_image_moves_no_earlier_row() -> None:
    model = tiny()
    ids, _, starts, _ = batch()
    media = some_media(starts)
    whole = run(model, media)
    for begin, end, first in ((0, 9, 0), (9, 13, 8), (13, 19, 8)):
        own = slice(begin, end)
        alone = Media(
            tokens=media.tokens[first:], start=media.start[own] - first, stop=media.stop[own] - first, max_tokens=5
        )
        bounds = torch.tensor([0, end - begin], dtype=torch.int32)
        got = model(model.embed(ids[own]), torch.arange(end - begin), bounds, end - begin, media=alone)
        torch.testing.assert_close(got, whole[own])
    changed = media.tokens.clone()
    changed[5:8] += 1  # the second image, at row 6
    moved = run(model, some_media(starts, tokens=changed))
    assert torch.equal(moved[:6], whole[:6])
    assert torch.equal(moved[9:], whole[9:])
    assert (moved[6:9] != whole[6:9]).any(-1).all()


@pytest.mark.parametrize("gated", [False, True])
@torch.no_grad()
def test_decoding_projects_the_media_once_and_equals_one_call(gated: bool) -> None:
    model = tiny()
    ids, positions, starts, longest = batch()
    new = torch.randint(0, 50, (3, 3), generator=torch.Generator().manual_seed(3))
    cache, media = model.new_cache(3, longest + 3), some_media(starts, gated)
    model(model.embed(ids), positions, starts, longest, cache, media=media)
    seen, found, kept = media.at((starts[1:] - 1).long()), [], [0, 1, 2]
    for step in range(3):
        if step == 2:  # the second sequence ends
            kept = [0, 2]
            cache, seen = cache.select(kept), seen.at(torch.tensor(kept))
        bounds = torch.arange(len(kept) + 1, dtype=torch.int32)
        places = torch.tensor(cache.next_positions)
        seen.tokens = None  # nothing reads them again
        found.append(model(model.embed(new[kept, step]), places, bounds, 1, cache, media=seen))
    assert [look.projected for look in looks(model)] == [1] * len(looks(model))
    assert set(media.kv) == {0, 2, 3, ~1, ~2}

    fresh, begin = some_media(starts, gated), 0
    for row, length in enumerate(LENGTHS):
        own = torch.tensor([*range(begin, begin + length), *[begin + length - 1] * 3])  # new rows see what the last saw
        sequence = torch.cat([ids[begin : begin + length], new[row]])
        bounds = torch.tensor([0, length + 3], dtype=torch.int32)
        media = fresh.at(own)
        whole = model(model.embed(sequence), torch.arange(length + 3), bounds, length + 3, media=media)
        for step in range(3 if row != 1 else 2):
            place = row if step < 2 else row // 2
            torch.testing.assert_close(found[step][place], whole[length + step])
        begin += length


def test_checkpointing_recomputes_every_layer_and_changes_nothing() -> None:
    results = []
    for recompute in (False, True):
        model = tiny()
        model.gradient_checkpointing = recompute
        media = some_media(batch()[2])
        media.tokens.requires_grad_()
        run(model, media).square().sum().backward()
        assert not media.kv  # under autograd nothing is kept: a second step must not meet the first one's graph
        assert [look.ran for look in looks(model)] == [1 + recompute] * len(looks(model))
        results.append(
            [media.tokens.grad, *(p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None)]
        )
    assert results[0][0].abs().max() > 0
    assert len(results[0]) == len(results[1]) > 30
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_training_ignores_keys_and_values_of_an_evaluation() -> None:
    model, media = tiny(), some_media(batch()[2])
    with torch.no_grad():
        before = run(model, media)
        for look in looks(model):
            look.kv.weight.mul_(1.5)
        assert torch.equal(run(model, media), before)  # kept
    after = run(model, media)
    assert not torch.allclose(after, before)
    after.sum().backward()
    assert all(look.kv.weight.grad is not None for look in looks(model))


def test_media_of_no_tokens_and_bf16_run() -> None:
    starts = batch()[2]
    none = torch.zeros(sum(LENGTHS), dtype=torch.int32)
    empty = Media(tokens=torch.zeros(0, MEDIA_WIDTH), start=none, stop=none, max_tokens=0, gate=none.bool())
    assert torch.equal(run(tiny(), empty), run(tiny()))
    model, media = tiny().bfloat16(), some_media(starts)
    exact = run(tiny(), media).detach()
    media.tokens = media.tokens.bfloat16()
    result = run(model, media)
    assert result.dtype == torch.bfloat16
    assert (result.float() - exact).norm() < 3e-2 * exact.norm()


def test_rejects_what_does_not_fit() -> None:
    starts = batch()[2]
    media = some_media(starts)
    with pytest.raises(ValueError, match="nothing looks at them"):
        run(tiny((), ()), media)
    with pytest.raises(ValueError, match="there is no layer 4"):
        run(tiny((4,), ()), media)
    with pytest.raises(ValueError, match="there is no layer 3"):
        run(tiny((), (3,)), media)
    with pytest.raises(ValueError, match=r"2 text rows, but there are 19: `Media\.at`"):
        run(tiny(), media.at(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="neither tokens nor keys and values of layer 0"):
        run(tiny(), some_media(starts, tokens=None))
    with pytest.raises(ValueError, match="must all name"):
        some_media(starts, stop=media.stop[1:])
    with pytest.raises(ValueError, match="bool"):
        some_media(starts, gate=media.start)
    with pytest.raises(ValueError, match=r"packed \(N, Dm\)"):
        some_media(starts, tokens=media.tokens[None])
    with pytest.raises(ValueError, match="must name the rows"):
        Deepstack(tokens=(torch.zeros(2, WIDTH),), index=torch.zeros(3, dtype=torch.int64))
    deep = Deepstack(tokens=(torch.zeros(2, WIDTH),) * 4, index=torch.tensor([0, 1]))
    ids, positions, starts, longest = batch()
    with pytest.raises(ValueError, match="deepstack for 4 layers, the model has 3"):
        tiny()(torch.zeros(len(ids), WIDTH), positions, starts, longest, deepstack=deep)


@pytest.mark.parametrize("recompute", [False, True])
def test_deepstack_equals_transformers(recompute: bool) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_vl.modeling_qwen3_vl")
    from fastmllm.models.weights.language import DECODER_RULES, language_config
    from fastmllm.models.weights.mapping import prefixed, to_ours

    raw = {
        "vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": 40, "num_hidden_layers": DEPTH,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    torch.manual_seed(0)
    theirs = modeling.Qwen3VLTextModel(modeling.Qwen3VLTextConfig(**raw, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    mine = LanguageModel(language_config(theirs.config.to_dict(), "here"))
    state, _ = to_ours(theirs.state_dict(), prefixed(DECODER_RULES, ours="model."), "here")
    mine.load_state_dict(state, strict=False)
    mine.gradient_checkpointing = recompute
    ids, positions, starts, longest = batch()
    index = torch.tensor([1, 2, 3, 14, 15])
    features = [torch.randn(5, WIDTH, requires_grad=True) for _ in range(2)]
    deepstack = Deepstack(tokens=tuple(features), index=index)
    hidden = mine(mine.embed(ids), positions, starts, longest, deepstack=deepstack)
    probe = torch.randn_like(hidden)
    (hidden * probe).sum().backward()
    found = [feature.grad.clone() for feature in features]

    parts, begin = [], 0
    for length in LENGTHS:
        own = slice(begin, begin + length)
        inside = (index >= begin) & (index < begin + length)
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[0, index[inside] - begin] = True
        kept = [feature[inside] for feature in features]
        out = theirs(input_ids=ids[own][None], visual_pos_masks=mask, deepstack_visual_embeds=kept)
        parts.append(out.last_hidden_state[0])
        begin += length
    expected = torch.cat(parts)
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.allclose(hidden[1:4], mine(mine.embed(ids), positions, starts, longest)[1:4])
    for feature in features:
        feature.grad = None
    (expected * probe).sum().backward()
    for feature, gradient in zip(features, found, strict=True):
        assert (feature.grad - gradient).abs().max() <= 1e-4 * feature.grad.abs().max()
