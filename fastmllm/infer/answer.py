"""One answer while it grows: its tokens, its text so far, and whether it has ended."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from tokenizers.decoders import DecodeStream

from fastmllm.infer.sampling import SamplingParams

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Answer:
    """Collect tokens until a stop token, a stop text or the limit.

    Args:
        params: where it ends.
        stop: further tokens that end it.
        tokenizer: makes text of it; without one there is none, and no stop text.
        lead: what a chat template has in front of each answer; not part of its text.

    Attributes:
        ids: its tokens, without the one that ended it; those of a stop text are among them.
        log_probs: of each of `ids`, where asked for.
        text: so far, without the stop text; characters whose bytes are not complete are left out until the end.
        finish_reason: "stop", "length", or None while it grows.

    Raises:
        ValueError: a stop text without a tokenizer.
    """

    def __init__(
        self, params: SamplingParams, stop: Collection[int] = (), tokenizer: Tokenizer | None = None, lead: str = ""
    ) -> None:
        if params.stop and tokenizer is None:
            raise ValueError(f"fastmllm::Answer: stop texts {params.stop!r} need a tokenizer; or give stop_token_ids")
        self.params, self.tokenizer, self.lead = params, tokenizer, lead
        self.stop = frozenset((*stop, *params.stop_token_ids))
        self.ids: list[int] = []
        self.log_probs: list[float] = []
        self._text = ""  # with the lead
        self.finish_reason: Literal["stop", "length"] | None = None
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._taken = 0  # characters

    @property
    def text(self) -> str:
        return self._text.removeprefix(self.lead)

    def push(self, token: int, log_prob: float | None = None) -> None:
        """Take the next token; nothing is taken behind the end."""
        if self.finish_reason is not None:
            return
        if token in self.stop:
            self._end("stop")
            return
        self.ids.append(token)
        if log_prob is not None and self.params.logprobs:
            self.log_probs.append(log_prob)
        if self.tokenizer is not None:
            before = len(self._text)
            self._text += self._decoder.step(self.tokenizer, token) or ""
            if self._cut(before):
                self.finish_reason = "stop"
                return
        if len(self.ids) == self.params.max_new_tokens:
            self._end("length")

    def take(self) -> str:
        """Return the text that is new since the last call and that no later token can take back."""
        end = len(self.text)
        if self.finish_reason is None:
            if self.lead.startswith(self._text):
                return ""
            starts = (n for stop in self.params.stop for n in range(1, len(stop)) if self.text.endswith(stop[:n]))
            end -= max(starts, default=0)
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _end(self, reason: Literal["stop", "length"]) -> None:
        self.finish_reason = reason
        if self.tokenizer is not None:
            # all at once: bytes that never became a character are replaced ones now
            self._text += self.tokenizer.decode(self.ids)[len(self._text) :]

    def _cut(self, before: int) -> bool:
        """Cut the text at the first stop text that ends behind its first `before` characters."""
        stops = self.params.stop
        places = [self._text.find(stop, max(0, before - len(stop) + 1)) for stop in stops]
        found = [place for place in places if place >= 0]
        if found:
            self._text = self._text[: min(found)]
        return bool(found)
