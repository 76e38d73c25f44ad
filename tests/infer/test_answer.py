"""An answer ends where it should, and its pieces are its text."""

from __future__ import annotations

import pytest
from tiny_vlm import tiny_tokenizer

from fastmllm.infer.answer import Answer
from fastmllm.infer.sampling import SamplingParams

WORDS = tiny_tokenizer()


def grown(text: str, stop: tuple[str, ...] = (), end: int = 2, limit: int = 99) -> tuple[Answer, list[str]]:
    """Push a text byte by byte (each is a token) and take its pieces."""
    answer = Answer(SamplingParams(stop=stop, max_new_tokens=limit, logprobs=True), (end,), WORDS)
    pieces = []
    bytes_ = [token for char in text for token in WORDS.encode(char, add_special_tokens=False).ids]
    for token in [*bytes_, end, bytes_[0]]:
        answer.push(token, -0.5)
        pieces.append(answer.take())
    return answer, pieces


@pytest.mark.parametrize("text", ["red or green", "naïve 猫 😀!", " two  spaces "])
def test_pieces_are_whole_characters_and_join_to_the_text(text: str) -> None:
    answer, pieces = grown(text)
    assert answer.text == "".join(pieces) == text
    assert "�" not in "".join(pieces)
    assert (answer.finish_reason, len(answer.log_probs)) == ("stop", len(answer.ids))
    assert WORDS.decode(answer.ids) == text


def test_a_character_that_never_ends_is_replaced_at_the_end() -> None:
    whole, _ = grown("a😀")
    answer, pieces = grown("a😀", limit=len(whole.ids) - 1)
    assert answer.finish_reason == "length"
    assert "".join(pieces) == answer.text == WORDS.decode(whole.ids[:-1])
    assert "�" in answer.text


def test_stop_texts_end_an_answer_across_tokens_and_never_show() -> None:
    answer, pieces = grown("a cat. User: b", stop=("\n\n", "User:"))
    assert answer.text == "".join(pieces) == "a cat. "
    assert answer.finish_reason == "stop"
    assert WORDS.decode(answer.ids) == "a cat. User:"
    kept, pieces = grown("a cat. Use", stop=("User:",))
    assert kept.text == "".join(pieces) == "a cat. Use"  # it was held back only as long as it could be the stop text
    first, _ = grown("xabcd", stop=("cd", "abc"))
    assert first.text == "x"


def test_a_stop_text_needs_words() -> None:
    with pytest.raises(ValueError, match="need a tokenizer"):
        Answer(SamplingParams(stop=("x",)))


@pytest.mark.parametrize(("said", "left"), [("  red", "red"), (" ", " "), ("red", "red"), ("  ", "")])
def test_the_lead_of_a_template_is_not_part_of_the_text(said: str, left: str) -> None:
    answer = Answer(SamplingParams(), (2,), WORDS, lead="  ")
    pieces = []
    for char in [*said, None]:
        token = 2 if char is None else WORDS.encode(char, add_special_tokens=False).ids[0]
        answer.push(token)
        pieces.append(answer.take())
    assert answer.text == "".join(pieces) == left
