from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmllm.data.build import DataConfig, build
from fastmllm.data.folder import extract_tar, read_folder


def photo(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    for c, name in enumerate(("hat", "long_shirt", "shoe")):
        for i in range(10):
            photo(tmp_path / "photos" / name / f"{i}.png", 100 * c + i)
    return tmp_path / "photos"


def test_a_plain_folder_is_split_by_class_and_seed(plain: Path, tmp_path: Path) -> None:
    first = read_folder(plain, cache=tmp_path / "c", eval_share=0.3, seed=1)
    again = read_folder(plain, cache=tmp_path / "c", eval_share=0.3, seed=1)
    other = read_folder(plain, cache=tmp_path / "c", eval_share=0.3, seed=2)
    assert first == again
    assert first.eval != other.eval
    assert first.classes == ("hat", "long shirt", "shoe")
    for name in first.classes:
        assert len(first.eval[name]) == 3
        assert len(first.train[name]) == 7
        assert not set(first.train[name]) & set(first.eval[name])


def test_a_folder_with_its_own_split_keeps_it(tmp_path: Path) -> None:
    for c, name in enumerate(("hat", "shoe")):
        photo(tmp_path / "p" / "train" / name / "a.png", c)
        photo(tmp_path / "p" / "validation" / name / "b.jpg", 10 + c)
    photos = read_folder(tmp_path / "p", cache=tmp_path / "c")
    assert [file.name for file in photos.train["hat"]] == ["a.png"]
    assert [file.name for file in photos.eval["hat"]] == ["b.jpg"]


def test_unreadable_photographs_are_skipped_and_counted(plain: Path, tmp_path: Path) -> None:
    broken = photo(plain / "hat" / "x.png", 5)
    broken.write_bytes(broken.read_bytes()[:60])
    (plain / "shoe" / "y.jpg").write_bytes(b"")
    (plain / "shoe" / "notes.txt").write_text("not counted")
    for _ in range(2):  # the second time from the record of the first
        photos = read_folder(plain, cache=tmp_path / "c")
        assert photos.skipped == {"unreadable image": 2}
        assert broken not in photos.train["hat"] + photos.eval["hat"]
        assert "unreadable images: hat/x.png, shoe/y.jpg" in photos.notes
    photo(broken, 77)  # mended: looked at again
    assert read_folder(plain, cache=tmp_path / "c").skipped == {"unreadable image": 1}


def test_tiff_is_read_and_a_dangling_link_is_counted(plain: Path, tmp_path: Path) -> None:
    scan = photo(plain / "hat" / "scan.tif", 6)
    (plain / "shoe" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    photos = read_folder(plain, cache=tmp_path / "c")
    assert scan in (*photos.train["hat"], *photos.eval["hat"])
    assert photos.skipped == {"link that leads nowhere": 1}
    assert "links that lead nowhere: shoe/gone.png" in photos.notes


def test_a_class_needs_a_name_of_its_own(plain: Path, tmp_path: Path) -> None:
    for i in range(3):
        photo(plain / "_" / f"{i}.png", 500 + i)
    splits = build(DataConfig(path=str(plain), cache=str(tmp_path / "c")))
    assert splits.concepts == ("hat", "long shirt", "shoe")
    assert "class '_' left out: no letter or digit in its name" in splits.notes
    for name in ("c++", "c#"):
        for i in range(3):
            photo(plain / name / f"{i}.png", 600 + i + 10 * len(name))
    with pytest.raises(ValueError, match=r"classes 'c#' and 'c\+\+' are both 'c' once punctuation is dropped.*rename"):
        read_folder(plain, cache=tmp_path / "c")


def test_a_copy_of_a_training_photograph_is_not_tested_on(tmp_path: Path) -> None:
    for name in ("hat", "shoe"):
        photo(tmp_path / "p" / "train" / name / "a.png", len(name))
        photo(tmp_path / "p" / "val" / name / "other.png", 50 + len(name))
    photo(tmp_path / "p" / "val" / "hat" / "copy.png", 3)  # the bytes of train/hat/a.png
    photos = read_folder(tmp_path / "p", cache=tmp_path / "c")
    assert [file.name for file in photos.eval["hat"]] == ["other.png"]
    assert photos.skipped == {"evaluation photograph that is also in training": 1}


def test_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such folder or \.tar"):
        read_folder(tmp_path / "absent", cache=tmp_path / "c")
    photo(tmp_path / "one" / "hat" / "a.png", 0)
    photo(tmp_path / "one" / "hat" / "b.png", 1)
    (tmp_path / "one" / "empty").mkdir()
    found = r"1 usable classes; found folders 'empty' \(0 \+ 0\), 'hat' \(1 \+ 1\) .*; give one folder a class"
    with pytest.raises(ValueError, match=found):
        read_folder(tmp_path / "one", cache=tmp_path / "c")
    (tmp_path / "bad.tar").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"bad\.tar: not a tar archive"):
        read_folder(tmp_path / "bad.tar", cache=tmp_path / "c")


def pack(plain: Path, archive: Path) -> Path:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w") as tar:
        tar.add(plain, ".")
    return archive


def test_a_folder_with_nothing_but_one_tar_is_that_tar(plain: Path, tmp_path: Path) -> None:
    archive = pack(plain, tmp_path / "got" / "photos.tar")
    (archive.parent / "LICENSE").write_text("not a photograph")
    photos = read_folder(archive.parent, cache=tmp_path / "c")
    assert photos.train == read_folder(archive, cache=tmp_path / "c").train
    assert photos.notes[0] == "photographs from photos.tar, the only archive of the folder"
    (archive.parent / "more.TAR").write_bytes(archive.read_bytes())
    with pytest.raises(ValueError, match=r"no folders, but 2 archives \(more\.TAR, photos\.tar\); name one"):
        read_folder(archive.parent, cache=tmp_path / "c")


def test_class_folders_go_before_a_tar_beside_them(plain: Path, tmp_path: Path) -> None:
    before = read_folder(plain, cache=tmp_path / "c")
    pack(plain, plain / "old.tar")
    assert read_folder(plain, cache=tmp_path / "c") == before


def test_a_folder_without_classes_names_what_it_holds(tmp_path: Path) -> None:
    photo(tmp_path / "p" / "a.png", 0)
    (tmp_path / "p" / "photos.zip").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no folders in it, but 1 images and 1 other files \(photos\.zip\); give one"):
        read_folder(tmp_path / "p", cache=tmp_path / "c")


def test_the_home_folder_is_expanded(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(plain.parent))
    assert read_folder("~/photos", cache=tmp_path / "c").classes == ("hat", "long shirt", "shoe")


def test_a_tar_is_unpacked_once_and_without_links(plain: Path, tmp_path: Path) -> None:
    archive = tmp_path / "photos.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(plain, "around")
        link = tarfile.TarInfo("around/hat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    photos = read_folder(archive, cache=tmp_path / "c")
    assert photos.classes == ("hat", "long shirt", "shoe")
    folder = extract_tar(archive, tmp_path / "c")
    marker = folder / "around" / "hat" / "0.png"
    before = marker.stat().st_mtime_ns
    assert extract_tar(archive, tmp_path / "c") == folder
    assert marker.stat().st_mtime_ns == before
    assert not (folder / "around" / "hat" / "link.png").is_symlink()
    assert not list((tmp_path / "c" / "photos").glob(".tar-*"))


@pytest.mark.parametrize("name", ["../escape.png", "/tmp-escape.png", "a/../../escape.png"])
def test_a_member_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 4
        tar.addfile(info, io.BytesIO(b"data"))
    with pytest.raises(ValueError, match="points outside of the folder"):
        extract_tar(archive, tmp_path / "c")
    assert not list(tmp_path.rglob("*escape.png"))
    assert not list((tmp_path / "c" / "photos").iterdir())


def test_the_same_recipe_builds_from_photographs(plain: Path, tmp_path: Path) -> None:
    config = DataConfig(path=str(plain), cache=str(tmp_path / "c"), max_train_per_class=4)
    splits = build(config)
    assert set(splits.train) == set(splits.eval) == {"name", "exists", "yes_no"}
    assert len(splits.train["name"]) == 12
    assert splits.concepts == ("hat", "long shirt", "shoe")
    assert not {s.image for s in splits.train["name"]} & {s.image for s in splits.eval["name"]}
    assert (splits.unseen_team, splits.eval_team) == (False, "")
    assert build(config) == splits
