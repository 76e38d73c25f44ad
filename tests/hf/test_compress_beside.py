"""A compressed cache whose rows a caller moves: the next words are those of the rows in their new order."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hf_checks import distance
from tiny_hf import LLAMA
from tiny_hf_compress import KINDS, QTEXT, ROWS

from fastmllm.compression import Placement, make
from fastmllm.hf import patch
from fastmllm.hf.compress.cached import MOVES
from fastmllm.hf.compress.owner import Head, Owner, TiledOwner
from fastmllm.hf.compress.seams import KEY

BY_NAME = {kind.name: kind for kind in KINDS}
STAGE = Placement(stages=((1, make("topk", 0.5, scorer="norm")),))
BOTH = Placement(connector=make("greedy_diverse", 8, position="renumber"), stages=STAGE.stages)
ORDERS = {
    "reorder_cache": (torch.tensor([1, 0, 2]), [1, 0, 2]),
    "batch_select_indices": (torch.tensor([2, 1]), [2, 1]),
    "batch_repeat_interleave": (2, [0, 0, 1, 1, 2, 2]),
}


@pytest.fixture(autouse=True)
def deeper(monkeypatch):
    for config in (LLAMA, QTEXT):
        monkeypatch.setitem(config, "num_hidden_layers", 2)


def following(model, kind, rows, method=None):
    """Return logits of a word behind rows, whose cache is moved by a method, if one is named."""
    batch = kind.rows(rows, side="left")
    with torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        mask = batch["attention_mask"]
        if method:
            by, order = ORDERS[method]
            cache = pickle.loads(pickle.dumps(copy.deepcopy(cache)))  # goes along with copies
            getattr(cache, method)(by)
            mask = mask[order]
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        word = torch.full((len(mask), 1), 40)
        return model(input_ids=word, attention_mask=mask, past_key_values=cache).logits


@pytest.mark.parametrize("method", MOVES)
@pytest.mark.parametrize("compress", ["divprune:4", STAGE, BOTH], ids=["connector", "stage", "both"])
def test_rows_that_are_moved_are_followed(compress, method):
    kind = BY_NAME["llava"]
    model = kind.build()
    patch(model, compress=compress)
    whole = following(model, kind, ROWS)
    assert distance(following(model, kind, ROWS, method), whole[ORDERS[method][1]]) < 1e-5


def test_both_places_share_one_state_one_owner_and_one_head():
    model = BY_NAME["llava_next"].build()
    for compress, owner in ((STAGE, Owner), (BOTH, TiledOwner)):
        patch(model, compress=compress)
        fused = [
            (m, f) for m in model.modules() for f in getattr(type(m), "_fastmllm_fusions", ()) if f.op == "compress"
        ]
        assert [m for m, f in fused if f is Head] == [model]
        assert [(m, f) for m, f in fused if issubclass(f, Owner)] == [(model.model, owner)]
        assert len({id(m.__dict__[KEY]) for m, _ in fused if KEY in m.__dict__}) == 1
