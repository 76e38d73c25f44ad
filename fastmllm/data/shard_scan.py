"""What stands in a shard: tar, JSONL, a JSON list, or a folder, read once from one end to the other.

Of WebDataset's conventions these are followed: a sample is a run of neighbouring members with one key; the key is the
path up to the first dot of the file's name, the rest is the field, in lower case; directories, links and names that
begin with a dot or with `__` are left out.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from fastmllm.data.folder import SUFFIXES as IMAGE_SUFFIXES
from fastmllm.data.video import SUFFIXES as VIDEO_SUFFIXES

TEXT_FIELDS = ("json", "txt", "caption", "text")
_MEMBER = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)", re.DOTALL)
_VIDEO = re.compile(r"(video\d*)\..*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")  # elements of a JSON list
MAX_TEXT = 1 << 26  # bytes of a record, a line or a caption: more is a damaged file, and would be held whole
_CHUNK = 1 << 18  # characters of one read at a time


@dataclass(frozen=True, slots=True)
class Part:
    """A file of a sample.

    Args:
        field: `json`, `txt`, an image's (`jpg`, `0.png`), or a video's (`mp4`, `video.gif`; `video.0.jpg` is a frame).
        offset: of its bytes in the shard; -1 = a file of its own.
        size: in bytes; -1 = the whole file.
        path: of a file of its own, absolute or relative to the shard; "" = in the shard.
        frames: of a video or a part of one; 0 = not looked at.
    """

    field: str
    offset: int
    size: int
    path: str = ""
    frames: int = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A sample as it lies in a shard; with a `problem` it is none.

    Args:
        key: unique in a well-made shard.
        parts: texts, images and videos.
        problem: why nothing can be made of it: (reason, detail).
    """

    key: str
    parts: tuple[Part, ...] = field(default=())
    problem: tuple[str, str] | None = None


def scan(path: Path) -> Iterator[Entry]:
    """Go through a shard, telling its kind by its name.

    Raises:
        ValueError: a compressed tar, or a name of no kind.
    """
    name = path.name.lower()
    if path.is_dir():
        return _scan_folder(path)
    if name.endswith(".tar"):
        return _scan_tar(path)
    if name.endswith((".jsonl", ".ndjson")):
        return _scan_lines(path)
    if name.endswith(".json"):
        return _scan_list(path)
    if name.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        raise ValueError(f"{path}: a compressed tar has no random access; unpack it to .tar (images gain nothing)")
    raise ValueError(f"{path}: neither .tar, .jsonl, .json nor a folder; name a shard of one of these kinds")


def is_image(field: str) -> bool:
    """Tell whether a field is an image, by its suffix."""
    return f".{field.rpartition('.')[2]}" in IMAGE_SUFFIXES and not video_of(field)


def video_of(field: str) -> str:
    """Return the name of the video that a field is, or is a part of; "" for any other field.

    A file of frames (`mp4`) is one by its suffix. Images are frames of the video that their first word names: `video`,
    or `video` and a number.
    """
    suffix = f".{field.rpartition('.')[2]}"
    if suffix in VIDEO_SUFFIXES:
        return field
    return found[1] if suffix in IMAGE_SUFFIXES and (found := _VIDEO.fullmatch(field)) else ""


def leads_out(name: str) -> bool:
    """Tell whether a path within an archive is absolute or climbs above it, on any system."""
    pieces = name.replace("\\", "/").split("/")
    return ".." in pieces or not pieces[0] or pieces[0].endswith(":")


def _natural(part: Part) -> list[tuple[int, str]]:
    # 2.jpg before 10.jpg, and a plain jpg before both
    pieces = re.split(r"(\d+)", part.field.rpartition(".")[0])
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in pieces]


def _group(members: Iterable[tuple[str, Part]]) -> Iterator[Entry]:
    for key, run in groupby(members, key=lambda member: member[0]):
        parts = [part for _, part in run]
        fields = [part.field for part in parts]
        if doubled := sorted({f for f in fields if fields.count(f) > 1}):
            yield Entry(key, problem=("duplicate member", f"{key}.{doubled[0]} stands there twice"))
            continue
        shown = sorted((part for part in parts if is_image(part.field) or video_of(part.field)), key=_natural)
        texts = [part for part in parts if part.field in TEXT_FIELDS]
        if shown or texts:
            yield Entry(key, (*texts, *shown))
        else:
            what = f"neither an image, a video nor {TEXT_FIELDS}"
            yield Entry(key, problem=("no text", f"fields {', '.join(fields)}: {what}"))


