"""Candidate scores against the plain definition: log-softmax over the whole sequence."""

from __future__ import annotations

import pytest
import torch

from fastmllm.infer.score import ChoiceScore, score_choices
from fastmllm.models.continuation import Continuation
from fastmllm.models.language import LanguageConfig, LanguageModel

VOCAB = 61


class Prompts:
    """The fields of a packed batch that inference reads; text only."""

    def __init__(self, *texts: list[int]) -> None:
        lengths = [len(text) for text in texts]
        self.input_ids = torch.tensor([token for text in texts for token in text])
        self.position_ids = torch.cat([torch.arange(length) for length in lengths])
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        self.max_seqlen = max(lengths)
        self.ids = [str(place) for place in range(len(texts))]
        self.image_index = torch.zeros(0, dtype=torch.int64)
        self.pixels = None
        self.image_paths: list[str] = []


class Toy:
    """A decoder that counts how many tokens it is asked to embed as prompts."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = LanguageConfig(
            vocab_size=VOCAB, width=32, depth=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_width=48
        )
        self.language = LanguageModel(config).eval()
        self.embedded = 0
        with torch.no_grad():
            for parameter in self.language.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(12)

    def start(self, batch: Prompts, cache=None) -> tuple[torch.Tensor, Continuation]:
        embeds = self.embed_batch(batch)
        hidden = self.language(embeds, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, cache)
        return hidden, Continuation(language=self.language)

    def embed_batch(self, batch: Prompts) -> torch.Tensor:
        self.embedded += len(batch.input_ids)
        return self.language.embed(batch.input_ids)


TEXTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9])
CHOICES = [[[7], [7, 8], [1, 2, 3, 4]], [[60, 0, 60], [5]], [[2, 2], [2, 2]]]


@torch.no_grad()
def by_definition(model: Toy, text: list[int], tokens: list[int]) -> float:
    whole = torch.tensor(text + tokens)
    bounds = torch.tensor([0, len(whole)], dtype=torch.int32)
    hidden = model.language(model.language.embed(whole), torch.arange(len(whole)), bounds, len(whole))
    scores = model.language.logits(hidden).double().log_softmax(-1)
    return sum(scores[len(text) - 1 + place, token].item() for place, token in enumerate(tokens))


@pytest.mark.parametrize("rows", [1, 2, 128])
def test_equals_the_definition_at_any_batch_size(rows: int) -> None:
    model = Toy()
    together = score_choices(model, Prompts(*TEXTS), CHOICES, rows_per_pass=rows)
    assert model.embedded == sum(map(len, TEXTS))  # each prompt once, however many candidates
    for text, choices, scores in zip(TEXTS, CHOICES, together, strict=True):
        (alone,) = score_choices(model, Prompts(text), [choices])
        for tokens, score, single in zip(choices, scores, alone, strict=True):
            assert score.total == pytest.approx(by_definition(model, text, tokens), rel=1e-5)
            assert score.total == pytest.approx(single.total, rel=1e-5)
            assert score.mean == pytest.approx(score.total / len(tokens))
            assert score.num_tokens == len(tokens)
    assert together[2][0].total == pytest.approx(together[2][1].total, rel=1e-6)


def test_single_tokens_are_a_distribution() -> None:
    (scores,) = score_choices(Toy(), Prompts(TEXTS[0]), [[[token] for token in range(VOCAB)]])
    total = torch.tensor([score.total for score in scores], dtype=torch.float64).exp().sum()
    assert total.item() == pytest.approx(1.0, abs=1e-5)


def test_bf16_stays_near() -> None:
    model = Toy()
    exact = score_choices(model, Prompts(*TEXTS), CHOICES)
    model.language.bfloat16()
    rough = score_choices(model, Prompts(*TEXTS), CHOICES)
    for exact_scores, rough_scores in zip(exact, rough, strict=True):
        for a, b in zip(exact_scores, rough_scores, strict=True):
            assert isinstance(b, ChoiceScore)
            assert b.total == pytest.approx(a.total, rel=0.1)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([[[1]]], "1 lists of candidates for 2 prompts"),
        ([[[1]], []], "prompt 1 has no candidate"),
        ([[[1], []], [[1]]], "candidate 1 of prompt 0 is empty"),
        ([[[1]], [[1, 61]]], "outside the vocabulary of 61"),
    ],
)
def test_rejects(choices: list[list[list[int]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_choices(Toy(), Prompts(*TEXTS[:2]), choices)
