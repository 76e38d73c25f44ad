"""Which operators run."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode


class Names(TorchDispatchMode):
    """Write down the operators that run."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))

    def count(self, word):
        return sum(word in name for name in self.seen)
