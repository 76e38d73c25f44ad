"""Judges: any callable, an OpenAI-compatible endpoint, or people who fill in a file."""

from __future__ import annotations

import hashlib
import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Literal

Judge = Callable[[str], str]
LARGEST_REPLY = 1 << 20  # bytes

PAIRWISE = """You compare two answers to one question about an image. Judge what is right and useful, not how long it \
is or which stands first.

Question: {question}
What the image shows: {reference}

[Answer 1]
{first}
[End of answer 1]

[Answer 2]
{second}
[End of answer 2]

Explain in one sentence, then end with one line: "Verdict: 1", "Verdict: 2" or "Verdict: tie"."""


class JudgeError(OSError):
    """A judge that gave no reply; it is counted and asked again by the next run, never scored."""


def prompt_hash(template: str) -> str:
    """Return what a record names a prompt by."""
    return hashlib.sha256(template.encode()).hexdigest()[:16]


def fill(template: str, **parts: str) -> str:
    """Put texts into a template's {places}; braces inside of the texts stay as they are.

    Raises:
        ValueError: a part has no place in the template.
    """
    if missing := [name for name in parts if f"{{{name}}}" not in template]:
        raise ValueError(f"judge: the prompt has no place {{{missing[0]}}}; it needs {', '.join(parts)} in braces")
    return re.sub("|".join(rf"\{{{name}\}}" for name in parts), lambda m: parts[m[0][1:-1]], template)


def parse_verdict(text: str) -> Literal["1", "2", "tie"] | None:
    """Read a verdict: the "Verdict: …" of the text if it has one, or several that agree; None otherwise."""
    found = {v.lower() for v in re.findall(r"(?i)\bverdict\W{1,6}(1|2|tie)\b", text)}
    return found.pop() if len(found) == 1 else None  # type: ignore[return-value]


class Endpoint:
    """An OpenAI-compatible chat endpoint as a judge, at temperature 0.

    Args:
        url: up to and without /chat/completions, such as http://localhost:8000/v1.
        model: its name there.
        key: sent as a bearer token; "" = none.
        timeout_s: of one request, seconds without a byte.
        tries: requests for a reply; only what may pass (no connection, a timeout, status 429 and 5xx) is tried again.
        max_tokens: of a reply.

    Raises:
        ValueError: no http or https address, or a count below 1.
    """

    def __init__(
        self, url: str, model: str, key: str = "", timeout_s: float = 60.0, tries: int = 3, max_tokens: int = 512
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"judge: {url!r} is no address; write http://host:port/v1")
        if timeout_s <= 0 or tries < 1 or max_tokens < 1:
            raise ValueError("judge: timeout_s must be positive, tries and max_tokens at least 1")
        self.url, self.model, self.key = url.rstrip("/") + "/chat/completions", model, key
        self.timeout_s, self.tries, self.max_tokens = timeout_s, tries, max_tokens
        self.name = f"{model} at {url}"

    def __call__(self, prompt: str) -> str:
        """Return the reply.

        Raises:
            JudgeError: there is none, with the last reason.
        """
        body = {
            "model": self.model, "temperature": 0, "max_tokens": self.max_tokens,
            "messages": [{"role": "user", "content": prompt}],
        }  # fmt: skip
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        reason = ""
        for _ in range(self.tries):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_s) as reply:
                    return _content(reply.read(LARGEST_REPLY + 1))
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}: {error.read(200).decode(errors='replace')}"
                if error.code != 429 and error.code < 500:
                    break
            except JudgeError:
                raise
            except (OSError, ValueError) as error:  # no connection, a timeout, a broken reply
                reason = f"{type(error).__name__}: {error}"
        raise JudgeError(f"{self.name}: {reason}")


def _content(raw: bytes) -> str:
    if len(raw) > LARGEST_REPLY:
        raise JudgeError(f"a reply of more than {LARGEST_REPLY} bytes")
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise JudgeError(f"no chat completion: {raw[:200]!r}") from error
    if not isinstance(content, str):
        raise JudgeError(f"a reply without text: {raw[:200]!r}")
    return content


class HumanFile:
    """People as a judge: a JSONL file to which questions are added, and in which they write "verdict": "1", "2", "tie".

    Args:
        path: of the file; lines that are no JSON are kept in it and ignored.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.name = Path(path), f"people, {Path(path).name}"
        self._verdicts: dict[str, str | None] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else ():
            try:
                entry = json.loads(line)
                self._verdicts[entry["prompt hash"]] = entry["verdict"]
            except (ValueError, KeyError, TypeError):
                continue

    def __call__(self, prompt: str) -> str:
        """Return the verdict that a person wrote.

        Raises:
            JudgeError: nobody has yet; the question is in the file now.
        """
        key = prompt_hash(prompt)
        if key not in self._verdicts:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(
                    json.dumps({"prompt hash": key, "verdict": None, "prompt": prompt}, ensure_ascii=False) + "\n"
                )
            self._verdicts[key] = None
        if not self._verdicts[key]:
            raise JudgeError(f"{self.path}: question {key} waits for a person's verdict")
        return f"Verdict: {self._verdicts[key]}"
