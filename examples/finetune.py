"""Finetune a vision-language model of Hugging Face on a folder of images, one folder a class, with fastmllm.

    python examples/finetune.py MODEL IMAGES [--trl] [--steps N] [--out FOLDER]

MODEL is a folder or a name on the hub, with its processor; the question is what the image shows, the answer the
folder's name. The class `FastMLLMCallback` is given as it is, to transformers' Trainer and to TRL's SFTTrainer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments

from fastmllm.hf import FastMLLMCallback

QUESTION = "What does the image show?"


class Classes(Dataset):
    """(image, class) of a folder with one folder a class."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if not self.files:
            raise SystemExit(f"{folder}: no images in folders of their own: IMAGES/class/name.png is expected")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.files[index]
        asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
        answer = [{"role": "assistant", "content": [{"type": "text", "text": path.parent.name}]}]
        return {"images": [Image.open(path).convert("RGB")], "prompt": asked, "completion": answer}


class Collate:
    """Make a batch whose labels are the answers alone."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        template = self.processor.apply_chat_template
        texts = [template(row["prompt"] + row["completion"]) for row in rows]
        images = [row["images"] for row in rows]
        batch = self.processor(images=images, text=texts, padding=True, return_tensors="pt", padding_side="right")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, scored in zip(rows, labels, strict=True):
            prompt = template(row["prompt"], add_generation_prompt=True)
            asked = self.processor(images=row["images"], text=prompt, return_tensors="pt")["input_ids"]
            scored[: asked.shape[1]] = -100
        return {**batch, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or name on the hub")
    parser.add_argument("images", type=Path, help="folder with one folder a class")
    parser.add_argument("--trl", action="store_true", help="TRL's SFTTrainer instead of transformers' Trainer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("out/finetune"))
    options = parser.parse_args()

    model = AutoModelForImageTextToText.from_pretrained(options.model)
    processor = AutoProcessor.from_pretrained(options.model)
    data = Classes(options.images)
    settings: dict[str, Any] = {
        "output_dir": str(options.out), "max_steps": options.steps, "per_device_train_batch_size": options.batch_size,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(),
    }  # fmt: skip
    if options.trl:
        from datasets import Dataset as Table
        from trl import SFTConfig, SFTTrainer

        trainer: Trainer = SFTTrainer(
            model=model, args=SFTConfig(max_length=None, **settings), train_dataset=Table.from_list(list(data)),
            processing_class=processor, callbacks=[FastMLLMCallback],
        )  # fmt: skip
    else:
        trainer = Trainer(
            model=model, args=TrainingArguments(**settings), train_dataset=data, data_collator=Collate(processor),
            callbacks=[FastMLLMCallback],
        )  # fmt: skip
    trainer.train()
    trainer.save_model()
    processor.save_pretrained(options.out)


if __name__ == "__main__":
    main()
