"""The Q-Former against transformers' BLIP-2 and InstructBLIP, and its three masks against dense ones in fp64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, InstructBlipQFormerConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2TextEmbeddings
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from fastmllm.models.weights.connectors import qformer_rules, read_qformer
from fastmllm.models.weights.mapping import fill, to_ours, to_theirs
from fastmllm.modules.qformer import ImageTokens, PackedText, QFormer, QFormerConfig

Q, D, DEPTH, MEDIA, VOCAB = 5, 24, 3, 20, 40
RAW = {
    "hidden_size": D, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 36,
    "encoder_hidden_size": MEDIA, "vocab_size": VOCAB, "max_position_embeddings": 16,
}  # fmt: skip
IMAGES, TEXTS = [4, 7, 4], [3, 1, 6]


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


class Oracle(nn.Module):
    """A transformers Q-Former with the query tokens and embeddings that its checkpoint keeps beside it."""

    def __init__(self, instruct: bool, text: bool) -> None:
        super().__init__()
        config = (
            InstructBlipQFormerConfig(**RAW) if instruct else Blip2QFormerConfig(**RAW, use_qformer_text_input=text)
        )
        config._attn_implementation = "eager"
        self.qformer = InstructBlipQFormerModel(config) if instruct else Blip2QFormerModel(config)
        self.query_tokens = nn.Parameter(torch.empty(1, Q, D))
        if text and not instruct:
            self.embeddings = Blip2TextEmbeddings(config)
        torch.manual_seed(1)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.eval()


def build(instruct: bool = False, text: bool = True, dtype: torch.dtype = torch.float32) -> tuple[Oracle, QFormer]:
    oracle = Oracle(instruct, text).to(dtype)
    raw = RAW | {"model_type": "instructblip_qformer" if instruct else "blip_2_qformer", "use_qformer_text_input": text}
    model = QFormer(read_qformer(raw, Q)).to(dtype)
    rules = qformer_rules(model.config, instruct)
    ours, rest = to_ours(oracle.state_dict(), rules, "test")
    assert not rest
    fill(model, ours, "test")
    back = to_theirs(model.state_dict(), rules)
    assert back.keys() == oracle.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in oracle.state_dict().items())
    return oracle, model


def inputs(dtype: torch.dtype = torch.float32) -> tuple[ImageTokens, PackedText, list[Tensor], list[Tensor]]:
    torch.manual_seed(2)
    tokens = torch.randn(sum(IMAGES), MEDIA, dtype=dtype, requires_grad=True)
    ids = torch.randint(1, VOCAB, (sum(TEXTS),))  # the oracle gives its padding token 0 no gradient
    media = ImageTokens.of_images(tokens, bounds(IMAGES), max(IMAGES))
    text = PackedText(ids=ids, cu_seqlens=bounds(TEXTS), max_seqlen=max(TEXTS))
    return media, text, list(tokens.split(IMAGES)), list(ids.split(TEXTS))


def dense(oracle: Oracle, image: Tensor | None, ids: Tensor | None, mask: str) -> Tensor:
    """Run BLIP-2's oracle on one pair under a dense mask: rows are [queries; text]."""
    queries = oracle.query_tokens if image is not None else None
    embedded = queries if ids is None else oracle.embeddings(input_ids=ids[None], query_embeds=queries)
    num_queries, rows = (Q if image is not None else 0), embedded.shape[1]
    seen = torch.ones(rows, rows, dtype=torch.bool)
    if mask == "causal":
        seen[num_queries:, num_queries:].tril_()
    if mask != "bidirectional":
        seen[:num_queries, num_queries:] = False
    if mask == "unimodal":
        seen[num_queries:, :num_queries] = False
    additive = torch.zeros(1, 1, rows, rows, dtype=embedded.dtype).masked_fill(~seen, -torch.inf)
    encoder = None if image is None else image[None]
    return oracle.qformer(embedded, num_queries, additive, encoder_hidden_states=encoder).last_hidden_state[0]


