"""The cases of train_step.py: a LLaVA of transformers, and a mix of samples as instruction tuning has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.trainer_pt_utils import LengthGroupedSampler

IGNORE, IMAGE, PAD, FIRST = -100, 3, 0, 4  # FIRST: of the tokens that are words
PATCH = 14
POOL = 200  # steps' samples that an order is drawn over: four of the sampler's megabatches


@dataclass(frozen=True)
class Kind:
    """Samples of one kind; (least, most) each, drawn evenly.

    Args:
        share: of the mix, in thousands of samples.
        images: of a sample, in front of its first turn.
        turns: questions and answers.
        asked, answered: tokens of a turn with its template; only answers are scored.
    """

    share: int
    images: tuple[int, int]
    turns: tuple[int, int]
    asked: tuple[int, int]
    answered: tuple[int, int]


# Shares: LLaVA-1.5's 665K (arXiv 2310.03744, table 7: 158K of LLaVA-Instruct, of which 58K are conversations; VQAv2,
# GQA, OKVQA, OCRVQA and A-OKVQA; TextCaps; RefCOCO and VG; ShareGPT), and one sample in twelve with several images,
# which it has not. Turns and tokens follow these sets' formats (short answers, several a picture); they are ours.
MIX: Mapping[str, Kind] = {
    "conversation": Kind(58, (1, 1), (2, 4), (10, 24), (15, 60)),
    "description": Kind(100, (1, 1), (1, 1), (10, 30), (60, 180)),
    "short answers": Kind(310, (1, 1), (2, 8), (8, 18), (2, 4)),
    "regions": Kind(134, (1, 1), (3, 8), (8, 20), (8, 20)),
    "caption": Kind(22, (1, 1), (1, 1), (12, 30), (8, 24)),
    "text": Kind(40, (0, 0), (1, 5), (20, 80), (60, 240)),
    "several images": Kind(60, (2, 4), (1, 2), (15, 40), (2, 40)),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, a mix and how they are trained.

    Args:
        name: of the row.
        what: shapes, in words.
        vision, text: of `CLIPVisionConfig` and `LlamaConfig`.
        batch_size: samples of a micro-batch of a rank.
        order: "grouped" by length, the Trainer's own `group_by_length`, or "random", its default.
        ranks: processes, a thread each.
        accumulation: micro-batches of a step.
        longest: tokens that a sample is cut to, behind its last turn.
        dtype: of the model.
        providers: what is measured, ours first.
    """

    name: str
    what: str
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    batch_size: int = 8
    order: str = "grouped"
    ranks: int = 1
    accumulation: int = 1
    longest: int = 512
    dtype: str = "float32"
    providers: tuple[str, ...] = ("fastmllm", "Trainer", "Trainer + patch")

    @property
    def samples(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.accumulation * self.ranks

    @property
    def visual_tokens(self) -> int:
        """Tokens of an image."""
        return (int(self.vision["image_size"]) // PATCH) ** 2


def build(case: Case) -> LlavaForConditionalGeneration:
    """Make the model of transformers; the same weights at every call."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(**case.vision, patch_size=PATCH, hidden_act="quick_gelu")
    text = LlamaConfig(**case.text, tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=1, eos_token_id=2)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, tie_word_embeddings=True, pad_token_id=PAD
    )
    return LlavaForConditionalGeneration(config).to(getattr(torch, case.dtype))


@dataclass(frozen=True)
class Sample:
    """Token ids and aligned labels without pictures, which stand behind the first token; (H, W, 3) uint8 each."""

    ids: list[int]
    labels: list[int]
    pictures: list[Tensor]


class Samples:
    """Samples by number, made when they are asked for.

    Args:
        case: whose vocabulary and image size they have.
        order: numbers of the pool in the order of training.
    """

    def __init__(self, case: Case, order: Sequence[int]) -> None:
        self.case, self.order = case, list(order)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        g = torch.Generator().manual_seed(self.order[index])
        images, turns = _shape(self.case, g)
        ids, labels = [1], [IGNORE]
        for asked, answered in turns:
            # frequent words are frequent, so that there is something to learn
            share = torch.rand(asked + answered, generator=g) ** 3
            words = (FIRST + share * (self.case.text["vocab_size"] - FIRST - 1)).long().tolist()
            ids += words
            labels += [IGNORE] * asked + words[asked:]
        size = int(self.case.vision["image_size"])
        pictures = [torch.randint(0, 256, (size, size, 3), generator=g, dtype=torch.uint8) for _ in range(images)]
        return Sample(ids[: self.case.longest], labels[: self.case.longest], pictures)


def _shape(case: Case, g: torch.Generator) -> tuple[int, list[tuple[int, int]]]:
    """Draw how many images a sample has, and the tokens of its turns."""

    def between(bounds: tuple[int, int]) -> int:
        return int(torch.randint(bounds[0], bounds[1] + 1, (), generator=g))

    kinds = list(MIX.values())
    kind = kinds[int(torch.multinomial(torch.tensor([float(k.share) for k in kinds]), 1, generator=g))]
    images = between(kind.images)
    return images, [(between(kind.asked), between(kind.answered)) for _ in range(between(kind.turns))]


def length(case: Case, number: int) -> int:
    """Return the tokens of a sample of the pool, with those of its images."""
    images, turns = _shape(case, torch.Generator().manual_seed(number))
    return min(1 + sum(map(sum, turns)), case.longest) + images * case.visual_tokens


def samples(case: Case, steps: int) -> Samples:
    """Return the samples of `steps` steps, in their order.

    The Trainer's sampler groups 50 batches at a time, longest first; steps are taken evenly from the first 50, so that
    a few stand for all of them.
    """
    pool = POOL * case.samples
    if case.order == "random":
        return Samples(case, range(steps * case.samples))
    lengths = [length(case, number) for number in range(pool)]
    sampler = LengthGroupedSampler(
        case.batch_size * case.accumulation, lengths=lengths, generator=torch.Generator().manual_seed(0)
    )
    order, whole = list(sampler), 50 // case.ranks
    places = [step * whole // steps for step in range(steps)]
    return Samples(case, [order[at * case.samples + k] for at in places for k in range(case.samples)])


def padding(case: Case, data: Samples) -> float:
    """Return the share of positions that padding to a micro-batch's longest sample adds."""
    lengths = [length(case, number) for number in data.order]
    batches = [lengths[at : at + case.batch_size] for at in range(0, len(lengths), case.batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


_SMALL: dict[str, Any] = {
    "vision": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12, "num_attention_heads": 6,
               "image_size": 168},
    "text": {"vocab_size": 32000, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 24,
             "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096},
}  # fmt: skip
_LARGE: dict[str, Any] = {
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
               "image_size": 336},
    "text": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
             "num_attention_heads": 32, "num_key_value_heads": 4, "max_position_embeddings": 4096},
    "dtype": "bfloat16",
    "providers": ("fastmllm", "Trainer", "Trainer + patch", "Trainer + Liger"),
}  # fmt: skip
_TINY = "CLIP of 12 x 384 at 168 px, frozen, before a Llama of 24 x 256, 32000 words, tied: the head is 30 % of it"
_TINYLLAVA = "CLIP-L/14-336, frozen, before TinyLlama-1.1B: TinyLLaVA's sizes"
ON_CPU = (
    Case(name="random", what=f"{_TINY}; 8 samples a step in random order, the Trainer's default", order="random",
         **_SMALL),
    Case(name="grouped", what="the same, grouped by length (group_by_length)", **_SMALL),
    Case(name="two_ranks", what="the first on 2 ranks of 4 samples each", order="random", batch_size=4, ranks=2,
         providers=("fastmllm", "Trainer"), **_SMALL),
)  # fmt: skip
ON_GPU = (
    Case(name="random", what=f"{_TINYLLAVA}; 16 samples a step in random order, the Trainer's default", batch_size=16,
         order="random", **_LARGE),
    Case(name="grouped", what="the same, grouped by length (group_by_length)", batch_size=16, **_LARGE),
)  # fmt: skip
CASES = {case.name: case for case in (ON_GPU if torch.cuda.is_available() else ON_CPU)}
