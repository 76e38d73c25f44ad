"""BLIP-2's first stage against its formulas in fp64, pair by pair, against transformers' heads, and on two ranks."""

from __future__ import annotations

import pytest
import ranks
import torch
import torch.nn.functional as F
from qformer_pairs import BOS, CONFIG, TEXTS, VOCAB, D, Q, batch, bounds, model
from torch import Tensor, nn
from transformers import Blip2Config, Blip2ForImageTextRetrieval

from fastmllm.models.weights.connectors import qformer_rules
from fastmllm.models.weights.mapping import Rule, prefixed, to_ours
from fastmllm.modules.qformer import ImageTokens, PackedText, QFormer
from fastmllm.modules.qformer_losses import QFormerPretraining, hard_negatives


def one(trained: QFormerPretraining, image: Tensor, ids: Tensor) -> tuple[ImageTokens, PackedText]:
    return (ImageTokens.of_images(image, bounds([len(image)]), len(image)),
            PackedText(ids=ids, cu_seqlens=bounds([len(ids)]), max_seqlen=len(ids)))  # fmt: skip


def draw(weights: Tensor, uniform: float) -> int:
    """Pick by walking along the weights."""
    mark = uniform * weights.sum()
    for k, weight in enumerate(weights):
        mark -= weight
        if mark < 0:
            return k
    raise AssertionError


