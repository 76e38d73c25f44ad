"""What a binary was built from, and why it was not: left beside it by the build, read when it is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

# binary -> its sources in csrc/
PATTERNS = {"_C": ("*.cpp", "*.h", "ops/*.cpp", "ops/*.h"), "_cuda": ("*.cu",)}
FAILED = "_C.failed"


def digest(csrc: Path, patterns: Sequence[str]) -> str:
    """Return a hash over the names and bytes of the files that match."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in csrc.glob(pattern)}):
        found.update(f"{path.relative_to(csrc).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return found.hexdigest()[:16]


def record(binary: Path, csrc: Path) -> None:
    """Write beside a binary what it was built from."""
    name = binary.name.partition(".")[0]
    binary.with_name(f"{name}.sources").write_text(digest(csrc, PATTERNS[name]) + "\n")
    if name == "_C":
        binary.with_name(FAILED).unlink(missing_ok=True)


def outdated(binary: Path, csrc: Path) -> bool:
    """Tell whether the sources are not those of the binary: its operators may have other arguments."""
    name = binary.name.partition(".")[0]
    kept = binary.with_name(f"{name}.sources")
    if not csrc.is_dir():  # installed, without its sources
        return False
    return not kept.is_file() or kept.read_text().strip() != digest(csrc, PATTERNS[name])
