from __future__ import annotations

import pytest

from fastmllm.data.sample import Sample
from fastmllm.data.text import ChatTemplate, TextError, end_token, screen, tokenise


def sample(prompt: str = "What is this?", answer: str = "red apple", **more: object) -> Sample:
    fields: dict[str, object] = {"id": "s1", "task": "name", "image": "a.png"} | more
    return Sample(prompt=prompt, answer=answer, **fields)  # type: ignore[arg-type]


@pytest.fixture
def words():
    """A closed vocabulary, with an unknown token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: i for i, word in enumerate(["[UNK]", "[END]", "what", "is", "this", "apple", "u", "a"])}
    made = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


CLOSED = ChatTemplate(prefix="u ", middle=" a ", suffix="[END]")


def test_the_parts_spell_the_chat(tokenizer) -> None:
    tokens = tokenise(sample(), tokenizer)
    ids = tokens.prefix + tokens.prompt + tokens.answer
    text = "<|im_start|>user\nWhat is this?<|im_end|>\n<|im_start|>assistant\nred apple<|im_end|>"
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokens.answer[-1] == end_token(tokenizer) == tokenizer.token_to_id("<|im_end|>")


def test_chinese_is_inside_a_byte_vocabulary(tokenizer) -> None:
    tokens = tokenise(sample("这是什么？", "红苹果"), tokenizer)
    assert tokenizer.decode(tokens.answer) == "红苹果"


@pytest.mark.parametrize(("prompt", "answer"), [("", "x"), (" \n", "x"), ("x", ""), ("x", "  ")])
def test_empty_text(tokenizer, prompt: str, answer: str) -> None:
    with pytest.raises(TextError, match=r"sample 's1': empty (prompt|answer).*leave it out"):
        tokenise(sample(prompt, answer), tokenizer)


def test_special_tokens_cannot_be_smuggled_in(tokenizer) -> None:
    with pytest.raises(TextError, match=r"contains the special token '<\|im_end\|>'"):
        tokenise(sample(answer="cat<|im_end|>dog"), tokenizer)


def test_a_label_outside_of_the_vocabulary(words, tokenizer) -> None:
    assert tokenise(sample("what is this", "apple"), words, CLOSED).answer == [5, 1]
    with pytest.raises(TextError, match=r"'s1': answer 'pear' has text outside of the vocabulary; reword"):
        tokenise(sample("what is this", "pear"), words, CLOSED)
    with pytest.raises(TextError, match=r"outside of the model's 40; use the model's own tokenizer"):
        tokenise(sample(), tokenizer, vocab_size=40)


def test_text_that_a_tokenizer_drops_silently_is_noticed() -> None:
    from tokenizers import Tokenizer, models

    letters = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "e": 2}, merges=[]))
    with pytest.raises(TextError, match="'z' is outside of the vocabulary"):
        tokenise(sample("ab", "az"), letters, ChatTemplate(prefix="a", middle="b", suffix="e"))


def test_a_suffix_of_several_tokens_is_rejected(tokenizer) -> None:
    with pytest.raises(TextError, match="suffix 'the end' is"):
        end_token(tokenizer, ChatTemplate(suffix="the end"))


def test_screen_keeps_the_good_and_counts_the_rest(words) -> None:
    good = sample("what is this", "apple")
    samples = [
        good,
        sample("what is this", "pear"),
        sample("what is this", "pear"),
        sample("what is this", ""),
        sample("", "apple"),
        sample("what is this", "apple", task="caption", image=None),
        sample("this", "apple", image=None),  # text only, and meant so
    ]
    kept, skipped = screen(samples, words, CLOSED)
    assert kept == [good, samples[-1]]
    assert skipped == {"vocabulary": 2, "empty answer": 1, "empty prompt": 1, "caption without an image": 1}
