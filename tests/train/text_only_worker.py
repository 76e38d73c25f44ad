"""What test_text_only.py runs in a process of its own: one rank has no image. text_only_worker.py OUT."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import forks
import torch
from pairs_toy import llava
from tiny_compositions import IMAGE, picture, tiny
from tiny_vlm import colour_photos, tiny_vlm
from torch import nn
from train_toy import trainer

from fastmllm.data.packing import collate
from fastmllm.data.sample import Conversation, Turn
from fastmllm.models.mllm import MLLM
from fastmllm.models.vlm import IMAGE_TOKEN_ID

OUT = Path(sys.argv[1])
PHOTOS = sorted(colour_photos(OUT / "photos", count=1).rglob("*.png"))
LIMIT_S = 40.0
PICTURES = ((1, 0), (0, 2), (3, 0))  # of the ranks, step by step: one, several (frames of a video too), none


def turns(index: int) -> Conversation:
    images = tuple(map(str, PHOTOS[: PICTURES[index // 2][index % 2]]))
    return Conversation(
        id=str(index), turns=(Turn(prompt="<image>" * len(images) + "What?", answer="red"),), images=images
    )


def vlm() -> tuple[nn.Module, Callable[[int], Any]]:
    model = tiny_vlm()
    model.language.lm_head.weight = model.language.model.embed_tokens.weight  # as SmolLM2's: one matrix, two names

    def batch(index: int) -> Any:
        return collate(
            [turns(index)], model.tokenizer, num_visual_tokens=4, image_size=32, image_token_id=IMAGE_TOKEN_ID
        )

    return model, batch


def packed(model: MLLM) -> tuple[nn.Module, Callable[[int], Any]]:
    def batch(index: int) -> Any:
        shown = [picture(index + k, 20, 20) for k in range(PICTURES[index // 2][index % 2])]
        sample = [1, *shown, 10 + index, 11, 12]
        labels = [item if isinstance(item, int) else -100 for item in sample]
        return replace(model.pack([sample], [labels]), ids=(str(index),))

    return model, batch


MODELS: dict[str, Callable[[], tuple[nn.Module, Callable[[int], Any]]]] = {
    "vlm": vlm,
    "llava": lambda: packed(llava()),
    "native": lambda: packed(MLLM.from_config(tiny("qwen", "native", "merger", "deepstack"))),
    "across": lambda: packed(MLLM.from_config(tiny("vit", "fixed", "resampler", "flamingo"))),
}


def train(rank: int, *, name: str, out: Path, ranks: int) -> None:
    torch.manual_seed(0)
    model, batch = MODELS[name]()
    for parameter in model.parameters():  # gates are open: what is across is seen
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    rules = dict.fromkeys(model.roles(), 0.001)  # type: ignore[operator]
    trainer(
        out, model, engine={"zero_stage": 3, "accumulation": 2 // ranks}, batches=batch,
        changes={"steps": 3, "trainable": rules, "eps": 1e-5},
    ).run()  # fmt: skip


if __name__ == "__main__":
    assert IMAGE == 5
    for name in sys.argv[2:] or MODELS:
        for ranks in (1, 2):
            work = partial(train, name=name, out=OUT / f"{name}-{ranks}", ranks=ranks)
            forks.run(ranks, work, OUT / f"{name}-{ranks}.said", LIMIT_S)
