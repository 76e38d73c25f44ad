"""The distribution that `choose` draws from."""

from __future__ import annotations

import pytest
import torch

from fastmllm.infer.sampling import Sampling, choose, sequence_generators

LOGITS = torch.tensor([0.5, 0.1, 0.3, 0.06, 0.04]).log()


def frequencies(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    generators = sequence_generators(sampling, [str(place) for place in range(draws)])
    tokens = choose(LOGITS.expand(draws, -1), sampling, generators)
    return tokens.bincount(minlength=5) / draws


def test_greedy_takes_the_first_largest_and_needs_no_generator() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0], [1.0, 0.0, -1.0]])
    assert choose(logits, Sampling()).tolist() == [1, 0]
    assert choose(logits.bfloat16(), Sampling()).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(temperature=1.0), [0.5, 0.1, 0.3, 0.06, 0.04]),
        (Sampling(temperature=1.0, top_p=0.75), [0.625, 0, 0.375, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.85), [0.5 / 0.9, 0.1 / 0.9, 0.3 / 0.9, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.01), [1, 0, 0, 0, 0]),
        (Sampling(temperature=0.5), [0.7040, 0.0282, 0.2534, 0.0101, 0.0045]),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling, expected: list[float]) -> None:
    found, wanted = frequencies(sampling), torch.tensor(expected)
    assert found[wanted == 0].sum() == 0  # outside top_p: never
    assert (found - wanted).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_stream_depends_on_seed_and_id_only() -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    a, b = sequence_generators(sampling, ["a", "b"])
    again = sequence_generators(sampling, ["x", "a"])[1]
    other = sequence_generators(Sampling(temperature=1.0, seed=8), ["a"])[0]
    draws = [torch.rand(4, generator=generator).tolist() for generator in (a, b, again, other)]
    assert draws[0] == draws[2]
    assert draws[0] not in (draws[1], draws[3])


def test_rejects() -> None:
    with pytest.raises(ValueError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(ValueError, match="top_p"):
        Sampling(top_p=0)
    with pytest.raises(ValueError, match="0 generators for 1"):
        choose(LOGITS[None], Sampling(temperature=1.0))
