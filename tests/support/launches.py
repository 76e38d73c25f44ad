"""Count what a launcher asks of the device: Triton kernels, and torch's operators around them.

Give it meta tensors: they hold no values, so a launcher that waits for the device to read one fails.
"""

from __future__ import annotations

import pytest
from torch.utils._python_dispatch import TorchDispatchMode


class Launches(TorchDispatchMode):
    """Record, in order, each launch of the kernels `names` of `module` and each torch operator that computes.

    Views and allocations are left out: they launch nothing.
    """

    def __init__(self, module, *names):
        super().__init__()
        self.module, self.names, self.calls = module, names, []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in self.names:
            launch = {"__getitem__": lambda _, grid, name=name: lambda *args, **options: self.calls.append(name)}
            self.patch.setattr(self.module, name, type("Kernel", (), launch)())
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not (function.is_view or "empty" in function.name()):
            self.calls.append(function.name().removeprefix("aten::"))
        return function(*args, **(kwargs or {}))

    def take(self):
        """Return the calls since the last time."""
        calls, self.calls = self.calls, []
        return calls
