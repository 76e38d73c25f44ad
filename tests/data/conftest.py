"""A small emoji world in npm's form, so that nothing is fetched, and a small tokenizer."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from fastmllm.data.emoji_groups import PICTURABLE
from fastmllm.data.emoji_sources import LABELS_PACKAGE, NPM_TEAMS

GROUPS = ("animal", "fruit", "vehicle", "tool")
CHARS = [char for group in GROUPS for char in PICTURABLE[group][:4]]
SHAPES = {
    "noto": '<rect width="80" height="80" x="10" y="10" fill="{}"/>',
    "fluent": '<circle cx="50" cy="50" r="40" fill="{}"/>',
    "openmoji": '<rect width="60" height="60" x="20" y="20" fill="none" stroke="{}" stroke-width="9"/>',
    "twemoji": '<path d="M50 5L95 95L5 95z" fill="{}"/>',
}


def word(i: int) -> str:
    return "thing " + "abcdefghijklmnopqrstuvwxyz"[i]


def write_tgz(path: Path, members: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def package_file(cache: Path, package: str, version: str) -> Path:
    return cache / "emoji" / "packages" / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"


def write_team(cache: Path, team: str) -> None:
    package, version, _ = NPM_TEAMS[team]
    colours = [f"rgb({37 * i % 256},{91 * i % 256},{(53 * i + 80) % 256})" for i in range(len(CHARS))]
    icons = {word(i): {"body": SHAPES[team].format(colours[i])} for i in range(len(CHARS))}
    chars = {f"{ord(char):x}": word(i) for i, char in enumerate(CHARS)}
    content = {"icons.json": {"icons": icons, "width": 100, "height": 100}, "chars.json": chars}
    write_tgz(package_file(cache, package, version), content)


def write_labels(cache: Path) -> None:
    def table(language: str) -> list[dict[str, object]]:
        names = [word(i) if language == "en" else f"物{i}" for i in range(len(CHARS))]
        rows: list[dict[str, object]] = [
            {"hexcode": f"{ord(char):X}-FE0F", "label": name, "group": 3}
            for char, name in zip(CHARS, names, strict=True)
        ]
        return [*rows, {"hexcode": "1F3FB", "label": "light skin tone", "group": 2}]

    content = {f"{language}/data.json": table(language) for language in ("en", "zh")}
    write_tgz(package_file(cache, LABELS_PACKAGE[0], LABELS_PACKAGE[1]), content)


@pytest.fixture(scope="session")
def emoji_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with four teams and names, as after a first run with npm."""
    pytest.importorskip("resvg_py", reason="drawings need resvg-py")
    cache = tmp_path_factory.mktemp("emoji-cache")
    for team in NPM_TEAMS:
        write_team(cache, team)
    write_labels(cache)
    return cache


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with the chat's special tokens: represents any text, as SmolLM2's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["What is this? red apple user assistant"] * 3, trainer)
    return made


@pytest.fixture(scope="session")
def standing_pool(tmp_path_factory: pytest.TempPathFactory):
    """Eight drawings of one colour each, a notch at the top left, with names in two languages."""
    import numpy as np
    from PIL import Image

    from fastmllm.data.tasks import Subject

    folder = tmp_path_factory.mktemp("standing")
    names = {
        "ant": "蚂蚁", "bus": "巴士", "cat": "猫", "drum": "鼓", "eggs": "蛋",
        "fox": "狐狸", "goat": "山羊", "hat": "帽",
    }  # fmt: skip
    made = []
    for i, (name, chinese) in enumerate(names.items()):
        pixels = np.zeros((32, 32, 4), dtype=np.uint8)
        pixels[2:30, 2:30] = (30 * i, 255 - 30 * i, 20, 255)
        pixels[2:16, 2:16] = 0
        path = folder / f"{name}.png"
        Image.fromarray(pixels).save(path)
        group = "vehicle" if name == "bus" else "animal"
        known = {"en": name, "zh": chinese}
        made.append(Subject(key=name, path=str(path), concept=name, source="noto", group=group, names=known))
    return made