def transcription(
    trained: QFormerPretraining, media: ImageTokens, text: PackedText, image_ids: Tensor, seed: int
) -> list[Tensor]:
    """Restate the paper's and LAVIS' losses for one rank: loops over pairs, dense targets, all logits.

    ITC: the best query's similarity over the temperature, soft targets. ITM: positive, other image, other text; the
    logits' mean over queries. ITG: next token under label smoothing, [CLS] replaced by the token that starts writing.
    """
    qformer, pairs, smoothing = trained.qformer, len(image_ids), trained.smoothing
    images = media.tokens.split([b - a for a, b in zip(media.start.tolist(), media.stop.tolist(), strict=True)])
    texts = text.ids.split(text.cu_seqlens.diff().tolist())
    both = [one(trained, image, ids) for image, ids in zip(images, texts, strict=True)]
    features = [F.normalize(trained.image_proj(qformer.encode_images(m)[0]), dim=1) for m, _ in both]  # (Q, E)
    words = [F.normalize(trained.text_proj(qformer.encode_text(t)[0]), dim=0) for _, t in both]  # (E,)
    alike = torch.stack([torch.stack([(f @ w).max() for w in words]) for f in features]) / trained.temperature

    itc = torch.zeros((), dtype=alike.dtype)
    for logits in (alike, alike.t()):
        for k in range(pairs):
            same = (image_ids == image_ids[k]).double()
            target = (1 - smoothing) * same / same.sum() + smoothing / pairs
            itc = itc - (target * logits[k].log_softmax(0)).sum() / pairs / 2

    uniform = torch.rand(2, pairs, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rows = [(k, k, 1) for k in range(pairs)]
    for k in range(pairs):
        chance = alike[:, k].exp() * (image_ids != image_ids[k])
        rows.append((draw(chance, uniform[0, k]), k, 0))
    for k in range(pairs):
        rows.append((k, draw(alike[k].exp() * (image_ids != image_ids[k]), uniform[1, k]), 0))
    itm = torch.zeros_like(itc)
    for image, caption, label in rows:
        logits = trained.itm_head(qformer(both[image][0], both[caption][1])).mean(0)
        itm = itm - logits.log_softmax(0)[label] / len(rows)

    head, total, count = trained.caption_head, torch.zeros_like(itc), 0
    for m, t in both:
        ids = t.ids.clone()
        ids[0] = BOS
        kept = qformer.encode_images(m, keep=True)[1]
        hidden = qformer.encode_text(PackedText(ids=ids, cu_seqlens=t.cu_seqlens, max_seqlen=t.max_seqlen), kept)
        scores = head.norm(F.gelu(head.transform(hidden))) @ qformer.word_embeddings.weight.t() + head.bias
        for row, label in zip(scores[:-1].log_softmax(1), t.ids[1:], strict=True):
            total = total - (1 - smoothing) * row[label] - smoothing * row.mean()
            count += 1
    return [itc, itm, total / count]


@pytest.mark.parametrize("distinct", [True, False])
def test_losses_and_gradients_equal_the_formulas(distinct: bool) -> None:
    trained = model(torch.float64)
    media, text, image_ids = batch(range(4), torch.float64)
    image_ids = torch.arange(4) if distinct else image_ids
    generator = torch.Generator().manual_seed(3)
    losses = trained(media, text, bos_token_id=BOS, generator=generator, image_ids=None if distinct else image_ids)
    expected = transcription(trained, media, text, image_ids, 3)
    inputs = [media.tokens, *trained.parameters()]
    for got, want in zip((losses.itc, losses.itm, losses.itg), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        gradients = [torch.autograd.grad(x, inputs, retain_graph=True, allow_unused=True) for x in (got, want)]
        for a, b in zip(*gradients, strict=True):
            assert (a is None or not a.any()) if b is None else torch.allclose(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(losses.total, sum(expected))


def test_everything_learns() -> None:
    trained = model(torch.float32)
    media, text, _ = batch(range(4), torch.float32)
    trained(media, text, bos_token_id=BOS, generator=torch.Generator().manual_seed(0)).total.backward()
    still = [name for name, p in trained.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    assert media.tokens.grad.any()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("ranks")
    return ranks.results("qformer_rank.py", 2, out, str((sum(TEXTS) - 4) / 2))


def test_two_ranks_are_one_with_all_pairs(two_ranks: list[dict[str, Tensor]]) -> None:
    """Ragged images and texts, one image on both ranks, negatives from both: losses and gradients are those of one."""
    trained = model(torch.float64)
    media, text, image_ids = batch(range(4), torch.float64)
    losses = trained(media, text, bos_token_id=BOS, generator=torch.Generator().manual_seed(5), image_ids=image_ids)
    losses.total.backward()
    expected = {"itc": losses.itc, "itm": losses.itm, "itg": losses.itg}
    expected |= {name: p.grad for name, p in trained.named_parameters()}
    for name, value in expected.items():
        for rank in two_ranks:
            torch.testing.assert_close(rank[name], value, rtol=1e-8, atol=1e-10, msg=name)
    # the gradient of a rank's images, over both ranks' losses, before the average
    tokens = torch.cat([rank["media"] for rank in two_ranks]) / 2
    torch.testing.assert_close(tokens, media.tokens.grad, rtol=1e-8, atol=1e-10)


def test_negatives_are_drawn_by_similarity_and_never_the_positive() -> None:
    torch.manual_seed(0)
    logits = torch.tensor([[9.0, 1.0, 0.0, 1.0], [0.0, 50.0, -800.0, 0.0]])
    same = torch.tensor([[True, False, False, False], [False, True, False, True]])
    uniform = torch.linspace(0, 1, 4001, dtype=torch.float64)[:-1]
    uniform = torch.cat([uniform, torch.tensor([1 - 2**-53], dtype=torch.float64)])
    for row, mask in zip(logits, same, strict=True):
        drawn = hard_negatives(row.expand(4001, -1), mask.expand(4001, -1), uniform)
        share = drawn.bincount(minlength=4) / 4001
        expected = row.masked_fill(mask, -torch.inf).softmax(0)
        torch.testing.assert_close(share, expected, rtol=0, atol=2e-3)
        assert not mask[drawn].any()


def test_heads_equal_transformers_retrieval() -> None:
    """Similarities and matching logits of Blip2ForImageTextRetrieval, behind its own image encoder."""
    torch.manual_seed(0)
    qformer = {
        "hidden_size": D, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
        "encoder_hidden_size": 10, "vocab_size": VOCAB, "max_position_embeddings": 8, "use_qformer_text_input": True,
    }  # fmt: skip
    vision = {"hidden_size": 10, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 4, "patch_size": 2}  # fmt: skip
    config = Blip2Config(vision_config=vision, qformer_config=qformer, num_query_tokens=Q, image_text_hidden_size=6,
                         image_token_index=None, attn_implementation="eager")  # fmt: skip
    oracle = Blip2ForImageTextRetrieval(config).eval()
    for parameter in oracle.parameters():
        nn.init.normal_(parameter, std=0.3)
    rules = prefixed(qformer_rules(CONFIG, instruct=False), ours="qformer.")
    rules += [Rule("image_proj.{p}", "vision_projection.{p}"), Rule("text_proj.{p}", "text_projection.{p}"),
              Rule("itm_head.{p}", "itm_head.{p}")]  # fmt: skip
    state, _ = to_ours(
        oracle.state_dict(), rules, "test", unused={n: None for n in oracle.state_dict() if "vision_m" in n}
    )
    trained = QFormerPretraining(QFormer(CONFIG), feature_width=6)
    missing, unexpected = trained.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.startswith(("caption_head", "temperature")) for name in missing)

    pixels, ids = torch.randn(3, 3, 4, 4), torch.randint(1, VOCAB, (3, 5))
    tokens = oracle.vision_model(pixels).last_hidden_state
    media = ImageTokens.of_images(tokens.flatten(0, 1), bounds([tokens.shape[1]] * 3), tokens.shape[1])
    text = PackedText(ids=ids.flatten(), cu_seqlens=bounds([5] * 3), max_seqlen=5)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = oracle(pixels, ids, mask, use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(trained.match(media, text), expected, rtol=1e-5, atol=1e-5)
        expected = oracle(pixels, ids, mask).logits_per_image
        images = trained.image_features(trained.qformer.encode_images(media)[0])
        texts = trained.text_features(trained.qformer.encode_text(text), text)
        torch.testing.assert_close((images @ texts.t()).amax(1), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_follows_float32() -> None:
    trained = model(torch.float32)
    arguments = {"bos_token_id": BOS}
    media, text, _ = batch(range(4), torch.float32)
    expected = trained(media, text, generator=torch.Generator().manual_seed(0), **arguments)
    media, _, _ = batch(range(4), torch.bfloat16)
    losses = trained.bfloat16()(media, text, generator=torch.Generator().manual_seed(0), **arguments)
    assert losses.itc.dtype == losses.itm.dtype == losses.itg.dtype == torch.float32
    assert losses.total.item() == pytest.approx(expected.total.item(), rel=0.1)


def test_the_caption_head_stays_the_embedding_table() -> None:
    trained = model(torch.float32)
    trained.load_state_dict({name: value.clone() for name, value in trained.state_dict().items()}, assign=True)
    trained.tie()
    assert trained.caption_head.weight is trained.qformer.word_embeddings.weight


def test_rejects_what_does_not_fit() -> None:
    trained = model(torch.float32)
    media, text, image_ids = batch(range(4), torch.float32)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="4 images for 2 texts"):
        trained(media, batch(range(2), torch.float32)[1], bos_token_id=BOS, generator=generator)
    alone, said, _ = batch([0], torch.float32)
    with pytest.raises(ValueError, match="no pair but its own"):
        trained(alone, said, bos_token_id=BOS, generator=generator)
    with pytest.raises(ValueError, match="no pair but its own"):
        trained(media, text, bos_token_id=BOS, generator=generator, image_ids=image_ids * 0)
    with pytest.raises(ValueError, match="vocab_size 0"):
        QFormerPretraining(QFormer(type(CONFIG)()))
    with pytest.raises(ValueError, match="temperature=0"):
        QFormerPretraining(trained.qformer, temperature=0)
