"""The families once more, under the oldest transformers that the drop-in supports (`make test` fetches it)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = sorted((ROOT / "build").glob("transformers-*"))


@pytest.mark.timeout(900)
@pytest.mark.skipif(not FOLDERS, reason="build/transformers-* is not there: make test fetches it")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_every_family(folder):
    env = {**os.environ, "PYTHONPATH": str(folder)}
    ask = [sys.executable, "-c", "import transformers; print(transformers.__version__)"]
    found = subprocess.run(ask, env=env, capture_output=True, text=True, check=True).stdout.strip()
    assert found == folder.name.removeprefix("transformers-")
    command = [sys.executable, "-m", "pytest", "tests/hf", "--no-header", "-k", "not trl and not compile and not zero3"]
    done = subprocess.run(
        [*command, "--ignore", "tests/hf/test_oldest_transformers.py"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 20
