"""Answer and score questions about images with a vision-language model, in packed batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from fastmllm.data.packing import Batch, collate, pack, sequence_length
from fastmllm.data.sample import Conversation, Sample
from fastmllm.data.text import ChatTemplate, answer_ids, end_token, tokenise
from fastmllm.infer.answer import Answer
from fastmllm.infer.generation import decode
from fastmllm.infer.pictures import collate_pictures, spelled_size
from fastmllm.infer.sampling import SamplingParams
from fastmllm.infer.score import score_choices
from fastmllm.models.inputs import Inputs
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import IMAGE_TOKEN_ID, VLM


def template_of(model: VLM | MLLM) -> ChatTemplate:
    """Return the text that a model was trained to see around prompt and answer.

    Raises:
        ValueError: a model that no recipe told one.
    """
    if model.config is None:
        raise ValueError("MLLM: words need a template and a tokenizer: make the model with fastmllm.models.talk")
    return model.config


def collate_for(
    model: VLM | MLLM, samples: Sequence[Sample] | Sequence[Conversation], *, keep: int | None = None,
    image_size: int | None = None, load_pixels: bool = True, with_answers: bool,
    answers: Sequence[Sequence[int]] | None = None,
) -> Any:  # fmt: skip
    """Pack samples the way a model reads them: a `Batch` for a `VLM`, `Inputs` for an `MLLM`.

    Tokens an image and its size are the model's own by default; an `MLLM`'s resolution policy says them, it has no
    others, and its pictures are always read.
    """
    if isinstance(model, MLLM):
        return collate_pictures(model, samples, template_of(model), with_answers=with_answers, answers=answers)
    return collate(
        samples,
        model.tokenizer,
        num_visual_tokens=keep or model.config.visual_tokens,
        image_size=image_size or model.config.image_size,
        image_token_id=IMAGE_TOKEN_ID,
        template=template_of(model),
        load_pixels=load_pixels,
        with_answers=with_answers,
        answers=answers,
        vocab_size=model.language.config.vocab_size,
    )


class Responder:
    """Ask a model questions.

    Args:
        model: the model; the `feature_cache` of a `VLM`, when it knows an image at this size, spares the encoder.
        max_tokens: tokens of the questions computed together.
        visual_tokens: K, of a `VLM`; the model's own by default.
        image_size: pixels on a side, of a `VLM`; the model's own by default.
        sampling: how answers are drawn; greedily by default. How long they are, `answer` says.

    Raises:
        ValueError: a model that no recipe told its words, or sizes for one whose resolution policy says them.
    """

    def __init__(
        self, model: VLM | MLLM, max_tokens: int = 1024, visual_tokens: int | None = None,
        image_size: int | None = None, sampling: SamplingParams | None = None,
    ) -> None:  # fmt: skip
        self.model, self.max_tokens = model, max_tokens
        self.sampling = sampling or SamplingParams()
        self.template = template_of(model)
        assert model.tokenizer is not None
        self.tokenizer = model.tokenizer
        if isinstance(model, VLM):
            self.keep = visual_tokens or model.config.visual_tokens
            self.image_size = image_size or model.config.image_size
        elif visual_tokens or image_size:
            raise ValueError(
                "Responder: visual_tokens and image_size are for a VLM; here a resolution policy says them"
            )
        self.end = end_token(self.tokenizer, self.template)

    def answer(self, samples: Sequence[Sample], max_new_tokens: int = 16) -> list[str]:
        """Generate an answer to each question."""
        texts: dict[int, str] = {}
        params = replace(self.sampling, max_new_tokens=max_new_tokens)
        for places, batch in self._batches(samples):
            answers = [Answer(params, (self.end,), self.tokenizer) for _ in places]
            for _ in decode(self.model, batch, answers):
                pass
            texts |= {place: answer.text.strip() for place, answer in zip(places, answers, strict=True)}
        return [texts[i] for i in range(len(samples))]

    def score(self, samples: Sequence[Sample]) -> list[list[float]]:
        """Return the log-probability, in nats, of each of a sample's choices with its end token."""
        scores: dict[int, list[float]] = {}
        for places, batch in self._batches(samples):
            choices = [[self._ids(c) for c in samples[place].choices] for place in places]
            for place, row in zip(places, score_choices(self.model, batch, choices), strict=True):
                scores[place] = [choice.total for choice in row]
        return [scores[i] for i in range(len(samples))]

    def ask(self, image: str, prompt: str, max_new_tokens: int = 24) -> str:
        """Answer one question about one image file."""
        sample = Sample(id="question", prompt=prompt, answer="?", task="chat", image=image)
        return self.answer([sample], max_new_tokens)[0]

    def _batches(self, samples: Sequence[Sample]) -> Iterator[tuple[list[int], Batch | Inputs]]:
        """Pack questions into batches of at most `max_tokens`, the image's tokens counted."""
        lengths = [self._length(s) for s in samples]
        for places in pack(lengths, max([self.max_tokens, *lengths])):
            yield places, self._collate([samples[i] for i in places])

    def _length(self, sample: Sample) -> int:
        if isinstance(self.model, MLLM):
            return spelled_size(sample, self.model, self.template, with_answers=False).text
        tokens = tokenise(sample, self.tokenizer, self.template)
        return sequence_length(tokens, self.keep if sample.image is not None else 0, with_answer=False)

    def _ids(self, answer: str) -> list[int]:
        return [*answer_ids(answer, self.tokenizer, self.template), self.end]

    def _collate(self, samples: Sequence[Sample]) -> Batch | Inputs:
        if isinstance(self.model, MLLM):
            return collate_for(self.model, samples, with_answers=False)
        cache = self.model.feature_cache
        paths = [s.image for s in samples if s.image is not None]
        cached = cache is not None and cache.image_size == self.image_size and all(p in cache.features for p in paths)
        return collate_for(
            self.model,
            samples,
            keep=self.keep,
            image_size=self.image_size,
            load_pixels=not cached,
            with_answers=False,
        )
