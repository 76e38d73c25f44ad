"""Messages are answered as the model continues them token by token, together as alone, at once as in pieces."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_compositions import picture
from tiny_talk import SIZES, talking
from tiny_vlm import tiny_vlm
from torch import nn

from fastmllm import infer
from fastmllm.data.images import ImageError
from fastmllm.data.sample import Conversation, Turn
from fastmllm.data.text import TextError, end_token
from fastmllm.infer.chat import generate, stream
from fastmllm.infer.respond import collate_for, template_of
from fastmllm.infer.sampling import SamplingParams

PARTS = {
    "vlm": (),
    "qwen": ("qwen", "native", "merger", "tokens"),
    "tiles": ("vit", "tiles", "mlp", "tokens"),
    "mllama": ("mllama", "mllama", "none", "mllama"),
    "flamingo": ("vit", "fixed", "resampler", "flamingo"),
}


def model_of(name: str):
    return talking(*PARTS[name]).eval() if PARTS[name] else tiny_vlm(0)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for number, size in enumerate(SIZES):
        Image.fromarray(picture(number, *size)).save(tmp_path / f"{number}.png")
    return [str(tmp_path / f"{number}.png") for number in range(len(SIZES))]


def said(text: str) -> dict:
    return {"role": "user", "content": text}


@torch.no_grad()
def continued(model, talk: Conversation, count: int) -> list[int]:
    """Continue greedily without a cache, the whole conversation anew for each token."""
    ids: list[int] = []
    end = end_token(model.tokenizer, template_of(model))
    while len(ids) < count:
        batch = collate_for(model, [talk], with_answers=True, answers=[[*ids, 1]])
        token = int(model.logits(batch)[-2].argmax())  # the last row is what stands for the token to come
        if token == end:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("name", PARTS)
def test_requests_are_continued_as_written_out_whatever_their_neighbours(name: str, files: list[str]) -> None:
    model = model_of(name)
    requests = [
        [said("<image>What is this?")],
        [said("And without an image?")],
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
            {"role": "assistant", "content": "red"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "And "}, {"type": "image", "path": files[2]}, *_text("?")],
            },
        ],
    ]
    answers = generate(model, requests, [[files[0]], [], [files[1]]], SamplingParams(max_new_tokens=5))
    talks = [
        Conversation(id="0", turns=(Turn(prompt="<image>What is this?", answer="?"),), images=(files[0],)),
        Conversation(id="1", turns=(Turn(prompt="And without an image?", answer="?"),)),
        Conversation(
            id="2",
            turns=(Turn(prompt="<image>What is this?", answer="red"), Turn(prompt="And <image>?", answer="?")),
            images=(files[1], files[2]), system="Be short.",
        ),
    ]  # fmt: skip
    assert [answer.ids for answer in answers] == [continued(model, talk, 5) for talk in talks]
    warm = SamplingParams(temperature=1.3, top_k=40, seed=4, max_new_tokens=5)
    together = generate(model, requests, [[files[0]], [], [files[1]]], warm)
    assert together[2].ids == generate(model, requests[2], [files[1]], warm)[0].ids
    assert together[2].ids != generate(model, requests[2], [files[1]], replace(warm, seed=5))[0].ids


def _text(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]


def test_pictures_come_as_files_data_and_in_memory(files: list[str]) -> None:
    model = model_of("tiles")
    params = SamplingParams(max_new_tokens=4, logprobs=True)
    data = "data:image/png;base64," + base64.b64encode(Path(files[0]).read_bytes()).decode()
    url = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": data}}, *_text("What?")]}
    with Image.open(files[0]) as opened:
        opened.load()
    answers = generate(
        model, [[said("<image>What?")], [said("<image>What?")], [url]], [[Path(files[0])], [opened], []], params
    )
    assert len({tuple(answer.ids) for answer in answers}) == 1
    assert len(answers[0].log_probs) == len(answers[0].ids)
    other = generate(model, [said("<image>What?")], [files[3]], params)[0]
    assert other.log_probs != pytest.approx(answers[0].log_probs, abs=1e-4)


def test_what_layers_look_across_to_is_projected_once_for_all_tokens(files: list[str]) -> None:
    model = model_of("mllama")
    layer = next(iter(model.language.cross_layers.values()))
    project, seen = layer.keys_values, []
    layer.keys_values = lambda tokens: seen.append(len(tokens)) or project(tokens)
    try:
        answer = generate(model, [said("<image>What?")], [files[0]], SamplingParams(max_new_tokens=6))[0]
    finally:
        del layer.keys_values
    assert len(answer.ids) > 1
    assert len(seen) == 1


def test_public_names() -> None:
    assert (infer.generate, infer.stream, infer.SamplingParams) == (generate, stream, SamplingParams)


def test_pieces_join_to_the_answers(files: list[str]) -> None:
    model = model_of("vlm")
    requests, shown = [[said("<image>What?")], [said("Why not?")]], [[files[0]], []]
    params = [SamplingParams(temperature=1.0, seed=1, max_new_tokens=9), SamplingParams(max_new_tokens=3)]
    texts = {0: "", 1: ""}
    for number, piece in stream(model, requests, shown, params):
        texts[number] += piece
    assert [texts[0], texts[1]] == [answer.text for answer in generate(model, requests, shown, params)]
    assert all(texts.values())


def test_bad_requests_are_named(files: list[str]) -> None:
    model = model_of("tiles")
    good = [said("<image>What?")]
    for requests, images, message in (
        ([good, good], [[files[0]], []], "request 1: 0 images for 1 places"),
        ([good], [files[:2]], "request 0: 2 images for 1 places"),
        ([[said(" ")]], [[]], "request 0: empty turn: user says nothing"),
        ([good], [], "request 0: 0 images for 1 places"),
        ([good], [[files[0]], []], "1 requests, 2 lists of images"),
        ([[{"role": "assistant", "content": "a"}]], [[]], "the last message must be the user's"),
        ([[said("a"), said("b")]], [[]], "user and assistant must alternate"),
        ([[{"role": "user", "content": [{"type": "audio"}]}]], [[]], "'audio'} of a message is no text"),
        ([], [], "no messages"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, requests, images)
    with pytest.raises(ImageError, match=r"request 0: https://a\.b/c\.png: nothing is downloaded"):
        generate(model, good, ["https://a.b/c.png"])
    with pytest.raises(TextError, match="special token"):
        generate(model, [said("<|im_end|>")])
    with pytest.raises(TypeError, match="a Linear; a patched model of transformers answers by its own"):
        generate(nn.Linear(1, 1), good)
    room = model.language.config.max_positions
    limits = [SamplingParams(max_new_tokens=1), SamplingParams(max_new_tokens=room)]
    with pytest.raises(ValueError, match=rf"request 1: \d+ prompt \+ {room} new tokens are \d+ more than the context"):
        generate(model, [good, [said("What?")]], [[files[0]], []], limits)
