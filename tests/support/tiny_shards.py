"""Tiny shards: WebDataset tars, JSONL and folders with images of a few pixels."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def png(colour: int = 0, size: tuple[int, int] = (4, 4), form: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (colour % 256, 7, 9)).save(out, format=form)
    return out.getvalue()


def talk(*turns: str, images: int = 0) -> dict[str, Any]:
    """LLaVA's conversation of questions and answers in turn; `images` placeholders stand in front."""
    entries = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    entries[0]["value"] = "<image>\n" * images + entries[0]["value"]
    return {"conversations": entries}


def write_tar(path: Path, members: Iterable[tuple[str, bytes | dict[str, Any]]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def captions(folder: Path, shards: int, each: int, size: tuple[int, int] = (4, 4)) -> str:
    """Write shards of captioned images, caption "s<shard>-<number>"; return the pattern that names them."""
    for s in range(shards):
        members = [
            member
            for i in range(each)
            for member in ((f"{i:03}.png", png(s * each + i, size)), (f"{i:03}.txt", f"s{s}-{i}".encode()))
        ]
        write_tar(folder / f"shard-{s:03}.tar", members)
    return str(folder / f"shard-{{000..{shards - 1:03}}}.tar")


def scene(seed: int, size: tuple[int, int] = (48, 48), form: str = "PNG", quality: int = 75) -> bytes:
    """A smooth picture: blobs of colour, as photographs have and noise has not."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    out = io.BytesIO()
    picture = Image.fromarray(coarse).resize((96, 96), Image.Resampling.BICUBIC)
    picture.resize(size, Image.Resampling.BICUBIC).save(out, format=form, quality=quality)
    return out.getvalue()
