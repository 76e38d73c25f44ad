"""The distribution that a `Sampler` draws from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastmllm.infer.sampling import Sampler, SamplingParams, sequence_generators

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.06, 0.04]).log()


def frequencies(params: SamplingParams, draws: int = 4000) -> torch.Tensor:
    tokens, _ = Sampler([params] * draws, [str(place) for place in range(draws)])(LOGITS.expand(draws, -1))
    return tokens.bincount(minlength=5) / draws


def test_greedy_takes_the_first_largest() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    sampler = Sampler([SamplingParams()] * 2, ["a", "b"])
    assert sampler(logits)[0].tolist() == [1, 0]
    assert sampler(logits.bfloat16())[0].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (SamplingParams(temperature=1.0), [0.5, 0.1, 0.3, 0.06, 0.04]),
        (SamplingParams(temperature=1.0, top_p=0.75), [0.625, 0, 0.375, 0, 0]),
        (SamplingParams(temperature=1.0, top_p=0.85), [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0, 0]),
        (SamplingParams(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (SamplingParams(temperature=0.5), [0.7040, 0.0282, 0.2534, 0.0101, 0.0045]),
        (SamplingParams(temperature=1.0, top_k=3), [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0, 0]),
        (SamplingParams(temperature=1.0, top_k=3, top_p=0.85), [0.625, 0, 0.375, 0, 0]),
        (SamplingParams(temperature=1.0, min_p=0.15), [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, expected: list[float]) -> None:
    found, wanted = frequencies(params), torch.tensor(expected)
    assert found[wanted == 0].sum() == 0  # what a filter takes out: never
    assert (found - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_filters_and_penalty_are_those_of_transformers() -> None:
    process = pytest.importorskip("transformers").generation.logits_process
    torch.manual_seed(0)
    logits, prompt = 3 * torch.randn(1, 40), [[3, 3, 7, 21]]
    params = SamplingParams(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.7)
    theirs = logits
    for step in (
        process.RepetitionPenaltyLogitsProcessor(1.7), process.TemperatureLogitsWarper(0.8),
        process.TopKLogitsWarper(20), process.TopPLogitsWarper(0.9), process.MinPLogitsWarper(0.05),
    ):  # fmt: skip
        theirs = step(torch.tensor(prompt), theirs)
    draws = 3000
    sampler = Sampler([params] * draws, [str(place) for place in range(draws)], prompt * draws)
    found = sampler(logits.expand(draws, -1))[0].bincount(minlength=40) / draws
    wanted = theirs.softmax(-1)[0]
    assert 3 < int((wanted > 0).sum()) < 20
    assert found[wanted == 0].sum() == 0
    assert (found - wanted).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_what_was_said_is_penalised_too() -> None:
    sampler = Sampler([SamplingParams(repetition_penalty=2.0)] * 2, ["a", "b"], [[4], [0]])
    logits = torch.tensor([[3.0, 2.0, 1.4, 0.0, -1.0]]).expand(2, -1)
    assert [sampler(logits)[0].tolist() for _ in range(3)] == [[0, 1], [1, 0], [0, 0]]
    sampler.select([1])
    assert sampler(logits[:1])[0].tolist() == [0]


def test_a_batch_mixes_ways_of_drawing() -> None:
    mixed = [SamplingParams(), SamplingParams(temperature=2.0, seed=1, logprobs=True), SamplingParams(top_k=1)]
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    sampler = Sampler(mixed, ["x"] * 3)
    tokens, log_probs = sampler(logits)
    alone = [Sampler([params], ["x"])(row[None])[0].item() for params, row in zip(mixed, logits, strict=True)]
    assert tokens.tolist() == alone
    assert tokens[[0, 2]].tolist() == logits[[0, 2]].argmax(-1).tolist()
    assert log_probs is not None
    assert torch.allclose(log_probs, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0])


def test_stream_depends_on_seed_and_name_only() -> None:
    a, b, other = sequence_generators([7, 7, 8], ["a", "b", "a"])
    again = sequence_generators([7, 7], ["x", "a"])[1]
    draws = [torch.rand(4, generator=generator).tolist() for generator in (a, b, again, other)]
    assert draws[0] == draws[2]
    assert draws[0] not in (draws[1], draws[3])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1), ("top_k", -1), ("top_p", 0), ("min_p", 1.1), ("repetition_penalty", 0),
        ("max_new_tokens", 0), ("stop", "end"), ("stop", ("",)),
    ],
)  # fmt: skip
def test_rejects(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}".replace("(", r"\(").replace(")", r"\)")):
        replace(SamplingParams(), **{name: value})


def test_rejects_names_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="0 names for 1"):
        Sampler([SamplingParams()], [])
