"""The callback in transformers' Trainer and in TRL's, as examples/finetune.py gives it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_hf import CLIP, LLAMA, finish
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset

from fastmllm.compression import Placement, make
from fastmllm.hf import FastMLLMCallback, patch, unpatch
from fastmllm.hf.fusion import is_fused

ROOT = Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}"
    "{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny LLaVA with its processor, and pictures of two classes."""
    import transformers as t

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    tokenizer.train_from_iterator(
        ["user: What does the image show?", "assistant: red blue"],
        trainers.BpeTrainer(
            vocab_size=320, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip
    words = t.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    images = t.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = t.LlavaProcessor(
        images, words, patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )  # fmt: skip
    config = t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**CLIP),
        text_config=t.LlamaConfig(**{**LLAMA, "vocab_size": len(words), "max_position_embeddings": 512}),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    finish(t.LlavaForConditionalGeneration(config)).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    for name in ("red", "blue"):
        (folder / "images" / name).mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (30 + n, 28), name).save(folder / "images" / name / f"{n}.png")
    return folder


@pytest.mark.parametrize("more", [[], ["--trl"]], ids=["transformers", "trl"])
def test_the_example_runs(folder, more, tmp_path):
    if more:
        pytest.importorskip("trl")
    command = [sys.executable, "examples/finetune.py", folder / "model", folder / "images", "--steps", "3",
               "--batch-size", "2", "--out", tmp_path, *more]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(x) for x in re.findall(r"'loss': '?([\d.]+)", done.stdout)]
    assert len(losses) == 3, done.stdout[-2000:]
    assert "rms_norm" in done.stdout
    assert re.search(r"insert_features\s*│\s*torch", done.stdout), "the report shows nothing replaced"
    assert (tmp_path / "config.json").is_file()


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        ids = torch.randint(20, 100, (12,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: 3 + index % 4] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def trained(model, folder, bf16=False, **options):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        logging_steps=1, report_to="none", save_strategy="no", use_cpu=True, learning_rate=1e-2, optim="sgd",
        eval_strategy="steps", eval_steps=2, seed=3, disable_tqdm=True, bf16=bf16,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=Rows(), eval_dataset=Rows(), **options)
    trainer.train()
    logged = trainer.state.log_history[:-1]
    assert sum("eval_loss" in row for row in logged) == 2
    return [row.get("loss", row.get("eval_loss")) for row in logged]


def test_training_is_the_same_and_the_model_is_given_back(tmp_path):
    from tiny_hf_llava import llava

    plain, patched = llava(), llava()
    classes = [type(m) for m in patched.modules()]
    expected = trained(plain, tmp_path)
    callback = FastMLLMCallback(ops=["rms_norm", "linear_cross_entropy"])
    found = trained(patched, tmp_path, callbacks=[callback])
    assert {row.op for row in callback.report.replaced} == {"rms_norm", "linear_cross_entropy"}
    assert not callback.report.fallbacks()
    assert [type(m) for m in patched.modules()] == classes
    assert found == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(patched.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def bf16():
    """Trainer(bf16=True), whose accelerator says so for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    yield {"bf16": True}
    AcceleratorState._reset_state(True)


def test_mixed_precision_keeps_the_loss_and_compression_in_front_of_layers(tmp_path, bf16):
    """accelerate binds a forward of its own before the callback is asked."""
    from tiny_hf_llava import llava, llava_batch

    model, ops = llava(), ["rms_norm", "linear_cross_entropy"]
    expected = trained(llava(), tmp_path, **bf16)
    callback = FastMLLMCallback(ops=ops, compress=Placement(stages=((1, make("topk", 0.5, scorer="last_row")),)))
    found = trained(model, tmp_path, callbacks=[callback], **bf16)  # of texts alone, which lose nothing
    assert {row.op for row in callback.report.replaced} == {*ops, "compress"}
    assert found == pytest.approx(expected, rel=1e-2)
    assert not any(is_fused(m) for m in model.modules())
    assert patch(model, ops=ops, compress="divprune:2").replaced
    batch = llava_batch()
    out = model.train()(**batch)  # as accelerate left it
    assert out.logits is None
    assert out.loss.isfinite()
    assert unpatch(model)(**batch).logits.shape[:2] == batch["input_ids"].shape


def test_a_model_that_is_patched_already_stays_so(tmp_path):
    from tiny_hf_llava import llava

    model = llava()
    patch(model, ops=["rms_norm"])
    trained(model, tmp_path, callbacks=[FastMLLMCallback])
    assert is_fused(model.model.language_model.norm)
    assert not is_fused(model)
