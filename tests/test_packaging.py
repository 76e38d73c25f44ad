"""The package installs as sdist and wheel, says what it lacks, and imports where nothing optional is there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SDIST = "import sys, setuptools.build_meta as b; b.build_sdist(sys.argv[1])"
WHEEL = "import sys, setuptools.build_meta as b; b.build_wheel(sys.argv[1])"
# Nothing optional, a broken flash-attn, and a package of Hugging Face's name `kernels` beside us.
IMPORTS = """
import importlib, pkgutil, sys
for name in ("triton", "flash_attn", "deepspeed", "transformers", "pybind11", "gguf", "onnx", "matplotlib"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
import torch, fastmllm, kernels
assert kernels.OWNER == "somebody else"
assert fastmllm.__file__.startswith(sys.argv[1]), fastmllm.__file__
from fastmllm import kernels as ours
names = sorted(m.name for m in pkgutil.iter_modules(ours.__path__) if not m.name.startswith("_"))
assert "layer_norm" in names and "patch_embed" in names, names
for name in names:
    importlib.import_module("fastmllm.kernels." + name)
import fastmllm.ops
from fastmllm.backends import backends
report = backends()
assert report["C++ operators"].startswith("not built: FASTMLLM_BUILD=0"), report
assert "pip install triton" in report["triton"], report
from fastmllm.kernels.layer_norm import layer_norm
from fastmllm.kernels.patch_embed import patch_embed
y = patch_embed(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.randn(12, 8).requires_grad_(), patch_size=2)
layer_norm(y, torch.ones(8)).sum().backward()
assert y.shape == (1, 4, 8)
from fastmllm.kernels.layer_norm import layer_norm_triton
try:
    layer_norm_triton(torch.ones(2, 8), torch.ones(8), None, None, None, 1e-5)
except ImportError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("a launch without triton must say what to install")
"""


def _run(*command: object, cwd: Path = ROOT, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "TRITON_INTERPRET"}}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=clean | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path, str]:
    """Build a pure-Python sdist from a copy of the sources and a wheel from it; return both and the build's output."""
    folder = tmp_path_factory.mktemp("packaging")
    source, out = folder / "source", folder / "out"
    source.mkdir()
    for name in ("fastmllm", "kernels", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            _run("cp", "-a", ROOT / name, source / name)
    for binary in (*source.rglob("*.so"), *source.rglob("*.pyc"), *source.rglob("*.sources")):
        binary.unlink()
    _run(sys.executable, "-c", SDIST, out, cwd=source, FASTMLLM_BUILD="0")
    sdist = next(out.glob("*.tar.gz"))
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    output = _run(sys.executable, "-c", WHEEL, out, cwd=unpacked, FASTMLLM_BUILD="0")
    return sdist, next(out.glob("*.whl")), output


def _modules(folder: Path) -> set[str]:
    return {p.name for p in folder.glob("*.py")}


def test_the_sdist_holds_the_sources(built):
    with tarfile.open(built[0]) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    for name in _modules(ROOT / "kernels"):
        assert f"fastmllm/kernels/{name}" in names
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".cpp", ".h", ".cu"} or path.name == "build_cuda.py":
            assert path.relative_to(ROOT).as_posix() in names
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_the_wheel_holds_the_package_only(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
        scripts = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    for name in _modules(ROOT / "kernels"):
        assert f"fastmllm/kernels/{name}" in names
    assert {n.split("/")[0] for n in names} == {"fastmllm", next(n for n in names if "dist-info" in n).split("/")[0]}
    assert "fastmllm/kernels/__init__.py" not in names
    assert not [n for n in names if "__pycache__" in n or n.endswith(".so")]
    assert re.search(r"^Requires-Dist: torch>=2\.11$", metadata, re.M)
    for extra in ("train", "hf", "flash", "demo", "dev"):
        assert f"Provides-Extra: {extra}" in metadata
    assert "fastmllm = fastmllm.cli:main" in scripts


def test_the_build_says_why_there_is_no_native_code(built):
    assert "installs as pure Python: FASTMLLM_BUILD=0" in built[2]


def test_the_wheel_imports_where_nothing_optional_is(built, tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("OWNER = 'somebody else'\n")
    with zipfile.ZipFile(built[1]) as archive:
        archive.extractall(tmp_path)
    _run(sys.executable, "-c", IMPORTS, tmp_path, cwd=tmp_path)


def test_the_build_fails_on_request_where_it_cannot_build(tmp_path):
    """FASTMLLM_BUILD=1 without a compiler stops; without the variable the same machine gets pure Python."""
    code = "import sys; sys.argv[1:] = ['--version']; exec(compile(open('setup.py').read(), 'setup.py', 'exec'))"
    bare = {"PATH": str(tmp_path), "CXX": "no-such-compiler"}
    code = f"__file__ = {str(ROOT / 'setup.py')!r}; {code}"
    command = [sys.executable, "-c", code]
    environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "FASTMLLM_BUILD"}} | bare
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "installs as pure Python: no C++ compiler found" in done.stderr
    environment["FASTMLLM_BUILD"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    bare = tmp_path / "bin"  # a compiler, and no headers of Python
    bare.mkdir()
    (bare / "g++").touch(0o755)
    code = "import sysconfig; sysconfig.get_path = lambda *a: '/no/headers'; " + command[-1]
    environment = {k: v for k, v in environment.items() if k != "FASTMLLM_BUILD"} | {"PATH": str(bare)}
    bad = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert "/no/headers has no Python.h (on Debian and Ubuntu: apt install python3-dev)" in bad.stderr
    assert "FASTMLLM_BUILD=1, but the native code cannot be built: no C++ compiler" in done.stderr


def test_kernels_is_a_link_and_never_a_package():
    assert (ROOT / "fastmllm" / "kernels").is_symlink()
    assert os.readlink(ROOT / "fastmllm" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()