def assert_equal(oracle: nn.Module, model: QFormer, y: Tensor, expected: Tensor, image: Tensor, instruct: bool) -> None:
    """Compare values, and gradients of all parameters under the checkpoint's names."""
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    seed = torch.randn_like(expected)
    mine, theirs = dict(model.named_parameters()), dict(oracle.named_parameters())
    image_got, *got = torch.autograd.grad([y], [image, *mine.values()], [seed], allow_unused=True)
    image_want, *want = torch.autograd.grad([expected], [image, *theirs.values()], [seed], allow_unused=True)
    got = [torch.zeros_like(p) if g is None else g for g, p in zip(got, mine.values(), strict=True)]
    named = to_theirs(dict(zip(mine, got, strict=True)), qformer_rules(model.config, instruct))
    largest = max(g.abs().max() for g in want if g is not None)
    assert (image_got - image_want).abs().max() <= 1e-4 * largest
    for name, gradient in zip(theirs, want, strict=True):
        other = torch.zeros_like(theirs[name]) if gradient is None else gradient
        assert (named[name] - other).abs().max() <= 1e-4 * largest, name


def test_equals_blip2_without_text() -> None:
    oracle, model = build(text=False)
    media, _, images, _ = inputs()
    expected = torch.cat([dense(oracle, image, None, "unimodal") for image in images])
    assert_equal(oracle, model, model(media), expected, media.tokens, False)


