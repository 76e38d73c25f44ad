"""Captions of images by a model of ours, through the same path that evaluation takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmllm.data.sample import Sample
from fastmllm.infer.respond import Responder


class Captioner:
    """Caption images, greedily.

    Args:
        responder: holds the model.
        prompt: asked about each image.
        max_new_tokens: of a caption.
    """

    def __init__(self, responder: Responder, prompt: str = "Describe the image.", max_new_tokens: int = 64) -> None:
        self.responder, self.prompt, self.max_new_tokens = responder, prompt, max_new_tokens

    @torch.inference_mode()
    def __call__(self, images: Sequence[str]) -> list[str]:
        """Return a caption an image; images are what `open_image` reads."""
        samples = [
            Sample(id=str(i), prompt=self.prompt, answer="?", task="caption", image=image)
            for i, image in enumerate(images)
        ]
        return self.responder.answer(samples, self.max_new_tokens)
