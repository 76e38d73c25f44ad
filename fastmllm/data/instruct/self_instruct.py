"""Instructions that a language model writes from what is known of an image, checked before they are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from fastmllm.data.augment import rng_of
from fastmllm.data.conversation import PLACEHOLDER, RecordError, image_names
from fastmllm.data.instruct.checks import fault, parse_pairs
from fastmllm.data.instruct.prompt_files import PromptFile, facts_of
from fastmllm.data.instruct.replies import Chat, Replies
from fastmllm.data.records import Record
from fastmllm.data.shard_index import Skipped
from fastmllm.data.text import normalise


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfInstructConfig:
    """What is asked and kept.

    Args:
        seed: of the seeds shown.
        max_repeats: images that one question (as answers are compared) is kept for; 0 = any number.
        blind: ask each question without the image's facts, too, and leave out what is answered the same.
    """

    seed: int = 0
    max_repeats: int = 0
    blind: bool = False


def self_instruct(
    records: Iterable[Record | Skipped], prompt: PromptFile, chat: Chat, replies: Replies,
    config: SelfInstructConfig | None = None, *, labels: Collection[str] = (), source: str = "",
) -> Iterator[Mapping[str, Any] | Skipped]:  # fmt: skip
    """Yield a conversation an image, and every pair that was left out, with its reason.

    Args:
        records: with an image, and caption(s), boxes or both.
        prompt: how the model is asked.
        chat: messages -> reply, any model.
        replies: keeps what it said: a second run asks only what is missing.
        config: see there.
        labels: of the whole set (`questions.labels_of`), for questions about what is not there.
        source: of the records, for the list of what was left out.

    Raises:
        ModelDown: the model fails again and again.
    """
    config = config or SelfInstructConfig()
    asked_before: Counter[str] = Counter()
    for record in records:
        if isinstance(record, Skipped):
            yield record
            continue
        try:
            images = image_names(record.data)
            if len(images) != 1:
                raise RecordError("wrong images", f"{len(images)} images; facts are of one")
            facts = facts_of(record.data)
        except RecordError as error:
            yield Skipped(shard=source, key=record.key, reason=error.reason, detail=error.detail)
            continue
        generator = rng_of("self-instruct", config.seed, prompt.name, record.key, record.id)
        reply = replies.ask(chat, prompt.messages(facts, generator))
        pairs = parse_pairs(reply) if reply is not None else []
        if not pairs:
            reason = "model failed" if reply is None else "unparsed reply"
            yield Skipped(shard=source, key=record.key, reason=reason, detail=(reply or "")[:200])
            continue
        kept: list[tuple[str, str]] = []
        for number, (question, answer) in enumerate(pairs):
            wrong = fault(question, answer, facts=facts, labels=labels, earlier=[q for q, _ in kept])
            wrong = wrong or _elsewhere(question, answer, asked_before, config, chat, replies)
            if wrong is None and PLACEHOLDER in question + answer:
                wrong = "misplaced image", f"{PLACEHOLDER} in the text"
            if wrong is not None:
                yield Skipped(shard=source, key=f"{record.key}/{number}", reason=wrong[0], detail=wrong[1])
                continue
            asked_before[normalise(question)] += 1
            kept.append((question, answer))
        if kept:
            yield _conversation(record, images[0], kept, prompt, replies.model)


def _elsewhere(
    question: str, answer: str, asked: Counter[str], config: SelfInstructConfig, chat: Chat, replies: Replies
) -> tuple[str, str] | None:
    """Return what speaks against a pair beyond its own image."""
    if config.max_repeats and asked[normalise(question)] >= config.max_repeats:
        return "asked too often", f"{config.max_repeats} images have {question!r}"
    if config.blind:
        guess = replies.ask(chat, [{"role": "user", "content": question}])
        if guess is not None and normalise(guess) == normalise(answer):
            return "answered without the image", f"{guess[:80]!r}"
    return None


def _conversation(
    record: Record, image: str, pairs: list[tuple[str, str]], prompt: PromptFile, model: str
) -> dict[str, Any]:
    turns = []
    for number, (question, answer) in enumerate(pairs):
        lead = f"{PLACEHOLDER}\n" if number == 0 else ""
        turns += [{"from": "human", "value": lead + question}, {"from": "gpt", "value": answer}]
    made = {"by": "self-instruct", "model": model, "prompt": prompt.name, "from": record.id}
    return {"id": f"{record.id}/{prompt.name}", "image": image, "conversations": turns, "made": made}
