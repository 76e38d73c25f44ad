"""Compile the CUDA C++ operators (csrc/*.cu) into kernels/_cuda.so; needs nvcc and torch's headers, not a CUDA torch.

The objects carry machine code for sm_80, sm_90a and sm_100a, and PTX for what comes after. A kernel that spills
registers or uses stack is an error. Without a CUDA torch, a stub stands in for libtorch_cuda.so at link time; --stub
keeps it, for a process that only looks whether the operators register.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
ARCHITECTURES = {"80": "[sm_80,compute_80]", "90a": "sm_90a", "100a": "sm_100a"}
STUB = "int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }"  # only in libtorch_cuda


def find_nvcc() -> str | None:
    """Return the compiler: CUDA_HOME's, or the first on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def spills(log: str) -> list[str]:
    """Return the lines of ptxas's report that mention stack or spills, but for zero bytes."""
    return [line.strip() for line in log.splitlines() if re.search(r"\b[1-9]\d* bytes (stack|spill|cumulative)", line)]


def build(out: Path, stub: Path | None = None) -> None:
    """Compile every .cu file and link them.

    Args:
        out: the shared library to write.
        stub: folder to keep the stand-in libtorch_cuda.so in, or None.

    Raises:
        RuntimeError: no nvcc, the compiler fails, or a kernel spills.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc not found: install the CUDA toolkit, or set CUDA_HOME")
    torch_root = Path(torch.__file__).parent
    flags = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DTORCH_STABLE_ONLY", "-Xptxas", "-v", f"-I{torch_root / 'include'}"]
    flags += [f"-gencode=arch=compute_{arch},code={code}" for arch, code in ARCHITECTURES.items()]
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted(SOURCES.glob("*.cu")):
            objects.append(str(Path(folder) / f"{source.stem}.o"))
            log = _run(nvcc, *flags, "-c", str(source), "-o", objects[-1])
            if found := spills(log):
                raise RuntimeError(f"{source.name}: a kernel spills registers:\n" + "\n".join(found))
        libraries = [torch_root / "lib"]
        if not (libraries[0] / "libtorch_cuda.so").exists():
            libraries.append(stub or Path(folder))
            _stub(libraries[-1])
        out.parent.mkdir(parents=True, exist_ok=True)
        search = [f"-L{path}" for path in libraries]
        needed = ["-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10"]
        temporary = out.with_suffix(".tmp")
        _run(nvcc, "-shared", *objects, *search, "-Xlinker", "--no-as-needed", *needed, "-o", str(temporary))
        temporary.replace(out)
    if out.name == "_cuda.so":
        runpy.run_path(str(SOURCES.parent / "fastmllm" / "kernels" / "_sources.py"))["record"](out, SOURCES)


def _stub(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "stub.c"
    source.write_text(STUB)
    compiler = os.environ.get("CC") or "cc"
    name = "libtorch_cuda.so"
    _run(compiler, "-shared", "-fPIC", str(source), f"-Wl,-soname,{name}", "-o", str(folder / name))


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=SOURCES.parent / "kernels" / "_cuda.so")
    parser.add_argument("--stub", type=Path, default=None, help="folder to keep the stand-in libtorch_cuda.so in")
    options = parser.parse_args()
    try:
        build(options.out, options.stub)
    except RuntimeError as error:
        sys.exit(f"fastmllm: {error}")
    print(f"wrote {options.out}")
