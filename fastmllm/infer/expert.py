"""The expert-model path: an image -> text model in front of a language model that never sees a pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from fastmllm.data.sample import Sample


class TextResponder(Protocol):
    """Whoever answers questions and scores choices (`fastmllm.infer.respond.Responder`)."""

    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 16) -> list[str]: ...

    def score(self, samples: Sequence[Sample]) -> list[list[float]]: ...


class ExpertResponder:
    """Answer questions about images from descriptions alone.

    Whatever `describe` leaves out is lost to the language model: evaluate it beside a fused model to see how much.

    Args:
        describe: image file -> its description: a captioner, OCR, a detector that lists what it found.
        language: answers the text; it is never given an image.
        template: the prompt, with {description} and {prompt}. A question without an image keeps its own prompt.

    The expert-model path of Yin et al., A Survey on Multimodal Large Language Models (arXiv 2306.13549).
    """

    def __init__(
        self,
        describe: Callable[[str], str],
        language: TextResponder,
        template: str = "The picture shows: {description}\n{prompt}",
    ) -> None:
        if "{description}" not in template or "{prompt}" not in template:
            raise ValueError(f"ExpertResponder: template {template!r} must have {{description}} and {{prompt}}")
        self.describe, self.language, self.template = describe, language, template
        self._descriptions: dict[str, str] = {}

    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 16) -> list[str]:
        """Answer each question from its image's description."""
        return self.language.answer([self._as_text(s) for s in samples], max_new_tokens)

    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return the log-probability, in nats, of each of a sample's choices after the description."""
        return self.language.score([self._as_text(s) for s in samples])

    def _as_text(self, sample: Sample) -> Sample:
        if sample.image is None:
            return sample
        if sample.image not in self._descriptions:  # one look at an image, however many questions
            self._descriptions[sample.image] = " ".join(self.describe(sample.image).split())
        text = self.template.replace("{prompt}", sample.prompt).replace(
            "{description}", self._descriptions[sample.image]
        )
        return replace(sample, image=None, prompt=text)
