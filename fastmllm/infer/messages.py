"""Messages in chat form, as transformers and OpenAI's interface take them, as conversations about image files."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from fastmllm.data.conversation import PLACEHOLDER, RecordError, conversation_of
from fastmllm.data.images import ImageError, over_white, save_png
from fastmllm.data.sample import Conversation

Message = Mapping[str, Any]
Picture = str | Path | Image.Image


def conversation(messages: Sequence[Message], images: Sequence[Picture], name: str, folder: Path) -> Conversation:
    """Turn messages into a conversation that waits for its last answer.

    Args:
        messages: of {role: system | user | assistant, content}; content is a text, with `<image>` where an image
            stands, or a list of {type: text, text}, {type: image, image | path | url} and {type: image_url, image_url:
            {url}}. An entry without an image of its own takes the next one of `images`, as `<image>` does.
        images: files or pictures, in the order of their places.
        name: of the request, for messages of errors.
        folder: where pictures that are no files are written, without loss.

    Raises:
        ValueError: no messages, nothing asked, roles that do not alternate, an entry of another type, or another number
            of images than of their places; names the request.
        ImageError: an image of the web, or data that is no image.
    """
    if not messages or messages[-1].get("role") != "user":
        raise ValueError(f"{name}: the last message must be the user's; it is what is answered")
    spare = iter(images)
    shown: list[Picture] = []
    missing = 0
    turns = []
    for message in messages:
        text = ""
        for place in _places(message.get("content"), name):
            if isinstance(place, str):
                text += place
                continue
            text += PLACEHOLDER
            own = place[0] if place[0] is not None else next(spare, None)
            if own is None:
                missing += 1
            else:
                shown.append(own)
        turns.append({"role": message.get("role"), "content": text})
    left = len(list(spare))
    if missing or left:
        places = len(images) - left + missing
        raise ValueError(f"{name}: {len(images)} images for {places} places without one; make them equal")
    files = [_as_file(picture, folder / f"{number}.png", name) for number, picture in enumerate(shown)]
    try:
        # the answer that is waited for
        record = {"messages": [*turns, {"role": "assistant", "content": "?"}]}
        return conversation_of(record, id=name, images=files)
    except RecordError as error:
        raise ValueError(f"{name}: {error}") from error


def _places(content: Any, name: str) -> Iterator[str | tuple[Picture | None]]:
    """Yield the texts of a message, and a tuple of its image, or of None, where an image stands."""
    entries = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(entries, Sequence):
        raise ValueError(f"{name}: content is a {type(content).__name__}, not a text or a list of entries")
    for entry in entries:
        kind = entry.get("type") if isinstance(entry, Mapping) else None
        if kind == "text" and isinstance(entry.get("text"), str):
            first, *others = entry["text"].split(PLACEHOLDER)
            yield first
            for words in others:
                yield (None,)
                yield words
        elif kind == "image":
            yield (next((entry[key] for key in ("image", "path", "url") if entry.get(key) is not None), None),)
        elif kind == "image_url":
            url = entry.get("image_url")
            yield (url.get("url") if isinstance(url, Mapping) else url,)
        else:
            raise ValueError(f"{name}: an entry {str(entry)[:80]} of a message is no text, image or image_url")


def _as_file(picture: Picture, file: Path, name: str) -> str:
    """Return the path of an image; one that is none yet is written to `file`."""
    if isinstance(picture, Image.Image):
        save_png(over_white(picture), file)
        return str(file)
    text = str(picture)
    if text.startswith(("http://", "https://")):
        raise ImageError(f"{name}: {text[:80]}: nothing is downloaded here; give a file or a picture")
    if not text.startswith("data:"):
        return text.removeprefix("file://")
    try:
        data = base64.b64decode(text.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            save_png(over_white(image), file)
    except (binascii.Error, UnidentifiedImageError, OSError) as error:
        raise ImageError(f"{name}: {text[:40]}… is no image ({error}); send a PNG or JPEG in base64") from error
    return str(file)
