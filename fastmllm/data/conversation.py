"""JSON records of others as conversations: LLaVA's, messages with roles, and plain captions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fastmllm.data.sample import Conversation, Turn

PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"
_STILL = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
CAPTION_PROMPT = "Describe the image."
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class RecordError(ValueError):
    """A record that cannot be learned from.

    Args:
        reason: one of a few, for counting.
        detail: what is wrong in this one.
        file: path of the file that is missing or damaged, where it is one of its own.
    """

    def __init__(self, reason: str, detail: str, *, file: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.file = reason, detail, file


def parse_json(data: bytes) -> dict[str, Any]:
    """Read one record.

    Raises:
        RecordError: not JSON, not UTF-8, or no object.
    """
    try:
        record = json.loads(data)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text: nothing can write it
    except (ValueError, RecursionError) as error:
        raise RecordError("wrong JSON", str(error)) from error
    if not isinstance(record, dict):
        raise RecordError("wrong JSON", f"a {type(record).__name__}, not an object")
    return record


def image_names(record: Mapping[str, Any]) -> list[str]:
    """List the files that a record names: `image` (LLaVA: a name or a list of them) or `images`.

    Raises:
        RecordError: something else stands there.
    """
    named = record.get("image") or record.get("images") or []
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise RecordError("wrong images", f"image is {json.dumps(named)[:80]}, not a name or a list of names")
    return names


def video_names(record: Mapping[str, Any]) -> list[list[str]]:
    """List the files of each video that a record names under `video` or `videos`.

    A name is a video, a list of names one by its frames; so is a list of nothing but still images.

    Raises:
        RecordError: something else stands there.
    """
    named = record.get("video") or record.get("videos") or []
    entries = [named] if isinstance(named, str) else named
    if not isinstance(entries, list):
        raise RecordError("wrong videos", f"video is {json.dumps(named)[:80]}, no name and no list of names")
    if entries and all(isinstance(entry, str) and entry.lower().endswith(_STILL) for entry in entries):
        entries = [entries]
    videos: list[list[str]] = []
    for entry in entries:
        files = [entry] if isinstance(entry, str) else entry
        if not isinstance(files, list) or not files or not all(isinstance(name, str) and name for name in files):
            raise RecordError(
                "wrong videos", f"video is {json.dumps(named)[:80]}: {json.dumps(entry)[:40]} is no video"
            )
        videos.append(files)
    return videos


def conversation_of(
    record: Mapping[str, Any],
    *,
    id: str,
    images: Sequence[str],
    videos: Sequence[Sequence[str]] = (),
    source: str = "",
    caption: str = "",
    caption_prompt: str = CAPTION_PROMPT,
) -> Conversation:
    """Turn a record into a conversation.

    Args:
        record: `conversations` of {from: human | gpt | system, value} (LLaVA), `messages` of {role, content}, or
            `caption` or `text`. As in LLaVA, an answer before the first question is left out.
        id: unique name.
        images: what its placeholders stand for, in their order.
        videos: frames of each `<video>`, in their order; they are images of the conversation.
        source: of the mixture.
        caption: of a file beside the record, where the record has no turns of its own.
        caption_prompt: asked before a caption, behind the images.

    Raises:
        RecordError: no text, roles that do not alternate, an empty text, or another number of images or videos than of
            placeholders.
    """
    turns, system = record.get("conversations") or record.get("messages"), ""
    if turns:
        turns, system = _turns(turns)
    else:
        answer = caption or record.get("caption") or record.get("text")
        if not isinstance(answer, str) or not answer.strip():
            raise RecordError("no text", "neither conversations, messages, caption nor text")
        shown = PLACEHOLDER * len(images) + VIDEO_PLACEHOLDER * len(videos)
        turns = [Turn(prompt=shown + caption_prompt, answer=answer.strip())]
    for mark, given, what in ((PLACEHOLDER, images, "image"), (VIDEO_PLACEHOLDER, videos, "video")):
        if any(mark in turn.answer for turn in turns) or mark in system:
            raise RecordError(f"misplaced {what}", f"{mark} outside of the user's words")
        if (count := sum(turn.prompt.count(mark) for turn in turns)) != len(given):
            raise RecordError(f"{what} count", f"{len(given)} {what}s, {count} times {mark}")
    if videos:
        turns, images = _with_frames(turns, images, videos)
    return Conversation(id=id, turns=tuple(turns), images=tuple(images), source=source, system=system)


def _with_frames(
    turns: Sequence[Turn], images: Sequence[str], videos: Sequence[Sequence[str]]
) -> tuple[list[Turn], list[str]]:
    """Put an image for each frame where a video stands."""
    shown: list[str] = []
    found: list[Turn] = []
    more, films = iter(images), iter(videos)
    for turn in turns:
        prompt = ""
        for piece in re.split(f"({PLACEHOLDER}|{VIDEO_PLACEHOLDER})", turn.prompt):
            frames = next(films) if piece == VIDEO_PLACEHOLDER else [next(more)] if piece == PLACEHOLDER else ()
            shown += frames
            prompt += PLACEHOLDER * len(frames) or piece
        found.append(replace(turn, prompt=prompt))
    return found, shown


def _turns(entries: Any) -> tuple[list[Turn], str]:
    said: list[tuple[str, str]] = []
    for entry in entries if isinstance(entries, list) else [entries]:
        role, text = (
            (entry.get("from", entry.get("role")), entry.get("value", entry.get("content")))
            if isinstance(entry, dict)
            else (None, None)
        )
        if not isinstance(role, str) or role not in ROLES or not isinstance(text, str):
            raise RecordError("wrong turns", f"{json.dumps(entry)[:80]} is no turn of {', '.join(ROLES)} with a text")
        if not text.replace(PLACEHOLDER, "").replace(VIDEO_PLACEHOLDER, "").strip():
            raise RecordError("empty turn", f"{role} says nothing")
        said.append((ROLES[role], text))
    system = said.pop(0)[1] if said[0][0] == "system" else ""
    if said and said[0][0] == "assistant":
        said.pop(0)
    users, answers = said[0::2], said[1::2]
    regular = all(role == "user" for role, _ in users) and all(role == "assistant" for role, _ in answers)
    if not said or len(users) != len(answers) or not regular:
        raise RecordError("wrong turns", f"{', '.join(role for role, _ in said)}: user and assistant must alternate")
    turns = [Turn(prompt=u, answer=a) for (_, u), (_, a) in zip(users, answers, strict=True)]
    return turns, system
