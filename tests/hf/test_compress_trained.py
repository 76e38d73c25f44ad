"""patch(compress=…) by methods with weights of their own: who trains them, and who saves them."""

from __future__ import annotations

import pytest
import torch
from hf_checks import distance
from tiny_hf_compress import KINDS, ROWS
from transformers import Trainer, TrainingArguments

from fastmllm.compression import Attend, ConvReduce, Placement, make
from fastmllm.hf import FastMLLMCallback, patch, unpatch

BY_NAME = {kind.name: kind for kind in KINDS}
LLAVA, QWEN = BY_NAME["llava"], BY_NAME["qwen2_5_vl"]
RENUMBER = {"position": "renumber"}


DESIGNS = {
    "token_packer": lambda: Attend(4, 32, design="token_packer", hidden=16, head_dim=8, **RENUMBER),
    "mqt": lambda: Attend(4, 32, design="mqt", **RENUMBER),
    "perceiver": lambda: Attend(4, 32, design="perceiver", num_heads=4, head_dim=8, depth=1, **RENUMBER),
    "qformer": lambda: Attend(4, 32, design="qformer", num_heads=4, depth=2, **RENUMBER),
    "c_abstractor": lambda: ConvReduce(4, 32, design="c_abstractor", **RENUMBER),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_gradients_reach_all_weights(design):
    torch.manual_seed(0)
    compressor = DESIGNS[design]()
    model = LLAVA.build().train()
    patch(model, compress=compressor)
    model(**LLAVA.rows(labels=True)).loss.backward()
    lost = [n for n, p in compressor.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert not lost


def trainer(model, path, compressor, optimizer, callbacks, loss=None, **options):
    rows = [LLAVA.rows((row,), labels=True) for row in (ROWS[0], ROWS[2])]

    def collate(batch):
        return batch[0]

    arguments = TrainingArguments(
        output_dir=str(path), max_steps=3, per_device_train_batch_size=1, report_to=[], save_strategy="no",
        learning_rate=1e-2, disable_tqdm=True, use_cpu=True, remove_unused_columns=False, **options,
    )  # fmt: skip
    schedule = None
    if optimizer:
        both = [*model.parameters(), *compressor.parameters()]
        made = torch.optim.SGD(both, lr=1e-2)
        schedule = (made, torch.optim.lr_scheduler.ConstantLR(made, 1.0))
    return Trainer(model, arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks,
                   compute_loss_func=loss,
                   **({} if schedule is None else {"optimizers": schedule}))  # fmt: skip


def test_a_trainer_learns_what_its_optimizer_has(tmp_path):
    torch.manual_seed(0)
    model, compressor = LLAVA.build(), Attend(4, 32, design="mqt", **RENUMBER)
    keys = list(model.state_dict())
    patch(model, compress=compressor)
    before = {n: p.detach().clone() for n, p in compressor.named_parameters()}
    with pytest.raises(ValueError, match=r"lacks \d+ weights of attend"):
        trainer(model, tmp_path, compressor, False, [FastMLLMCallback]).train()
    trainer(model, tmp_path, compressor, True, [FastMLLMCallback]).train()
    moved = [n for n, p in compressor.named_parameters() if p.requires_grad and torch.equal(p, before[n])]
    assert not moved
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        found = model.eval()(**LLAVA.rows()).logits
        torch.save(compressor.state_dict(), tmp_path / "compressor.pt")
        weights = model.state_dict()
        again, fresh = LLAVA.build(), Attend(4, 32, design="mqt", **RENUMBER).double()
        again.load_state_dict(weights)
        fresh.load_state_dict(torch.load(tmp_path / "compressor.pt"))
        patch(again, compress=fresh)
        assert torch.equal(again.eval()(**LLAVA.rows()).logits, found)
        unpatch(again)


def test_frozen_weights_and_selectors_need_nobody(tmp_path):
    compressor = Attend(4, 32, design="mqt", **RENUMBER).requires_grad_(False)
    for compress in (compressor, "divprune:4"):
        trainer(LLAVA.build(), tmp_path, None, False, [FastMLLMCallback(compress=compress)]).train()


def test_qwen_learns_behind_its_merger():
    torch.manual_seed(0)
    model, compressor = QWEN.build().train(), Attend(4, 48, design="mqt", position="keep")
    patch(model, compress=compressor)
    found = []
    for rows in (ROWS, (ROWS[2],)):
        model.zero_grad()
        compressor.zero_grad()
        model(**QWEN.rows(rows, labels=True)).loss.backward()
        found.append({n: p.grad.clone() for n, p in compressor.named_parameters() if p.requires_grad})
    assert all(g.any() for grads in found for g in grads.values())
    assert distance(found[0], found[1]) > 1e-3


KEPT_BACK = [
    ("divprune:4", {"label_smoothing_factor": 0.1}),
    (Placement(stages=((1, make("topk", 4, scorer="norm")),)), {"loss": lambda *_, **__: None}),
]


@pytest.mark.parametrize(("compress", "options"), KEPT_BACK, ids=["connector", "stage"])
def test_labels_that_a_trainer_keeps_back_are_refused(compress, options, tmp_path):
    """It would compare them with logits that are fewer."""
    with pytest.raises(ValueError, match="keeps the labels back"):
        trainer(LLAVA.build(), tmp_path, None, False, [FastMLLMCallback(compress=compress)], **options).train()
