"""A DPO step of a LLaVA: images encoded once or for each answer, a reference looked up or computed, and TRL.

    python benchmarks/suite/alignment.py [--rounds N] [--pairs P]

One composed model, saved once and loaded by transformers for TRL's `DPOTrainer`; random weights, frozen tower. The
policy is a disturbed copy of the reference, so that the losses, which are compared before anything is timed, are not
log 2. A step is loss, backward and AdamW on a batch that is ready; all providers take turns in one process, and the
figure is the median of paired ratios to ours: above 1 ours is faster. On a CPU it is process CPU time on one
thread. TRL refuses `precompute_ref_log_probs` where there are images, so its reference is a second model. Writes
benchmarks/results/<device>/alignment.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from interleaved import DEVICE, ROOT, seconds
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastmllm.data.preference import PairBatch
from fastmllm.models.composition import MLLMConfig
from fastmllm.models.language import LanguageConfig
from fastmllm.models.mllm import MLLM
from fastmllm.models.vision import VisionConfig
from fastmllm.session import environment, write_text
from fastmllm.train.prefer import PreferConfig, PreferenceObjective

VOCAB, IMAGE, SIDE, BETA = 8192, 5, 112, 0.1
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def llava(depth: int, width: int) -> MLLM:
    """Compose what transformers calls a LLaVA: CLIP's tower, 64 visual tokens, a Llama."""
    encoder = VisionConfig(
        width=width, depth=depth, num_heads=4, patch_size=14, image_size=SIDE, layer=-2, activation="quick_gelu",
        norm_eps=1e-5, patch_bias=False, pre_norm=True, final_norm=False, layer_scale=None, pixel_mean=MEAN,
        pixel_std=STD,
    )  # fmt: skip
    language = LanguageConfig(
        vocab_size=VOCAB, width=width, depth=max(2, depth // 3), num_heads=4, num_kv_heads=2, head_dim=width // 4,
        mlp_width=3 * width, max_positions=512,
    )  # fmt: skip
    return MLLM.from_config(MLLMConfig(encoder=encoder, language=language, image_token_id=IMAGE))


def disturbed(model: MLLM) -> MLLM:
    """Return a copy whose decoder has moved on a little."""
    other, draw = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in other.language.parameters():
            param.add_(torch.randn(param.shape, generator=draw).to(param), alpha=0.02)
    return other


def questions(pairs: int) -> list[dict[str, Any]]:
    """Draw pairs: a picture, a question of 16 words, answers of 8 to 32; words are numbers of tokens."""
    draw = np.random.default_rng(0)

    def words(count: int) -> list[int]:
        return draw.integers(10, VOCAB, count).tolist()

    return [
        {"image": Image.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)), "prompt": words(16),
         "chosen": words(int(draw.integers(8, 33))), "rejected": words(int(draw.integers(8, 33)))}
        for _ in range(pairs)
    ]  # fmt: skip


def packed(model: MLLM, asked: list[dict[str, Any]], each: bool) -> PairBatch:
    """Pack pairs, without their reference; `each` shows every answer a picture of its own."""
    samples, labels = [], []
    for one in asked:
        for side in ("chosen", "rejected"):
            picture = one["image"].copy() if each else one["image"]
            samples.append([picture, *one["prompt"], *one[side]])
            labels.append([-100] * (1 + len(one["prompt"])) + one[side])
    places = torch.arange(len(asked))
    nothing = torch.zeros(0, dtype=torch.int64)
    return PairBatch(
        batch=model.pack(samples, labels), chosen=2 * places, rejected=2 * places + 1, corrupted=nothing,
        corrupted_pair=nothing, reference=torch.zeros(2 * len(asked)),
    )  # fmt: skip


def own_step(policy: MLLM, reference: MLLM, pairs: PairBatch, computed: bool) -> Callable[[], Tensor]:
    """Return what takes a step of ours; `computed` runs the reference in it."""
    objective = PreferenceObjective(policy, PreferConfig(beta=BETA, image=0, anchor=0)).train()
    policy.images.vision.requires_grad_(False)  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=0.0)
    with torch.no_grad():
        pairs.reference = reference.log_probs(pairs.batch)

    def step() -> Tensor:
        if computed:
            with torch.no_grad():
                pairs.reference = reference.log_probs(pairs.batch)
        loss = objective(pairs) / pairs.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.take_figures()
        return loss.detach()

    return step


