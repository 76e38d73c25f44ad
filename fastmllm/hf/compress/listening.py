"""Queries and keys of a layer of a language model, turned, which the next layer's stage judges by."""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastmllm.hf.compress.watch import PROJECTIONS, Watched, WatchedKeys, watch


class Heard(threading.local):
    """Of the thread's call: what `Watched` leaves while it is listened to, and how the layer turns it."""

    def __init__(self) -> None:
        self.listening = False
        self.watched: dict[str, Tensor] = {}
        self.turned: Any = None


class Listener:
    """Read one layer's self-attention.

    Args:
        attention: of Llama's kind: projections, norms of queries and keys or none, `apply_rotary_pos_emb`.
        layer: its number.
        window: of tokens that a row sees, or None.
    """

    def __init__(self, attention: Any, layer: int, window: int | None = None) -> None:
        self.attention, self.layer, self.window, self.now = attention, layer, window, Heard()

    def __deepcopy__(self, memo: dict[int, Any]) -> Listener:
        """Go along with a copy of the layer; a copy of its projection alone (PEFT's) stays a part of it."""
        if id(self.attention) not in memo:
            return self
        memo[id(self)] = copied = Listener(copy.deepcopy(self.attention, memo), self.layer, self.window)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return Listener, (None, self.layer, self.window), {"attention": self.attention}

    @contextmanager
    def listen(self, position_embeddings: Any) -> Iterator[None]:
        """Listen while the layer runs."""
        watch(self, dict(zip(PROJECTIONS, (Watched, WatchedKeys), strict=True)))  # LoRA may have put others there
        self.now.listening, self.now.turned = True, position_embeddings
        try:
            yield
        finally:
            self.now.listening = False

    @torch.no_grad()
    def take(self) -> tuple[Tensor, Tensor]:
        """Return queries (B, T, H, D) and keys (B, T, Hkv, D), turned."""
        watched, self.now.watched = self.now.watched, {}
        q, k = (watched[part].unflatten(-1, (-1, self.attention.head_dim)) for part in ("queries", "keys"))
        if getattr(self.attention, "q_norm", None) is not None:
            q, k = self.attention.q_norm(q), self.attention.k_norm(k)
        turn = inspect.unwrap(type(self.attention).forward).__globals__["apply_rotary_pos_emb"]
        q, k = turn(q.transpose(1, 2), k.transpose(1, 2), *self.now.turned)
        return q.transpose(1, 2), k.transpose(1, 2)