def _field_of(name: str) -> tuple[str, str] | None:
    found = _MEMBER.fullmatch(name)
    if found is None or found[1].rpartition("/")[2].startswith("__"):
        return None
    return found[1], found[2].lower()


def _scan_tar(path: Path) -> Iterator[Entry]:
    size = path.stat().st_size
    problems: list[tuple[str, str, str]] = []

    def members() -> Iterator[tuple[str, Part]]:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps what it saw: a shard's members are many
                    if not member.isreg() or (named := _field_of(member.name)) is None:
                        continue
                    if leads_out(named[0]):
                        problems.append(("unsafe path", named[0], f"{member.name} points outside of the archive"))
                        continue
                    if member.offset_data + member.size > size:
                        problems.append(("truncated shard", named[0], f"{member.name} ends after the file does"))
                        return
                    yield named[0], Part(named[1], member.offset_data, member.size)
                end = tar.offset
            with path.open("rb") as file:  # tarfile takes a damaged header, or none, for the end
                file.seek(end)
                if not (block := file.read(512)) or any(block):
                    detail = f"no end-of-archive mark at byte {end}: cut off, or its header is damaged"
                    problems.append(("truncated shard", "", detail))
        except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
            problems.append(("truncated shard", "", str(error)))

    last = None
    for entry in _group(members()):
        if last is not None:
            yield last
        last = entry
    cut = next((key for reason, key, _ in problems if reason == "truncated shard"), None)
    if last is not None and last.key != cut:
        yield last  # else its parts before the cut are no sample
    for reason, key, detail in problems:
        yield Entry(key, problem=(reason, detail))


def _scan_folder(root: Path) -> Iterator[Entry]:
    names = sorted(str(file.relative_to(root).as_posix()) for file in root.rglob("*") if file.is_file())
    named = [(found, name) for name in names if (found := _field_of(name)) is not None]
    # by key: "a.jpg" and "a.txt" need not be neighbours, as "a-b.jpg" may stand between them
    named.sort(key=lambda item: (item[0][0], item[0][1]))
    return _group((key, Part(field, -1, -1, name)) for (key, field), name in named)


def _scan_lines(path: Path) -> Iterator[Entry]:
    with path.open("rb") as file:
        offset = 0
        number = 0
        while line := file.readline(MAX_TEXT):
            length, blank = len(line), not line.strip()
            while not line.endswith(b"\n") and (line := file.readline(MAX_TEXT)):
                length += len(line)
            if length > MAX_TEXT:
                yield Entry(str(number), problem=("text too large", f"a line of {length} bytes, above {MAX_TEXT}"))
            elif not blank:
                yield Entry(str(number), (Part("json", offset, length),))
            offset, number = offset + length, number + 1


def _scan_list(path: Path) -> Iterator[Entry]:
    """Go through the elements of one JSON list without holding it."""
    decoder, number, want = json.JSONDecoder(), -1, _CHUNK  # -1: before the list's bracket
    text, at, offset, ended = "", 0, 0, False  # offset: in bytes, of text[at]
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        while True:
            start = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too
            at, offset = start, offset + start - at
            if number < 0 and at < len(text):
                if text[at] != "[":
                    yield Entry("", problem=("wrong JSON", "the file holds no list; give a list, or .jsonl"))
                    return
                at, offset, number = at + 1, offset + 1, 0
                continue
            if text[at : at + 1] == "]":
                return
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                if ended or isinstance(error, RecursionError) or len(text) - at > MAX_TEXT:
                    detail = f"element {max(number, 0)} at byte {offset}, and all behind it: {error}"
                    yield Entry(str(max(number, 0)), problem=("wrong JSON", detail))
                    return
                more = file.read(want)
                text, at, ended, want = text[at:] + more, 0, not more, want * 2
                continue
            length = len(text[at:end].encode(errors="surrogateescape"))
            yield Entry(str(number), (Part("json", offset, length),))
            at, offset, number, want = end, offset + length, number + 1, _CHUNK
