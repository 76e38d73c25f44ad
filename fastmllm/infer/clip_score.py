"""How well images and texts go together, by a dual encoder of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from fastmllm.data.captions import CaptionFormat
from fastmllm.data.sample import Sample
from fastmllm.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class ClipScorer:
    """Score pairs by the raw cosine of their features, -1..1, as DataComp and LAION filter.

    CLIPScore (arXiv 2104.08718) is 2.5 * max(cosine, 0), torchmetrics' is 100 * max(cosine, 0).

    Args:
        model: trained towers.
        tokenizer: of the text tower.
        image_size: side in pixels that images are resized to.
        max_tokens: of a text with what stands around it; a longer one is cut.
        first, last: tokens around a text, as in training.
    """

    def __init__(
        self, model: DualEncoder, tokenizer: Tokenizer, *, image_size: int, max_tokens: int = 77,
        first: Sequence[int] = (), last: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.model = model
        self.format = CaptionFormat(
            tokenizer=tokenizer, image_size=image_size, max_tokens=max_tokens, first=tuple(first), last=tuple(last)
        )

    @torch.inference_mode()
    def __call__(self, images: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Return the cosine of each pair.

        Args:
            images: what `open_image` reads.
            texts: one an image; one without tokens scores nan, which a filter lists as unusable.

        Raises:
            ImageError: an image that cannot be read.
        """
        out = [float("nan")] * len(texts)
        places = [i for i, text in enumerate(texts) if self.format.tokenizer.encode(text, add_special_tokens=False).ids]
        if not places:
            return out
        samples = [Sample(id=str(i), prompt="", answer=texts[i], task="caption", image=images[i]) for i in places]
        batch = self.format.batch([self.format.read(sample) for sample in samples], draw=0)
        features = self.model.image_features(batch.pixels), self.model.text_features(batch)
        image, text = (F.normalize(feature.float(), dim=-1) for feature in features)
        for place, score in zip(places, (image * text).sum(-1).tolist(), strict=True):
            out[place] = score
        return out
