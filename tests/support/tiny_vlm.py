"""A vision-language model of some thousand parameters, a tokenizer, and coloured photographs to learn from."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastmllm.models.language import LanguageConfig, LanguageModel
from fastmllm.models.vision import VisionConfig, VisionTransformer
from fastmllm.models.vlm import VLM, ModelConfig
from fastmllm.modules.projector import Projector

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 220), "white": (245, 245, 245)}


def tiny_tokenizer() -> Tokenizer:
    """Build a byte-level BPE: it represents any text, as SmolLM2's does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["Picture: What is this? Answer: red green blue white yes no"] * 4, trainer)
    return made


def tiny_vlm(seed: int = 0, config: ModelConfig | None = None) -> VLM:
    """Build the model in fp32: 32 px images, 8 px patches (16 tokens), 4 visual tokens."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    language = LanguageModel(
        LanguageConfig(
            vocab_size=tokenizer.get_vocab_size(),
            width=32,
            depth=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=8,
            mlp_width=64,
        )
    )
    vision = VisionTransformer(
        VisionConfig(width=24, depth=1, num_heads=2, patch_size=8, image_size=32, cls_token=False)
    )
    config = config or ModelConfig(image_size=32, visual_tokens=4, dtype="float32")
    return VLM(vision, Projector(24, 32, norm=True, out_std=0.5), language, config, tokenizer).eval()


def colour_photos(folder: Path, count: int = 6) -> Path:
    """Write train/<colour>/ and validation/<colour>/ with `count` noisy squares each."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for name, colour in COLOURS.items():
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(count):
                noise = torch.randint(-20, 20, (32, 32, 3), generator=generator)
                pixels = (torch.tensor(colour) + noise).clamp(0, 255).to(torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    return folder
