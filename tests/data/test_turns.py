from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_shards import png

from fastmllm.data.packing import IGNORE, collate
from fastmllm.data.sample import Conversation, Sample, Turn
from fastmllm.data.text import ChatTemplate, TextError
from fastmllm.data.turns import pieces_of

IMAGE = 299
K = {"num_visual_tokens": 3, "image_size": 8, "image_token_id": IMAGE}


def conversation(*turns: tuple[str, str], images: tuple[str, ...] = (), **more: str) -> Conversation:
    return Conversation(id="c", turns=tuple(Turn(prompt=p, answer=a) for p, a in turns), images=images, **more)


def test_one_turn_about_one_image_is_spelled_as_a_sample(tokenizer, tmp_path: Path) -> None:
    path = str(tmp_path / "a.png")
    Path(path).write_bytes(png(5))
    template = ChatTemplate(prompt_lead="\n", answer_lead=" ")
    for image in (path, None):
        sample = Sample(id="c", prompt="What is this?", answer="red apple", task="name", image=image)
        prompt = ("<image>" if image else "") + sample.prompt
        same = conversation((prompt, sample.answer), images=(path,) if image else ())
        for more in ({}, {"with_answers": False}, {"template": template}):
            a, b = (collate([s, s], tokenizer, **K, **more) for s in (sample, same))
            for name in ("input_ids", "labels", "position_ids", "cu_seqlens", "image_index"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert (a.ids, a.image_paths, a.num_targets) == (b.ids, b.image_paths, b.num_targets)
            assert a.pixels is b.pixels is None or torch.equal(a.pixels, b.pixels)


def test_every_answer_is_scored_and_images_stand_where_they_were_put(tokenizer, tmp_path: Path) -> None:
    paths = []
    for i in range(3):
        paths.append(str(tmp_path / f"{i}.png"))
        Path(paths[-1]).write_bytes(png(i * 50))
    talk = conversation(
        ("<image><image>\nWhat is this?", "red apple"), ("this?", "user"), ("What <image>is", "this"),
        images=tuple(paths), system="assistant",
    )  # fmt: skip
    batch = collate([talk], tokenizer, **K)
    ids, labels = batch.input_ids.tolist(), batch.labels.tolist()
    text = tokenizer.decode([i for i in ids if i != IMAGE], skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nassistant<|im_end|>\n"
        "<|im_start|>user\n\nWhat is this?<|im_end|>\n<|im_start|>assistant\nred apple<|im_end|>\n"
        "<|im_start|>user\nthis?<|im_end|>\n<|im_start|>assistant\nuser<|im_end|>\n"
        "<|im_start|>user\nWhat is<|im_end|>\n<|im_start|>assistant\nthis<|im_end|>"
    )
    end = tokenizer.token_to_id("<|im_end|>")
    runs, run = [], []
    for t, label in enumerate(labels):
        if label == IGNORE:
            assert not run, "an answer ends with its end token"
            continue
        assert ids[t + 1] == label
        run.append(label)
        if label == end:
            runs.append(tokenizer.decode(run[:-1]))
            run = []
    assert runs == ["red apple", "user", "this"]
    assert batch.num_targets == sum(label != IGNORE for label in labels)
    # nine places, three by three: two images side by side behind the first prefix, one amid the last prompt
    places = batch.image_index.tolist()
    assert all(ids[p] == IMAGE for p in places)
    assert [places[i + 1] - places[i] for i in (0, 1, 2, 3, 4, 6, 7)] == [1] * 7
    assert places[6] - places[5] > 20
    assert tokenizer.decode(ids[places[8] + 1 : places[8] + 4], skip_special_tokens=False).startswith("is<|im_end|>")
    assert batch.image_paths == paths
    assert batch.pixels[:, 0, 0, 0].tolist() == [0, 50, 100]
    prompts = collate([talk], tokenizer, **K, with_answers=False)
    assert prompts.num_targets == 0
    assert ids[: len(prompts.input_ids)] == prompts.input_ids.tolist()
    assert tokenizer.decode(ids[len(prompts.input_ids) :]) == "this"


def test_what_cannot_be_spelled(tokenizer) -> None:
    for talk, message in (
        (conversation(("<image>a", "b")), "0 images, 1 times <image>"),
        (conversation(("a", "b"), images=("x.png",)), "1 images, 0 times <image>"),
        (conversation(("a", "b"), (" <image>", "b"), images=("x.png",)), "empty prompt in turn 2"),
        (conversation(("a", " ")), "empty answer in turn 1"),
        (conversation(("a", "b<|im_end|>")), "answer contains the special token"),
        (conversation(("a", "b"), system="<|im_start|>"), "system contains the special token"),
    ):
        with pytest.raises(TextError, match=message.replace("|", r"\|")):
            pieces_of(talk, tokenizer)
    with pytest.raises(ValueError, match="must have one"):
        ChatTemplate(system="system")
