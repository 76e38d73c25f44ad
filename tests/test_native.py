"""The native build: stable ABI, one pybind11 file, every clone of a loop, the planner, the CUDA library."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_build import judge

from fastmllm.kernels import _native
from fastmllm.kernels._sources import outdated, record

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"


@pytest.fixture(scope="module")
def extension() -> Path:
    if _native.EXTENSION_MISSING:
        pytest.skip(f"the C++ operators are {_native.EXTENSION_MISSING}")
    from fastmllm.kernels import _C

    return Path(_C.__file__)


def test_other_sources_are_seen_and_another_date_is_not(tmp_path):
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    binary = tmp_path / "_C.abi3.so"
    binary.touch()
    assert outdated(binary, csrc)  # nobody says what it was built from
    record(binary, csrc)
    os.utime(csrc / "ops" / "patch_embed.cpp", ns=(1, 2**62))
    assert not outdated(binary, csrc)
    (csrc / "ops" / "x.cpp").touch()
    assert outdated(binary, csrc)
    assert not outdated(binary, tmp_path / "installed without sources")


def test_a_skip_for_want_of_the_operators_is_a_failure():
    for reason, outcome in (("the C++ operators are not built: x", "failed"), ("triton is missing", "skipped")):
        report = SimpleNamespace(skipped=True, outcome="skipped", longrepr=("file", 1, f"Skipped: {reason}"))
        judge(report, "not built: x")
        assert report.outcome == outcome


def test_the_reason_of_a_failed_build_is_repeated(tmp_path):
    """The build leaves its reason beside the Python files, and loading them says it again."""
    (tmp_path / "kernels").mkdir()
    for name in ("_native.py", "_sources.py"):
        shutil.copy(ROOT / "kernels" / name, tmp_path / "kernels" / name)
    (tmp_path / "kernels" / "_C.failed").write_text("/usr/include has no Python.h (apt install python3-dev)\n")
    code = "import kernels._native as n; print(n.EXTENSION_MISSING)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("not built: /usr/include has no Python.h (apt install python3-dev)")


def test_the_extension_is_stable(extension):
    """One binary for every torch >= 2.10 and every CPython >= 3.10."""
    if shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("torch-abi-audit is not installed: pip install torch-abi-audit")
    command = [Path(sys.executable).parent / "torch-abi-audit", "--check", "both", "-v", extension]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "is not installed" in done.stderr or "No module named" in done.stderr:
        pytest.skip(f"torch-abi-audit cannot run: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ".abi3." in extension.name


def test_the_cpu_operators_are_registered(extension):
    import fastmllm.kernels.patch_embed  # noqa: F401

    for path in (CSRC / "ops").glob("*.cpp"):
        for name in re.findall(r'm\.impl\("(\w+)"', path.read_text()):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastmllm::{name}", "CPU"), name


def test_pybind11_binds_planners_only():
    users = [p.name for p in CSRC.rglob("*") if p.suffix in {".cpp", ".h", ".cu"} and "pybind11" in p.read_text()]
    assert users == ["bindings.cpp"]


def test_the_loops_include_no_torch():
    for path in [*CSRC.glob("*.cpp"), *CSRC.glob("*.h")]:
        assert "torch/" not in path.read_text(), f"{path.name}: torch belongs into csrc/ops/"


@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_every_clone_packs_alike(level, tmp_path):
    """Compile the loops for one level alone, as the loader picks them on such a machine."""
    compiler = shutil.which("g++")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if compiler is None or {"x86-64-v3": "avx2", "x86-64-v4": "avx512vl", "x86-64": "sse2"}[level] not in flags:
        pytest.skip(f"needs g++ and a machine with {level}")
    code = """
        #include "patch_embed.h"
        using namespace fastmllm;
        extern "C" void pack(const uint8_t *x, float *f, bfloat16 *b, double *d, const float *scale, const float *shift,
                             const double *wide_scale, const double *wide_shift, int64_t n, int64_t w, int64_t p,
                             int64_t run) {
          pack_patches(x, f, scale, shift, 0, n, w, p, run), pack_patches(x, b, scale, shift, 0, n, w, p, run);
          pack_patches(x, d, wide_scale, wide_shift, 0, n, w, p, run);
        }
        extern "C" void add(const float *b, const bfloat16 *p, bfloat16 *o, int64_t n, int64_t w) {
          add_offsets(b, p, o, 0, n, w);
        }"""
    (tmp_path / "shim.cpp").write_text(code)
    library = tmp_path / "loops.so"
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", f"-march={level}", "-DFASTMLLM_ONE_LEVEL"]
    files = [str(tmp_path / "shim.cpp"), str(CSRC / "patch_embed.cpp")]
    subprocess.run([*command, f"-I{CSRC}", *files, "-o", str(library)], check=True, capture_output=True)
    loops = ctypes.CDLL(str(library))
    long, pointer = ctypes.c_int64, lambda t: ctypes.c_void_p(t.data_ptr())
    patch, grid_h, grid_w = 7, 3, 5
    image = torch.arange(grid_h * patch * grid_w * patch * 3, dtype=torch.int64).remainder(256).to(torch.uint8)
    rows = image.view(grid_h, patch, grid_w, patch * 3).transpose(1, 2).reshape(15, -1)
    scale, shift = torch.full((patch * 3,), 2.0**-7), torch.full((patch * 3,), -1.0)  # exact in every dtype
    want = rows.double() / 128 - 1
    got = [torch.full(want.shape, float("nan"), dtype=d) for d in (torch.float32, torch.bfloat16, torch.float64)]
    affine = (scale, shift, scale.double(), shift.double())
    sizes = map(long, (15, grid_w * patch * 3, patch, patch * 3))
    loops.pack(*map(pointer, (image, *got, *affine)), *sizes)
    for g in got:
        torch.testing.assert_close(g.double(), want, rtol=0, atol=0)
    bias, position = torch.randn(37), torch.randn(5, 37).bfloat16()
    position[0, 0], bias[1] = float("inf"), float("nan")
    out = torch.empty_like(position)
    loops.add(*map(pointer, (bias, position, out)), long(5), long(37))
    torch.testing.assert_close(out, (bias + position.float()).bfloat16(), rtol=0, atol=0, equal_nan=True)


def _first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    bins: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fits = (b for b in bins if sum(lengths[i] for i in b) + lengths[item] <= capacity)
        chosen = next(fits, None)
        if chosen is None:
            bins.append(chosen := [])
        chosen.append(item)
    return [sorted(b) for b in bins]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 20), max_size=40))
def test_planner_is_first_fit_decreasing(lengths):
    planner = pytest.importorskip("fastmllm._planner", reason="the planner is not built")
    assert planner.pack_first_fit(lengths, 20) == _first_fit(lengths, 20)


def test_planner_names_what_does_not_fit():
    planner = pytest.importorskip("fastmllm._planner", reason="the planner is not built")
    with pytest.raises(ValueError, match="item 1 has length 9, but a bin holds 0 to 8"):
        planner.pack_first_fit([3, 9], 8)
    with pytest.raises(ValueError, match="item 0 has length -1"):
        planner.pack_first_fit([-1], 8)
    assert planner.pack_first_fit([], 8) == []


@pytest.mark.slow
def test_the_cuda_library_compiles_and_registers(tmp_path):
    """Without a GPU and without a CUDA torch: no spill (the build fails on one), and the operators are found."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")
    library, stub = tmp_path / "_cuda.so", tmp_path / "stub"
    command = [sys.executable, str(CSRC / "build_cuda.py"), "--out", str(library), "--stub", str(stub)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    code = (
        "import sys, torch, fastmllm.kernels.insert_features\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for name in ('insert_features', 'insert_features_bwd'):\n"
        "    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'fastmllm::{name}', 'CUDA'), name\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(stub), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(library)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
