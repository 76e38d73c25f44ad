"""What was replaced, by what, and why the rest was left."""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import nn

from fastmllm.hf.fusion import STATE


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One module and one operator.

    Args:
        module: its name in the model, "" for the model itself.
        kind: the name of its class.
        op: the operator.
        backend: what computes it now ("triton", "C++", "torch", "liger" …), or None where the module was left.
        reason: why it was left, or "".
        refused: it was left because it cannot be replaced, not because that would be slower.
    """

    module: str
    kind: str
    op: str
    backend: str | None
    reason: str = ""
    refused: bool = False


class Report:
    """What `patch` did to a model; printing it shows a table with numbered layers joined."""

    def __init__(self, model: nn.Module, rows: list[Row]) -> None:
        self._model, self.rows = weakref.ref(model), rows

    @property
    def replaced(self) -> list[Row]:
        """Modules that compute with our operators."""
        return [row for row in self.rows if row.backend is not None]

    @property
    def left(self) -> list[Row]:
        """Modules that were looked at and left."""
        return [row for row in self.rows if row.backend is None]

    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Return module -> reason -> how many calls ran transformers' own code since the model was patched."""
        model = self._model()
        found = {} if model is None else {
            name: dict(module.__dict__[STATE + "fallbacks"])
            for name, module in model.named_modules() if STATE + "fallbacks" in module.__dict__
        }  # fmt: skip
        return found

    def table(self) -> Table:
        """Return module, class, operator, backend or reason; `layers.*` stands for all layers that agree."""
        out = Table(title="fastmllm.patch")
        for name in ("module", "class", "operator", "replaced by", "left, because"):
            out.add_column(name, overflow="fold")
        out.add_column("count", justify="right")
        for (module, kind, op, backend, reason), count in self._joined():
            out.add_row(module or "(model)", kind, op, backend or "–", reason, str(count))
        return out

    def _joined(self) -> Iterator[tuple[tuple[str, str, str, str | None, str], int]]:
        counts: dict[tuple[str, str, str, str | None, str], int] = {}
        for row in self.rows:
            name = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)
            key = (name, row.kind, row.op, row.backend, row.reason)
            counts[key] = counts.get(key, 0) + 1
        yield from counts.items()

    def __str__(self) -> str:
        console = Console(width=160, no_color=True)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def __rich__(self) -> Table:
        return self.table()

    def __repr__(self) -> str:
        return f"Report({len(self.replaced)} replaced, {len(self.left)} left)"
