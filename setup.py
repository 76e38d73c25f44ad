"""Metadata, dependencies and the native build.

With a C++ compiler and torch in the environment (`--no-build-isolation`) the extensions are built; without, the package
installs as pure Python and says why. FASTMLLM_BUILD=0 never builds, FASTMLLM_BUILD=1 fails where it cannot build.
The CUDA C++ operators are built where torch has CUDA and nvcc is there; FASTMLLM_CUDA=0 never, FASTMLLM_CUDA=1 always.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (ROOT / "fastmllm" / "__init__.py").read_text()).group(1)
SOURCES = runpy.run_path(str(ROOT / "fastmllm" / "kernels" / "_sources.py"))
REQUIRED = os.environ.get("FASTMLLM_BUILD") == "1"
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall"]

DEPENDENCIES = [
    "torch>=2.11",
    "numpy",
    "pillow",
    "safetensors",
    "tokenizers",
    "pyyaml",
    "rich",
    "tyro",
    "triton>=3.6; platform_system == 'Linux' and platform_machine == 'x86_64'",
]
EXTRAS = {
    "train": ["deepspeed>=0.19.6", "huggingface_hub"],
    "hf": ["transformers>=5.17,<6"],
    "log": ["tensorboard"],  # wandb and trackio are used where they are installed
    "video": ["av"],  # GIF and WebP need nothing more
    "flash": ["flash-attn"],  # a source distribution: needs a CUDA torch and nvcc
    "demo": ["deepspeed>=0.19.6", "huggingface_hub", "gguf", "onnx", "resvg-py", "emoji", "matplotlib"],
    "dev": [
        "pytest>=8",
        "pytest-benchmark",
        "pytest-timeout",
        "hypothesis",
        "ruff",
        "mypy",
        "clang-format",
        "pybind11>=2.13",
        "types-PyYAML",
        "accelerate",  # transformers' GGUF reader, an oracle of the tests
        "peft",  # stages with lora; the drop-in survives these two
        "trl",
        "liger-kernel",  # what the drop-in's gated MLPs compute with, in Triton's interpreter
        "torch-abi-audit",
        "pycxxfilt",  # undeclared needs of torch-abi-audit
        "abi3info",
        "setuptools>=77",
        "wheel",
    ],
}


def why_not() -> str | None:
    """Return why the extensions cannot be built, or None."""
    if os.environ.get("FASTMLLM_BUILD") == "0":
        return "FASTMLLM_BUILD=0"
    compiler = os.environ.get("CXX") or (sysconfig.get_config_var("CXX") or "c++").split()[0]
    if not any(shutil.which(c) for c in (compiler, "c++", "g++", "clang++")):
        return "no C++ compiler found (on Debian and Ubuntu: apt install g++)"
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").is_file():
        return f"{headers} has no Python.h (on Debian and Ubuntu: apt install python3-dev)"
    try:
        import torch  # noqa: F401
    except ImportError:
        return "torch is not importable here (install torch first, then use --no-build-isolation)"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not importable here (pip install pybind11)"
    return None


def sources(*patterns: str) -> list[str]:
    """Return the files in csrc/ that match, relative to the root."""
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in (ROOT / "csrc").glob(pattern))


def extensions() -> list[Extension]:
    """Return the operators (torch's stable ABI; the binary loads in torch >= 2.10) and the planners (pybind11)."""
    import pybind11
    import torch

    include = Path(torch.__file__).parent / "include"
    planner = ["csrc/bindings.cpp", "csrc/planner.cpp"]
    operators = Extension(
        "fastmllm.kernels._C",
        [s for s in sources("*.cpp", "ops/*.cpp") if s not in planner],  # a new operator is two new files
        include_dirs=[str(include)],
        library_dirs=[str(include.parent / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            ("TORCH_STABLE_ONLY", None),
            ("Py_LIMITED_API", "0x030A0000"),
        ],
        extra_compile_args=CXX_FLAGS,
        depends=sources("*.h", "ops/*.h"),
        language="c++",
        py_limited_api=True,
    )
    planners = Extension(
        "fastmllm._planner",
        planner,
        include_dirs=[pybind11.get_include()],
        extra_compile_args=CXX_FLAGS,
        depends=sources("planner.h"),
        language="c++",
    )
    return [operators, planners]


def say(reason: str) -> None:
    """Print why there is no native code, or stop if it was asked for."""
    if REQUIRED:
        raise SystemExit(f"fastmllm: FASTMLLM_BUILD=1, but the native code cannot be built: {reason}")
    print(f"\n*** fastmllm installs as pure Python: {reason}\n*** fastmllm.backends() repeats this.\n", file=sys.stderr)


def wants_cuda() -> bool:
    """Return whether to build the CUDA C++ operators too."""
    if os.environ.get("FASTMLLM_CUDA") in ("0", "1"):
        return os.environ["FASTMLLM_CUDA"] == "1"
    import torch

    return torch.version.cuda is not None and shutil.which("nvcc") is not None


class BuildOrExplain(build_ext):
    """Build the extensions; if the compiler fails, install pure Python and say so."""

    def run(self) -> None:
        binary = Path(self.get_ext_fullpath("fastmllm.kernels._C"))
        # dates alone miss a file that came with an old one
        self.force = self.force or SOURCES["outdated"](binary, ROOT / "csrc")
        try:
            super().run()
        except Exception as error:
            why = f"{type(error).__name__}: {error} (the compiler's own words: python setup.py build_ext --inplace)"
            say(why)
            remember(why, binary.parent)
            self.extensions = []
        if not self.extensions:
            return
        SOURCES["record"](binary, ROOT / "csrc")
        if wants_cuda():
            out = binary.with_name("_cuda.so")
            done = subprocess.run(
                [sys.executable, str(ROOT / "csrc" / "build_cuda.py"), "--out", str(out)], check=False
            )
            if done.returncode and os.environ.get("FASTMLLM_CUDA") == "1":
                raise SystemExit("fastmllm: FASTMLLM_CUDA=1, but the CUDA operators could not be built")


class PythonAndReason(build_py):
    """Copy the Python files; where nothing was compiled, with the reason beside them."""

    def run(self) -> None:
        super().run()
        if reason is not None:
            remember(reason, (ROOT if self.editable_mode else Path(self.build_lib)) / "fastmllm" / "kernels")


def remember(why: str, folder: Path) -> None:
    """Leave the reason for `fastmllm.backends()`: pip shows nothing of a build that succeeds."""
    if not list(folder.glob("_C.*so")):  # an earlier build still serves
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SOURCES["FAILED"]).write_text(why + "\n")


reason = why_not()
if reason is not None:
    say(reason)
setup(
    name="fastmllm",
    version=VERSION,
    description="The visual half of a multimodal LLM at the speed of light, for training and for inference",
    long_description=(ROOT / "README.md").read_text() if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE*", "NOTICE*"],
    python_requires=">=3.11",
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    # fastmllm/kernels is a link to kernels/, which must never become a package of its own (see CONTRIBUTING)
    packages=find_namespace_packages(include=["fastmllm", "fastmllm.*"], exclude=["*.__pycache__", "*.__pycache__.*"]),
    package_data={"fastmllm": ["py.typed", "data/instruct/prompts/*.yaml", "data/instruct/wording/*.yaml"]},
    ext_modules=extensions() if reason is None else [],
    cmdclass={"build_ext": BuildOrExplain, "build_py": PythonAndReason},
    entry_points={"console_scripts": ["fastmllm = fastmllm.cli:main"]},
)
