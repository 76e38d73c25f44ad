"""A composition answers and scores questions about pictures of several sizes as it would each alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_compositions import picture
from tiny_talk import SIZES, talking

from fastmllm.data.sample import Sample
from fastmllm.eval.runner import CONDITIONS, EvalConfig, evaluate
from fastmllm.infer.respond import Responder, collate_for

WORDS = ("red", "green", "blue", "white")


@pytest.fixture
def asked(tmp_path: Path) -> list[Sample]:
    found = []
    for number, size in enumerate(SIZES):
        file = tmp_path / f"{number}.png"
        Image.fromarray(picture(number, *size)).save(file)
        found.append(
            Sample(
                id=str(number), prompt="What is this?" * (1 + number % 2), answer=WORDS[number], task="name",
                image=str(file), choices=WORDS, truth={"concept": WORDS[number]},
            )
        )  # fmt: skip
    return found


@pytest.mark.parametrize(
    "parts", [("qwen", "native", "merger", "tokens"), ("mllama", "mllama", "none", "mllama")], ids="-".join
)
def test_scores_are_those_of_each_answer_written_out(parts: tuple[str, ...], asked: list[Sample]) -> None:
    model = talking(*parts).eval()
    responder = Responder(model, max_tokens=70)
    batches = list(responder._batches(asked))
    assert 1 < len(batches) < len(asked)
    assert all(batch.num_tokens <= 70 for _, batch in batches)
    scores = responder.score(asked)
    for sample, row in zip(asked, scores, strict=True):
        for choice, score in zip(WORDS, row, strict=True):
            written = collate_for(model, [replace(sample, answer=choice)], with_answers=True)
            with torch.no_grad():
                assert score == pytest.approx(model.log_probs(written).sum().item(), abs=2e-4)
    unseen = responder.score([replace(sample, image=None) for sample in asked])
    assert all(abs(a - b) > 1e-3 for a, b in zip(scores[0], unseen[0], strict=True))
    together = responder.answer(asked, 4)
    assert together == [responder.answer([sample], 4)[0] for sample in asked]
    assert responder.ask(str(asked[0].image), asked[0].prompt, 4) == together[0]


def test_the_controls_are_a_vlms(asked: list[Sample]) -> None:
    model = talking("vit", "anyres", "mlp", "tokens").eval()
    exists = [replace(s, task="exists", choices=(s.answer, WORDS[(n + 1) % 4])) for n, s in enumerate(asked)]
    report = evaluate(Responder(model), {"name": asked, "exists": exists}, {}, EvalConfig(max_new_tokens=2))
    rows = {(row.task, row.condition): row.estimate.count for row in report.rows}
    assert rows == {(task, condition): 4 for task in ("name", "exists") for condition in CONDITIONS}


def test_sizes_are_a_policys() -> None:
    with pytest.raises(ValueError, match="a resolution policy says them"):
        Responder(talking("vit", "tiles", "mlp", "tokens"), visual_tokens=4)
