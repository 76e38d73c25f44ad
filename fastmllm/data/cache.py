"""Where assets are kept, and how a file gets there whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return the folder for fetched and rendered assets (not created here).

    Returns:
        $FASTMLLM_CACHE, else $XDG_CACHE_HOME/fastmllm, else ~/.cache/fastmllm.
    """
    own = os.environ.get("FASTMLLM_CACHE")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "fastmllm"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path` and rename it on success, so that readers never see half a file.

    Args:
        path: the final name; parent folders are created.

    Raises:
        OSError: a full disk or a folder without write permission, with the remedy.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # the process that a leftover belonged to stands at its end
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=f".tmp-{os.getpid()}", dir=path.parent)
        temporary = Path(name)
        os.close(handle)
        os.chmod(temporary, 0o644)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            reason = os.strerror(error.errno)
            raise OSError(
                error.errno, f"{path}: {reason}; free some space or set FASTMLLM_CACHE to another folder"
            ) from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
