"""What a model said, kept as soon as it is said: a run that stops asks nothing twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Messages = Sequence[Mapping[str, str]]  # {role: system | user | assistant, content}
Chat = Callable[[Messages], str]


class ModelDown(RuntimeError):
    """A model that fails again and again; a later run goes on where this one stopped."""


class Replies:
    """Replies of a model by what it was asked.

    Args:
        path: an SQLite file; replies of other models may stand in it.
        model: name with version, part of what a reply is found by.
        retries: further attempts at one question; a failed one is not kept.
        give_up: questions that fail one after the other until `ModelDown`.
        pause_s: before the first retry; doubled each time.
    """

    def __init__(self, path: Path, model: str, *, retries: int = 2, give_up: int = 20, pause_s: float = 1.0) -> None:
        if not model:
            raise ValueError("replies: name the model, so that another one's replies are not taken for its own")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = sqlite3.connect(path)
        self._rows.execute("CREATE TABLE IF NOT EXISTS reply (key TEXT PRIMARY KEY, text TEXT)")
        self.model, self.retries, self.give_up, self.pause_s = model, retries, give_up, pause_s
        self._failed = 0

    def close(self) -> None:
        """Close the file."""
        self._rows.close()

    def get(self, asked: object) -> str | None:
        """Return the reply to what is JSON-able, or None."""
        row = self._rows.execute("SELECT text FROM reply WHERE key = ?", (self._key(asked),)).fetchone()
        return None if row is None else row[0]

    def put(self, asked: object, text: str) -> None:
        """Keep a reply; it is on disk when this returns."""
        with self._rows:
            self._rows.execute("INSERT OR REPLACE INTO reply VALUES (?, ?)", (self._key(asked), text))

    def ask(self, chat: Chat, messages: Messages) -> str | None:
        """Return the kept reply, or the model's; None where it fails or says nothing.

        Raises:
            ModelDown: `give_up` questions failed in a row.
        """
        if (kept := self.get(list(messages))) is not None:
            return kept
        problem = "an empty reply"
        for attempt in range(self.retries + 1):
            try:
                text = chat(messages)
            except Exception as error:  # whatever a client raises: it is no reason to lose hours of work
                problem = f"{type(error).__name__}: {error}"
            else:
                if isinstance(text, str) and text.strip():
                    self._failed = 0
                    self.put(list(messages), text)
                    return text
            if attempt < self.retries:
                time.sleep(self.pause_s * 2**attempt)
        self._failed += 1
        if self._failed >= self.give_up:
            raise ModelDown(f"{self.model}: {self._failed} questions failed in a row ({problem}); run again to go on")
        return None

    def _key(self, asked: object) -> str:
        return hashlib.sha256(json.dumps([self.model, asked], sort_keys=True).encode()).hexdigest()
