"""Pairs of pictures and captions, the models that learn from them, and a LLaVA: for one process and for ranks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tiny_compositions import picture
from tiny_vlm import tiny_tokenizer, tiny_vlm
from torch import nn
from train_toy import trainer

from fastmllm.data.captions import CaptionFormat
from fastmllm.data.sample import Sample
from fastmllm.models.composition import MLLMConfig
from fastmllm.models.dual_encoder import DualEncoder
from fastmllm.models.language import LanguageConfig
from fastmllm.models.mllm import MLLM
from fastmllm.models.pretraining import QFormerStage
from fastmllm.models.vision import VisionConfig
from fastmllm.modules.qformer import QFormer, QFormerConfig
from fastmllm.modules.qformer_losses import QFormerPretraining

TOKENIZER = tiny_tokenizer()
CLS, BOS, END = 1, 2, 0
VIT = VisionConfig(
    width=16, depth=2, num_heads=2, mlp_ratio=2.0, patch_size=7, image_size=28, layer=-2, activation="quick_gelu",
    norm_eps=1e-5, patch_bias=False, pre_norm=True, final_norm=False, layer_scale=None,
    pixel_mean=(0.48145466, 0.4578275, 0.40821073), pixel_std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip
LLAMA = LanguageConfig(
    vocab_size=64, width=32, depth=2, num_heads=2, num_kv_heads=1, head_dim=16, mlp_width=40, max_positions=256
)
IMAGE = 5


def llava(seed: int = 0) -> MLLM:
    """Compose what transformers calls a LLaVA."""
    return MLLM.from_config(MLLMConfig(encoder=replace(VIT, depth=3), language=LLAMA, image_token_id=IMAGE), seed)


def spoken(model: MLLM, index: int) -> Any:
    """Return a batch of one sample with a picture and one without."""
    samples: list[list[Any]] = [[1, picture(index, 28, 28), 10 + index, 11, 12], [1, 20, 21 + index]]
    labels = [[item if isinstance(item, int) else -100 for item in sample] for sample in samples]
    return replace(model.pack(samples, labels), ids=(f"{index}a", f"{index}b"))


def pairs(photos: Path, index: int, size: int, ranks: int, *, first: tuple[int, ...], last: tuple[int, ...]) -> Any:
    """Return `size` pairs of a step, `size` of `ranks` of them: rank r has those behind the ones of rank r - 1."""
    found = sorted(photos.glob("train/*/*.png"))
    chosen = [found[(index * size + place) * 5 % len(found)] for place in range(size)]
    samples = [
        Sample(id=f"{index}/{p.parent.name}{p.stem}", prompt="", answer=p.parent.name, task="caption", image=str(p))
        for p in chosen
    ]
    form = CaptionFormat(tokenizer=TOKENIZER, image_size=32, max_tokens=6, first=first, last=last)
    return form.batch([form.read(sample) for sample in samples], draw=index // ranks)


def contrastive(loss: str, seed: int = 0) -> DualEncoder:
    vlm = tiny_vlm(seed)
    return DualEncoder(vlm.vision, vlm.language, 12, loss)


def qformer(seed: int = 0) -> QFormerStage:
    vlm = tiny_vlm(seed)
    config = QFormerConfig(
        width=16, depth=2, num_heads=2, mlp_width=24, media_width=24, num_queries=3,
        vocab_size=TOKENIZER.get_vocab_size(), max_positions=8,
    )  # fmt: skip
    made = QFormerPretraining(QFormer(config), feature_width=8)
    for name, param in made.named_parameters():
        if param.ndim >= 2 and "queries" not in name:
            nn.init.normal_(param, std=0.2)
    return QFormerStage(vlm.vision, made, BOS)


PAIR_RULES: dict[str, dict[str, Any]] = {
    "clip": {"vision": 1e-3, "language.model.*": 1e-3, "heads": 1e-3},
    "siglip": {"vision": 1e-3, "language.model.*": 1e-3, "heads": 1e-3},
    "qformer": {"connector": 1e-3, "heads": 1e-3},
}


def pair_run(out: Path, photos: Path, kind: str, size: int, ranks: int, *, seed: int = 0, **options: Any) -> Any:
    """Return the trainer of a stage that learns from pairs, `size` a rank."""
    torch.manual_seed(seed)
    model = qformer(seed) if kind == "qformer" else contrastive(kind, seed)
    around = {"first": (CLS,), "last": ()} if kind == "qformer" else {"first": (), "last": (END,)}
    changes = {"steps": 3, "trainable": PAIR_RULES[kind], "clip": 1.0, "eps": 1e-5} | options.pop("changes", {})
    return trainer(
        out, model, changes=changes, batches=lambda index: pairs(photos, index, size, ranks, **around), **options
    )