def test_equals_instructblip_with_padded_text() -> None:
    oracle, model = build(instruct=True)
    media, text, images, ids = inputs()
    width = max(TEXTS)
    padded = nn.utils.rnn.pad_sequence([*ids], batch_first=True)
    mask = torch.arange(width)[None] < torch.tensor(TEXTS)[:, None]
    mask = torch.cat([torch.ones(len(TEXTS), Q, dtype=torch.bool), mask], 1).long()
    pixels = nn.utils.rnn.pad_sequence(images, batch_first=True)
    seen = (torch.arange(max(IMAGES))[None] < torch.tensor(IMAGES)[:, None]).long()
    expected = oracle.qformer(
        padded, mask, query_embeds=oracle.query_tokens.expand(len(TEXTS), -1, -1),
        encoder_hidden_states=pixels, encoder_attention_mask=seen,
    ).last_hidden_state[:, :Q].flatten(0, 1)  # fmt: skip
    assert_equal(oracle, model, model(media, text), expected, media.tokens, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_three_masks_equal_dense_ones(dtype: torch.dtype) -> None:
    oracle, model = build(dtype=dtype)
    media, text, images, ids = inputs(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for mask in ("unimodal", "bidirectional", "causal"):
        expected = [dense(oracle, image, words, mask) for image, words in zip(images, ids, strict=True)]
        queries, kept = model.encode_images(media, keep=mask == "causal")
        if mask == "bidirectional":
            queries, words = model(media, text), None
        else:
            words = model.encode_text(text, kept)
        want = torch.cat([rows[:Q] for rows in expected])
        assert (queries - want).abs().max() <= tolerance * want.abs().max(), mask
        if words is not None:
            want = torch.cat([rows[Q:] for rows in expected])
            assert (words - want).abs().max() <= tolerance * want.abs().max(), mask
        if mask == "causal":
            y, expected_all = torch.cat([queries, words]), torch.cat([*(r[:Q] for r in expected), want])
            assert_equal(oracle, model, y, expected_all, media.tokens, False)


def test_text_alone_is_a_bert() -> None:
    oracle, model = build()
    _, text, _, ids = inputs()
    expected = torch.cat([dense(oracle, None, words, "unimodal") for words in ids])
    torch.testing.assert_close(model.encode_text(text), expected, rtol=1e-5, atol=1e-5)


def test_pairs_may_share_an_image() -> None:
    """ITM's positive and negative pairs see one image: its keys are projected once and its gradients add up."""
    _, model = build(dtype=torch.float64)
    media, text, _, _ = inputs(torch.float64)
    index = torch.tensor([1, 2, 1])
    shared = ImageTokens(tokens=media.tokens, start=media.start[index], stop=media.stop[index], max_tokens=7)
    copied = torch.cat([media.tokens.split(IMAGES)[i] for i in index.tolist()])
    y = model(shared, text)
    other = model(ImageTokens.of_images(copied, bounds([IMAGES[i] for i in index.tolist()]), 7), text)
    torch.testing.assert_close(y, other, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(y)
    got, want = (torch.autograd.grad([t], media.tokens, [seed])[0] for t in (y, other))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    assert not got[:4].any()


def test_packed_equals_each_pair_alone_and_neighbours_do_not_matter() -> None:
    _, model = build()
    media, text, images, ids = inputs()

    def run(tokens: Tensor, words: Tensor) -> Tensor:
        media_now = ImageTokens.of_images(tokens, bounds(IMAGES), 7)
        text_now = PackedText(ids=words, cu_seqlens=text.cu_seqlens, max_seqlen=6)
        queries, kept = model.encode_images(media_now, keep=True)
        return torch.stack([model(media_now, text_now), queries]), model.encode_text(text_now, kept)

    (joint, alone), caption = run(media.tokens, text.ids)
    for k, (a, b) in enumerate(pairwise(text.cu_seqlens.tolist())):
        one = ImageTokens.of_images(images[k], bounds([IMAGES[k]]), IMAGES[k])
        said = PackedText(ids=ids[k], cu_seqlens=bounds([TEXTS[k]]), max_seqlen=TEXTS[k])
        torch.testing.assert_close(joint[k * Q : k * Q + Q], model(one, said), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(caption[a:b], model.encode_text(said, model.encode_images(one, True)[1]),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
    tokens, words = media.tokens.detach().clone(), text.ids.clone()
    tokens[:4] += 1.0
    words[:3] = (words[:3] + 1) % VOCAB
    (joint_now, alone_now), caption_now = run(tokens, words)
    assert torch.equal(joint_now[Q:], joint[Q:])
    assert torch.equal(alone_now[Q:], alone[Q:])
    assert torch.equal(caption_now[3:], caption[3:])
    assert not torch.equal(joint_now[:Q], joint[:Q])


def test_a_later_token_never_moves_an_earlier_caption_row() -> None:
    _, model = build()
    media, text, _, _ = inputs()
    kept = model.encode_images(media, keep=True)[1]
    words = text.ids.clone()
    words[-1] = (words[-1] + 1) % VOCAB
    y, other = (
        model.encode_text(PackedText(ids=i, cu_seqlens=text.cu_seqlens, max_seqlen=6), kept) for i in (text.ids, words)
    )
    assert torch.equal(y[:-1], other[:-1])
    assert not torch.equal(y[-1], other[-1])


def test_rows_behind_the_last_text_are_padding() -> None:
    _, model = build()
    media, text, _, _ = inputs()
    padded = PackedText(ids=torch.cat([text.ids, text.ids]), cu_seqlens=text.cu_seqlens, max_seqlen=6)
    kept = model.encode_images(media, keep=True)[1]
    torch.testing.assert_close(model(media, padded), model(media, text))
    torch.testing.assert_close(model.encode_text(padded, kept)[: sum(TEXTS)], model.encode_text(text, kept))


def test_no_images() -> None:
    _, model = build()
    none = ImageTokens.of_images(torch.zeros(0, MEDIA), bounds([]), 0)
    assert model(none).shape == (0, D)
    assert model(none, PackedText(ids=torch.zeros(0, dtype=torch.long), cu_seqlens=bounds([]), max_seqlen=0)).shape == (
        0,
        D,
    )


def test_bfloat16_follows_float32() -> None:
    _, model = build()
    media, text, _, _ = inputs()
    expected = model(media, text)
    half = ImageTokens(tokens=media.tokens.bfloat16(), start=media.start, stop=media.stop, max_tokens=7)
    y = model.bfloat16()(half, text)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_published_defaults() -> None:
    assert read_qformer({}) == QFormerConfig()
    assert read_qformer({"model_type": "instructblip_qformer"}) == QFormerConfig(vocab_size=30522)
    assert read_qformer({}, text=True).vocab_size == 30522


def test_rejects_what_does_not_fit() -> None:
    _, model = build()
    media, text, _, _ = inputs()
    with pytest.raises(ValueError, match="hidden_act 'relu'"):
        read_qformer({"hidden_act": "relu"})
    with pytest.raises(ValueError, match="position_embedding_type 'relative_key'"):
        read_qformer({"position_embedding_type": "relative_key"})
    with pytest.raises(ValueError, match="num_heads 5"):
        QFormerConfig(num_heads=5)
    with pytest.raises(ValueError, match="depth"):
        QFormerConfig(depth=0)
    with pytest.raises(ValueError, match="packed"):
        model(ImageTokens(tokens=media.tokens[None], start=media.start, stop=media.stop, max_tokens=7))
    with pytest.raises(ValueError, match="3 media ranges for 1 texts"):
        model(media, PackedText(ids=text.ids, cu_seqlens=bounds([10]), max_seqlen=10))
    with pytest.raises(ValueError, match="max_positions 16"):
        model.encode_text(PackedText(ids=text.ids, cu_seqlens=text.cu_seqlens, max_seqlen=17))
    with pytest.raises(ValueError, match="1 layers of queries"):
        model.encode_text(text, [torch.zeros(1)])
    with pytest.raises(ValueError, match="vocab_size is 0"):
        build(text=False)[1].encode_text(text)
