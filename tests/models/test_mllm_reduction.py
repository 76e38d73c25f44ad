"""Whole published models with visual tokens dropped inside of their language model: batches, generation, training."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from fastmllm.compression import GreedyDiverse, Placement, TopK
from fastmllm.infer.generation import generate_tokens
from fastmllm.infer.sampling import SamplingParams
from fastmllm.models.mllm import MLLM
from tests.support.tiny_mllm import ACROSS, IMAGE, MODELS, alone, oracle

SPLICED = [name for name in MODELS if name not in ACROSS]


@pytest.fixture(scope="module")
def models(saved):
    """Give a function: name of a family -> our model of it."""
    made = {}

    def model(name):
        if name not in made:
            made[name] = MLLM.from_pretrained(saved(name))
        made[name].placement = Placement()
        return made[name]

    return model


@pytest.mark.parametrize("name", SPLICED)
def test_half_of_the_tokens_go_and_a_sample_does_not_depend_on_its_neighbours(name, models):
    model, batch = models(name), oracle(name)[1]
    labels = batch["input_ids"].masked_fill((batch["input_ids"] == IMAGE) | (batch["attention_mask"] == 0), -100)
    inputs = model.inputs({**batch, "labels": labels})
    model.placement = Placement(stages=((0, GreedyDiverse(0.75)), (1, TopK(0.5, scorer="last_row"))))
    hidden, continuation = model.start(inputs)
    left = [int(n * 0.5 + 0.5) for n in inputs.counts]
    assert len(hidden) == len(inputs.plan.source) - sum(inputs.counts) + sum(left)
    single = [model.start(model.inputs(alone(name, row)))[0] for row in range(2)]
    # the same without the labels, whose prompts end with the text: what is kept differs, not how much
    assert [len(one) for one in single] == continuation.cu_seqlens.diff().tolist()
    model.zero_grad()
    model(inputs).backward()
    assert all(p.grad is not None for n, p in model.language.named_parameters() if "lm_head" not in n)
    with torch.no_grad():
        together = model.logits(model.inputs(batch))
        parts = torch.cat([model.logits(model.inputs(alone(name, row))) for row in range(2)])
    torch.testing.assert_close(together, parts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPLICED)
def test_generation_goes_on_behind_what_is_left(name, models):
    model, batch = models(name), oracle(name)[1]
    inputs = model.inputs(batch)
    plain = generate_tokens(model, inputs, SamplingParams(max_new_tokens=4))
    model.placement = Placement(stages=((1, TopK(1.0, scorer="last_row")),))
    assert generate_tokens(model, inputs, SamplingParams(max_new_tokens=4)) == plain
    model.placement = Placement(stages=((0, GreedyDiverse(0.75)), (1, TopK(0.5, scorer="last_row"))))
    short = generate_tokens(model, inputs, SamplingParams(max_new_tokens=4))
    assert short == [
        generate_tokens(model, model.inputs(alone(name, row)), SamplingParams(max_new_tokens=4))[0] for row in range(2)
    ]


def test_what_a_published_model_has_no_place_for_is_refused(models):
    model = models("llava")
    for placement in (Placement(merge=4), Placement(connector=TopK(4))):
        with pytest.raises(ValueError, match="compress behind it: language:0"):
            model.placement = placement


@pytest.mark.parametrize("name", SPLICED[:2])
def test_text_alone_passes_by(name, models):
    model = models(name)
    ids = torch.randint(10, 100, (2, 5))
    plain = model.logits(model.inputs({"input_ids": ids}))
    model.placement = Placement(stages=((1, TopK(1, scorer="last_row")),))
    assert torch.equal(model.logits(model.inputs({"input_ids": ids})), plain)
