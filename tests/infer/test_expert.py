"""The expert path: the language model gets words only, one description an image, and the controls still work."""

from __future__ import annotations

import pytest

from fastmllm.data.sample import Sample
from fastmllm.infer.expert import ExpertResponder


class Echo:
    def answer(self, samples, max_new_tokens=16):
        assert all(s.image is None for s in samples)
        return [s.prompt for s in samples]

    def score(self, samples):
        assert all(s.image is None for s in samples)
        return [[float(c in s.prompt) for c in s.choices] for s in samples]


def _ask(prompt, image="owl.png", choices=()):
    return Sample(id=prompt, prompt=prompt, answer="?", task="name", image=image, choices=choices)


def test_words_replace_the_image_and_each_image_is_described_once():
    seen = []

    def describe(path):
        seen.append(path)
        return "an owl\n  on a {prompt}"

    expert = ExpertResponder(describe, Echo())
    answers = expert.answer([_ask("What is it?"), _ask("Which group?"), _ask("Blind?", image=None)])
    assert answers[0] == "The picture shows: an owl on a {prompt}\nWhat is it?"
    assert answers[2] == "Blind?"
    assert expert.score([_ask("Which?", choices=("owl", "fox"))]) == [[1.0, 0.0]]
    assert seen == ["owl.png"]


def test_a_template_without_its_places_is_refused():
    with pytest.raises(ValueError, match=r"must have \{description\} and \{prompt\}"):
        ExpertResponder(str, Echo(), template="{prompt}")