def trl_step(policy: MLLM, reference: MLLM, asked: list[dict[str, Any]], folder: Path) -> Callable[[], Tensor]:
    """Return what takes a step of TRL's trainer on the same weights and words."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    special = {0: "<pad>", 2: "</s>", IMAGE: "<image>"}
    made = Tokenizer(models.WordLevel({special.get(k, f"w{k}"): k for k in range(VOCAB)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    processor = LlavaProcessor(
        CLIPImageProcessor(do_resize=False, do_center_crop=False, image_mean=list(MEAN), image_std=list(STD)),
        tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip
    loaded: list[nn.Module] = []
    for name, model in (("policy", policy), ("reference", reference)):
        model.save_pretrained(folder / name)
        loaded.append(LlavaForConditionalGeneration.from_pretrained(folder / name))
    for name, param in loaded[0].named_parameters():
        param.requires_grad_("vision_tower" not in name)

    def text(ids: list[int]) -> str:
        return " ".join(f"w{k}" for k in ids)

    rows = [
        {"images": [one["image"]], "prompt": "<image> " + text(one["prompt"]), "chosen": text(one["chosen"]),
         "rejected": text(one["rejected"])}
        for one in asked
    ]  # fmt: skip
    trainer = DPOTrainer(
        loaded[0], loaded[1], DPOConfig(
            output_dir=str(folder / "out"), beta=BETA, max_length=None, report_to="none", use_cpu=DEVICE == "cpu",
            bf16=False, gradient_checkpointing=False, per_device_train_batch_size=len(rows),
        ), train_dataset=Dataset.from_list(rows), processing_class=processor,
    )  # fmt: skip
    batch = trainer._prepare_inputs(trainer.data_collator([dict(row) for row in rows]))
    model = trainer.model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0)

    def step() -> Tensor:
        loss = trainer.compute_loss(model, dict(batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def main(rounds: int, pairs: int, depth: int, width: int) -> dict[str, Any]:
    """Compare and time the providers; return what is stored."""
    torch.manual_seed(0)
    if DEVICE == "cpu":
        torch.set_num_threads(1)
    reference = llava(depth, width).to(DEVICE).eval()
    asked = questions(pairs)
    steps: dict[str, Callable[[], Tensor]] = {}
    for name, each, computed in (
        ("ours", False, False), ("image for each answer", True, False), ("reference computed", False, True),
        ("both", True, True),
    ):  # fmt: skip
        policy = disturbed(reference)
        steps[name] = own_step(policy, reference, packed(policy, asked, each), computed)
    with tempfile.TemporaryDirectory() as folder:
        steps["TRL DPOTrainer"] = trl_step(disturbed(reference), reference, asked, Path(folder))
        losses = {name: float(step()) for name, step in steps.items()}
        spread = max(abs(loss - losses["ours"]) for loss in losses.values())
        if spread > 1e-4:
            raise RuntimeError(f"alignment: the losses differ: {losses}")
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                times[name].append(seconds(step))
    rows = {
        name: {"seconds": median(own), "ratio": median(a / b for a, b in zip(own, times["ours"], strict=True))}
        for name, own in times.items()
    }
    shape = {"pairs": pairs, "tower": [depth, width], "decoder": [max(2, depth // 3), width], "vocabulary": VOCAB}
    versions = {name: version(name) for name in ("transformers", "trl")}
    return {"environment": environment() | versions, "rounds": rounds, "shape": shape, "loss": losses["ours"],
            "largest difference": spread, "rows": rows}  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=4)
    given = parser.parse_args()
    found = main(given.rounds, given.pairs, depth=12, width=256)
    write_text(ROOT / "benchmarks" / "results" / DEVICE / "alignment.json", json.dumps(found, indent=1) + "\n")
    table = Table(title=f"a DPO step of {given.pairs} pairs, {DEVICE}")
    for heading in ("", "seconds", "ours is faster by"):
        table.add_column(heading)
    for name, row in found["rows"].items():
        table.add_row(name, f"{row['seconds']:.3f}", f"{row['ratio']:.2f}")
    Console().print(table)
