"""A compiler that is there and operators that are not: then the tests of the C++ operators fail instead of skipping."""

from __future__ import annotations

import os
import shutil

import pytest


def can_build() -> bool:
    """Tell whether this machine could have built the C++ operators, and was not told to leave them."""
    return os.environ.get("FASTMLLM_BUILD") != "0" and any(map(shutil.which, ("c++", "g++", "clang++")))


def judge(report: pytest.TestReport, missing: str | None) -> None:
    """Turn a skip for want of the C++ operators (`missing` says why) into a failure."""
    if missing and report.skipped and missing in str(report.longrepr):
        report.outcome = "failed"
        report.longrepr = f"the C++ operators are {missing} (FASTMLLM_BUILD=0 skips their tests)"
