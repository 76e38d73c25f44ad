"""Hugging Face models that compute with fastmllm's operators: `patch` and `unpatch`."""

from fastmllm.hf.patch import PatchError, patch, unpatch
from fastmllm.hf.report import Report, Row

__all__ = ["PatchError", "Report", "Row", "patch", "unpatch"]
