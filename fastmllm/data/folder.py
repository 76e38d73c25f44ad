"""A folder (or .tar) of photographs, one folder a class."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from fastmllm.data.augment import rng_of
from fastmllm.data.cache import atomic_path
from fastmllm.data.images import ImageError, open_image
from fastmllm.data.progress import track
from fastmllm.data.text import normalise

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "valid", "val", "test")


@dataclass(frozen=True, kw_only=True, slots=True)
class Photos:
    """Photographs by class.

    Args:
        classes: names, from the folders' names.
        train: class -> files.
        eval: class -> files, none of which has the same bytes as a training photograph.
        skipped: reason -> count.
        notes: what was decided about the folder.
    """

    classes: tuple[str, ...]
    train: Mapping[str, tuple[Path, ...]]
    eval: Mapping[str, tuple[Path, ...]]
    skipped: Counter[str]
    notes: tuple[str, ...]


def extract_tar(archive: Path, cache: Path) -> Path:
    """Unpack a .tar of images into the cache once.

    Only regular files with an image's suffix are written; links and devices are left out.

    Args:
        archive: .tar, .tar.gz, ...
        cache: asset folder.

    Returns:
        The folder; its name changes with the archive's size and time.

    Raises:
        ValueError: not a tar, damaged, or a member that points outside of the folder.
        OSError: not enough space.
    """
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache / "photos" / f"{archive.name.split('.')[0]}-{key}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tar-", dir=target.parent))
    try:
        with tarfile.open(archive) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and Path(m.name).suffix.lower() in SUFFIXES]
            needed, free = sum(m.size for m in members), shutil.disk_usage(target.parent).free
            if needed > free:
                raise OSError(f"{archive}: needs {needed} bytes, {free} free; set FASTMLLM_CACHE to another disk")
            for member in track(members, f"unpacking {archive.name}", len(members)):
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or "\\" in member.name:
                    raise ValueError(f"{archive}: member {member.name!r} points outside of the folder; do not use it")
                file = tar.extractfile(member)
                assert file is not None  # a regular file
                path = temporary.joinpath(*name.parts)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as out:
                    shutil.copyfileobj(file, out)
        os.replace(temporary, target)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{archive}: not a tar archive, or damaged ({error}); fetch it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def read_folder(path: str | Path, *, cache: Path, eval_share: float = 0.2, seed: int = 0) -> Photos:
    """Find the photographs of a folder or a .tar, check that each can be decoded, and split them.

    With train/<class>/ and validation/<class>/ (or val/, valid/, test/) that split is taken; with <class>/ alone,
    a seeded share of each class is held out.

    Args:
        path: folder, .tar, or a folder that holds one .tar and no folders.
        cache: asset folder; remembers which files were checked.
        eval_share: share of a class that is held out where the folder has no split of its own.
        seed: of that split.

    Returns:
        Photographs by class; files that cannot be decoded are counted in `skipped`.

    Raises:
        ValueError: no such folder, fewer than two classes, a split without usable photographs, or two classes whose
            names are one name once answers are compared.
    """
    notes: list[str] = []
    root = _open(path, cache, notes)
    while len(inner := _folders(root)) == 1 and _folders(inner[0]):
        root = inner[0]  # an archive with one folder around everything
    parts = {folder.name.lower(): folder for folder in _folders(root)}
    train_root = next((parts[name] for name in TRAIN_NAMES if name in parts), None)
    eval_root = next((parts[name] for name in EVAL_NAMES if name in parts), None)
    skipped: Counter[str] = Counter()
    checks = _checked(root, cache, skipped, notes)
    if train_root is not None and eval_root is not None:
        train, held = _classes(train_root, checks), _classes(eval_root, checks)
        notes.append(f"split of the folder itself: {train_root.name}/ and {eval_root.name}/")
    else:
        train, held = _split(_classes(train_root or root, checks), eval_share, seed)
        notes.append(f"no split in the folder: {eval_share:.0%} of each class held out, seed {seed}")
    _drop_copies(train, held, checks, skipped)
    classes = tuple(sorted(name for name in train if train[name] and held.get(name) and _speakable(name)))
    for name in sorted((set(train) | set(held)) - set(classes)):
        empty = "no usable photograph in one of the two splits"
        reason = empty if _speakable(name) else "no letter or digit in its name"
        notes.append(f"class {name!r} left out: {reason}")
    _tell_apart(path, classes)
    if len(classes) < 2:
        raise ValueError(
            f"data.path={path}: {len(classes)} usable classes; found {_describe(train, held, skipped)}; "
            "give one folder a class, two at least, with images"
        )
    return Photos(
        classes=classes,
        train={name: tuple(train[name]) for name in classes},
        eval={name: tuple(held[name]) for name in classes},
        skipped=skipped,
        notes=tuple(notes),
    )


def _speakable(name: str) -> bool:
    return any(char.isalnum() for char in name)


def _tell_apart(path: str | Path, classes: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for name in classes:
        if (other := seen.setdefault(normalise(name), name)) != name:
            raise ValueError(
                f"data.path={path}: classes {other!r} and {name!r} are both {normalise(name)!r} once punctuation is "
                "dropped, as answers are compared; rename one of the folders"
            )


def _open(path: str | Path, cache: Path, notes: list[str]) -> Path:
    # The folder that holds the classes: as given, or unpacked from the .tar given or found alone in the folder.
    root = Path(path).expanduser()
    if not root.exists():
        raise ValueError(f"data.path={path}: no such folder or .tar; check the path")
    if root.is_file():
        return extract_tar(root, cache)
    if _folders(root):
        return root
    files = [file for file in sorted(root.iterdir()) if file.is_file() and not file.name.startswith(".")]
    archives = [file for file in files if file.name.lower().endswith(TAR_SUFFIXES)]
    if len(archives) == 1:
        notes.append(f"photographs from {archives[0].name}, the only archive of the folder")
        return extract_tar(archives[0], cache)
    if archives:
        names = ", ".join(file.name for file in archives)
        raise ValueError(f"data.path={path}: no folders, but {len(archives)} archives ({names}); name one of them")
    others = [file.name for file in files if file.suffix.lower() not in SUFFIXES]
    found = f"{len(files) - len(others)} images and {len(others)} other files"
    found += f" ({', '.join(others[:4])}{', ...' if len(others) > 4 else ''})" if others else ""
    raise ValueError(
        f"data.path={path}: no folders in it, but {found}; give one folder a class, or a .tar of such folders"
    )


def _describe(
    train: Mapping[str, list[Path]], held: Mapping[str, list[Path]], skipped: Counter[str], most: int = 8
) -> str:
    names = sorted(set(train) | set(held))
    sizes = [f"{name!r} ({len(train.get(name, ()))} + {len(held.get(name, ()))})" for name in names[:most]]
    more = [f"{len(names) - most} more"] if len(names) > most else []
    text = f"folders {', '.join(sizes + more)} with training + evaluation images" if names else "no folders"
    return text + "".join(f", {count} x {reason}" for reason, count in skipped.items())


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and not child.name.startswith("."))


def _classes(root: Path, checks: Mapping[Path, str]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for folder in _folders(root):
        name = " ".join(folder.name.replace("_", " ").lower().split()) or folder.name
        files = sorted(file for file in folder.rglob("*") if file in checks)
        found.setdefault(name, []).extend(files)
    return found


def _checked(root: Path, cache: Path, skipped: Counter[str], notes: list[str]) -> dict[Path, str]:
    # Usable file -> digest of its bytes. Decoding is the only way to find a truncated file, so it is done once
    # for each (path, size, time) and remembered.
    named = [file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES]
    files = sorted(file for file in named if file.is_file())
    if lost := sorted(str(file.relative_to(root)) for file in named if not file.exists()):
        skipped["link that leads nowhere"] += len(lost)
        notes.append(f"links that lead nowhere: {_some(lost)}")
    stamp = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]
    record = cache / "photos" / f"checked-{stamp}.json"
    try:
        known: dict[str, list[str]] = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}

    def check(file: Path) -> tuple[str, str, str]:
        stat = file.stat()
        key = f"{file.relative_to(root)}|{stat.st_size}|{stat.st_mtime_ns}"
        if key in known:
            return key, known[key][0], known[key][1]
        try:
            open_image(file)
            return key, hashlib.sha256(file.read_bytes()).hexdigest(), ""
        except ImageError as error:
            return key, "", str(error)

    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        results = list(track(pool.map(check, files), "checking photographs", len(files)))
    fresh = {key: [digest, problem] for key, digest, problem in results}
    if fresh != known:
        with atomic_path(record) as temporary:
            temporary.write_text(json.dumps(fresh), encoding="utf-8")
    if bad := [str(file.relative_to(root)) for file, (_, digest, _) in zip(files, results, strict=True) if not digest]:
        skipped["unreadable image"] += len(bad)
        notes.append(f"unreadable images: {_some(bad)}")
    return {file: digest for file, (_, digest, _) in zip(files, results, strict=True) if digest}


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _split(
    classes: Mapping[str, list[Path]], share: float, seed: int
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    train: dict[str, list[Path]] = {}
    held: dict[str, list[Path]] = {}
    for name, files in classes.items():
        order = rng_of("split", seed, name).permutation(len(files))
        count = min(len(files) - 1, max(1, round(share * len(files)))) if len(files) > 1 else 0
        held[name] = [files[i] for i in sorted(order[:count])]
        train[name] = [files[i] for i in sorted(order[count:])]
    return train, held


def _drop_copies(
    train: Mapping[str, list[Path]], held: dict[str, list[Path]], checks: Mapping[Path, str], skipped: Counter[str]
) -> None:
    seen = {checks[file] for files in train.values() for file in files}
    for name, files in held.items():
        kept = [file for file in files if checks[file] not in seen]
        if len(kept) < len(files):
            skipped["evaluation photograph that is also in training"] += len(files) - len(kept)
        held[name] = kept
