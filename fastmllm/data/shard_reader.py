"""How a sample of a shard is read: its texts whole, its images by name."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fastmllm.data.byte_range import ByteRange
from fastmllm.data.conversation import (
    CAPTION_PROMPT,
    RecordError,
    conversation_of,
    image_names,
    parse_json,
    video_names,
)
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_scan import MAX_TEXT, Entry, Part, is_image, leads_out, video_of
from fastmllm.data.video import SUFFIXES as VIDEO_SUFFIXES
from fastmllm.data.video import Frame, chosen, measure

HEADER = 1 << 16  # bytes that hold the size of nearly every image


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A row of an index.

    Args:
        key: of the sample.
        parts: texts, images and videos.
        sizes: (width, height) in pixels of each image and of each part of a video, from its header.
    """

    key: str
    parts: tuple[Part, ...]
    sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardReader:
    """How the samples of a source's shards are read.

    Args:
        root: of image files that JSON names.
        source: name, given to the samples.
        caption_prompt: asked before a caption.
        max_frames: of a video; more are thinned out evenly.
    """

    root: Path
    source: str
    caption_prompt: str = CAPTION_PROMPT
    max_frames: int = 8

    def locate(self, shard: Path, entry: Entry) -> Located:
        """Look at an entry while indexing: its text whole, its images' headers.

        Raises:
            RecordError: nothing can be learned from it.
        """
        record = self._record(shard, entry.parts)
        shown = [part for part in entry.parts if _is_shown(part.field)]
        if not shown:
            root = os.path.abspath(self.root)
            stills, videos = image_names(record[0]), video_names(record[0])
            named = [*stills, *(name for files in videos for name in files)]
            if shard.suffix.lower() == ".tar" and (bad := next(filter(leads_out, named), None)) is not None:
                raise RecordError("unsafe path", f"image {bad!r} points outside of the archive's folder")
            shown = [Part("jpg", -1, -1, os.path.join(root, name)) for name in stills]
            for number, files in enumerate(videos):
                shown += [Part(f"video{number}.jpg", -1, -1, os.path.join(root, name)) for name in files]
        texts = tuple(part for part in entry.parts if not _is_shown(part.field))
        self._conversation(shard, entry.key, (*texts, *shown), record)
        measured = [_measured(self._name(shard, part), part) for part in shown]
        parts = (*texts, *(part for part, _ in measured))
        return Located(key=entry.key, parts=parts, sizes=tuple(size for _, size in measured))

    def read(self, shard: Path, located: Located) -> Conversation:
        """Read a sample; its images are named, not opened.

        Raises:
            RecordError: the shard changed since it was indexed.
        """
        return self._conversation(shard, located.key, located.parts, self._record(shard, located.parts))

    def sizes(self, located: Located) -> tuple[tuple[int, int], ...]:
        """Return (width, height) in pixels of each image that a sample shows, frames among them."""
        shown = [part for part in located.parts if _is_shown(part.field)]
        of = dict(zip(shown, located.sizes, strict=True))
        still = [of[part] for part in shown if is_image(part.field)]
        return (*still, *(of[part] for video in self._videos(shown) for part, _ in video))

    def _videos(self, parts: Sequence[Part]) -> list[list[tuple[Part, int]]]:
        """Return the frames of each video that are shown: parts, and numbers in them."""
        films: dict[str, list[tuple[Part, int]]] = {}
        for part in parts:
            if name := video_of(part.field):
                films.setdefault(name, []).extend((part, number) for number in range(part.frames))
        return [[frames[number] for number in chosen(len(frames), self.max_frames)] for frames in films.values()]

    def _record(self, shard: Path, parts: tuple[Part, ...]) -> tuple[dict[str, object], str]:
        record, caption = {}, ""
        for part in parts:
            if _is_shown(part.field):
                continue
            try:
                name = self._name(shard, part)
                found = ByteRange.parse(name)
                size = Path(name).stat().st_size if found is None else found.size
                if size > MAX_TEXT:
                    raise RecordError("text too large", f"{part.field} of {size} bytes, above {MAX_TEXT}")
                data = Path(name).read_bytes() if found is None else found.read()
            except OSError as error:
                raise RecordError("missing file", str(error), file=name) from error
            if part.field == "json":
                record = parse_json(data)
            else:
                try:
                    caption = data.decode()
                except UnicodeDecodeError as error:
                    raise RecordError("text is not UTF-8", str(error)) from error
        return record, caption

    def _conversation(
        self, shard: Path, key: str, parts: tuple[Part, ...], record: tuple[dict[str, object], str]
    ) -> Conversation:
        return conversation_of(
            record[0],
            id=f"{self.source}/{shard.name}/{key}",
            images=[self._name(shard, part) for part in parts if is_image(part.field)],
            videos=[[self._frame(shard, *frame) for frame in video] for video in self._videos(parts)],
            source=self.source,
            caption=record[1],
            caption_prompt=self.caption_prompt,
        )

    def _frame(self, shard: Path, part: Part, number: int) -> str:
        name = self._name(shard, part)
        return name if part.frames == 1 else str(Frame(name, number))

    def _name(self, shard: Path, part: Part) -> str:
        if part.offset >= 0:
            return str(ByteRange(str(shard), part.offset, part.size))
        return str(shard / part.path)  # the latter alone where it is absolute


def _is_shown(field: str) -> bool:
    return is_image(field) or bool(video_of(field))


def _measured(name: str, part: Part) -> tuple[Part, tuple[int, int]]:
    """Look at an image's header, or at a video's frames."""
    if not video_of(part.field):
        return part, _size(name)
    try:
        frames, size = measure(name)
    except FileNotFoundError as error:
        raise RecordError("missing file", str(error), file=name) from error
    except (OSError, SyntaxError, ValueError, ImportError, Image.DecompressionBombError) as error:
        if isinstance(error, ImportError) and Path(part.path or f"a.{part.field}").suffix.lower() in VIDEO_SUFFIXES:
            raise  # a sound file, for all that is known
        raise RecordError("undecodable video", str(error), file="" if ByteRange.parse(name) else name) from error
    return replace(part, frames=frames), size


def _size(name: str) -> tuple[int, int]:
    found = ByteRange.parse(name)
    try:
        if found is None:
            return _header(name)
        try:
            return _header(io.BytesIO(found.read(HEADER)))
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
            return _header(io.BytesIO(found.read()))  # WebP and TIFF look at the end too
    except FileNotFoundError as error:
        raise RecordError("missing file", str(error), file=name) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RecordError("undecodable image", str(error), file="" if found else name) from error


def _header(file: str | io.BytesIO) -> tuple[int, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            return image.size
