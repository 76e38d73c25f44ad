"""One question about one image with its exact truth, or a conversation about any number of images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A prompt, its answer and the image that they are about.

    Args:
        id: unique name.
        prompt: the user's words, without chat template and image tokens.
        answer: the target text.
        task: name | group | caption | exists | yes_no | count | position | relation | scene.
        image: path of a PNG or JPEG file, which fixes the exact pixels; None = text only.
        source: design team, or split of a folder.
        language: language of prompt and answer.
        choices: closed set for ranking; for `exists`: (right name, absent adversarial name).
        references: captions to score against.
        truth: exact truth of the image, JSON-able.
    """

    id: str
    prompt: str
    answer: str
    task: str
    image: str | None = None
    source: str = ""
    language: str = "en"
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()
    truth: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """What a user says, and the answer to it.

    Args:
        prompt: with `<image>` where an image stands.
        answer: the target text.
    """

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Turns about images in their midst; every answer is learned.

    Args:
        id: unique name within its source.
        turns: at least one.
        images: one for each `<image>` of the prompts, in their order; what `open_image` reads. Empty = text only.
        source: of the mixture.
        system: instructions before the first turn; "" = none.
    """

    id: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    source: str = ""
    system: str = ""
