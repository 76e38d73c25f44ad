"""How a sample of a shard is read: its texts whole, its images by name."""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from fastmllm.data.byte_range import ByteRange
from fastmllm.data.conversation import CAPTION_PROMPT, RecordError, conversation_of, image_names, parse_json
from fastmllm.data.sample import Conversation
from fastmllm.data.shard_scan import MAX_TEXT, Entry, Part, is_image, leads_out

HEADER = 1 << 16  # bytes that hold the size of nearly every image


@dataclass(frozen=True, kw_only=True, slots=True)
class Located:
    """A row of an index.

    Args:
        key: of the sample.
        parts: texts and images.
        sizes: (width, height) of each image in pixels, from its header.
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
    """

    root: Path
    source: str
    caption_prompt: str = CAPTION_PROMPT

    def locate(self, shard: Path, entry: Entry) -> Located:
        """Look at an entry while indexing: its text whole, its images' headers.

        Raises:
            RecordError: nothing can be learned from it.
        """
        record = self._record(shard, entry.parts)
        images = [part for part in entry.parts if is_image(part.field)]
        if not images:
            root = os.path.abspath(self.root)
            names = image_names(record[0])
            if shard.suffix.lower() == ".tar" and (bad := next(filter(leads_out, names), None)) is not None:
                raise RecordError("unsafe path", f"image {bad!r} points outside of the archive's folder")
            images = [Part("jpg", -1, -1, os.path.join(root, name)) for name in names]
        parts = (*(part for part in entry.parts if not is_image(part.field)), *images)
        self._conversation(shard, entry.key, parts, record)
        return Located(key=entry.key, parts=parts, sizes=tuple(_size(self._name(shard, part)) for part in images))

    def read(self, shard: Path, located: Located) -> Conversation:
        """Read a sample; its images are named, not opened.

        Raises:
            RecordError: the shard changed since it was indexed.
        """
        return self._conversation(shard, located.key, located.parts, self._record(shard, located.parts))

    def _record(self, shard: Path, parts: tuple[Part, ...]) -> tuple[dict[str, object], str]:
        record, caption = {}, ""
        for part in parts:
            if is_image(part.field):
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
            source=self.source,
            caption=record[1],
            caption_prompt=self.caption_prompt,
        )

    def _name(self, shard: Path, part: Part) -> str:
        if part.offset >= 0:
            return str(ByteRange(str(shard), part.offset, part.size))
        return str(shard / part.path)  # the latter alone where it is absolute


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
