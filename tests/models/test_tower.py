"""A frozen tower: without graph, up to the layer that is used, in sub-batches, from a store; every image path."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_compositions import labels, picture, redrawn, tiny
from tiny_mllm import oracle

from fastmllm.bench.meters import LiveBytes
from fastmllm.data.images import open_image
from fastmllm.models import tower
from fastmllm.models.feature_store import FeatureStore
from fastmllm.models.mllm import MLLM

PATHS = [  # each image path once
    ("vit", "tiles", "mlp", "tokens"), ("vit", "anyres", "mlp", "tokens"), ("vit", "dual", "mlp", "cogagent"),
    ("vit", "native", "resampler", "flamingo"), ("qwen", "native", "merger", "deepstack"),
    ("mllama", "mllama", "none", "mllama"), ("vit", "fixed", "resampler", "idefics"),
]  # fmt: skip
BATCH = [[1, picture(k, *size), 10, 11] for k, size in enumerate(((20, 28), (24, 16), (16, 16), (30, 20), (16, 40)))]


@pytest.fixture
def count(monkeypatch):
    """Count the towers' calls by their first block, and let them run on one unit at a time."""

    def watch(model: MLLM, together: int = 1) -> list[int]:
        monkeypatch.setattr(tower, "ENCODED_TOGETHER", together)
        rows: list[int] = []
        block = model.images.vision.blocks[0]
        handles.append(block.register_forward_hook(lambda _, args, out: rows.append(len(args[0]))))
        return rows

    handles = []
    yield watch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("parts", PATHS, ids="-".join)
def test_a_frozen_tower_runs_in_sub_batches_without_graph(parts: tuple[str, str, str, str], count) -> None:
    model = redrawn(tiny(*parts))
    batch = model.pack(BATCH, labels(BATCH))
    assert batch.images is not None
    try:
        whole = tower.encode(model.images, batch.images)
        assert all(rows.requires_grad for rows in whole)
        for part in model.images.towers():
            part.requires_grad_(False)
        calls = count(model)
        expected = model(batch)
        units = model.images.units(batch.images)
        assert len(calls) == len(units) > 1
        apart = tower.encode(model.images, batch.images)
        assert not any(rows.requires_grad for rows in apart)
        for mine, theirs in zip(apart, whole, strict=True):
            torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)
        calls.clear()
        count(model, together=sum(units))
        torch.testing.assert_close(model(batch), expected)
        assert set(calls) == {max(calls)}  # one call; both hooks saw it
        expected.backward()
        reached = {name for name, param in model.named_parameters() if param.grad is not None}
        assert reached == {name for name, param in model.named_parameters() if param.requires_grad}
        for param in model.images.vision.parameters():
            param.ds_id = 0  # as under ZeRO-3: ranks call it equally often
        count(model)
        calls.clear()
        tower.encode(model.images, batch.images)
        assert len(set(calls)) == 1
    finally:
        for param in model.images.vision.parameters():
            param.__dict__.pop("ds_id", None)
        model.requires_grad_(True)
        model.zero_grad()


@pytest.mark.parametrize("name", ["llava", "instructblip", "mllama", "qwen3_vl"])
def test_processors_batches_are_taken_apart_too(name: str, tmp_path, count) -> None:
    theirs, batch = oracle(name)
    theirs.save_pretrained(tmp_path)
    model = MLLM.from_pretrained(tmp_path).requires_grad_(False)
    inputs = model.inputs(batch)
    whole = model.logits(inputs)
    calls = count(model)
    torch.testing.assert_close(model.logits(inputs), whole, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(model.images.units(inputs.images)) > 1


def test_memory_is_bounded_and_layers_behind_the_used_one_are_not_there(monkeypatch) -> None:
    config = tiny("vit", "tiles", "mlp", "tokens")
    model = redrawn(config)
    peaks = {}
    for number in (8, 32):
        rows = [[1, picture(k), 10] for k in range(number)]
        images = model.pack(rows, labels(rows)).images
        assert images is not None
        for learns in (True, False):
            for part in model.images.towers():
                part.requires_grad_(learns)
            for together in (48, 10**6):
                monkeypatch.setattr(tower, "ENCODED_TOGETHER", together)
                with LiveBytes() as live:
                    kept = sum(rows.nbytes for rows in tower.encode(model.images, images))
                peaks[number, learns, together] = live.peak - 2 * kept  # the parts, and what they are joined to
    model.requires_grad_(True)
    few, many = peaks[8, False, 48], peaks[32, False, 48]
    assert many < 1.2 * few  # does not grow with the pictures
    assert peaks[32, False, 10**6] > 5 * many
    assert peaks[32, True, 48] > 2 * peaks[32, False, 10**6]  # a graph keeps every layer
    earlier = replace(config.encoder, depth=5, layer=-3, final_norm=False)  # type: ignore[type-var]
    assert len(MLLM.from_config(replace(config, encoder=earlier)).images.vision.blocks) == 3


@pytest.mark.parametrize("parts", PATHS, ids="-".join)
def test_known_features_stand_in_for_pixels(parts: tuple[str, str, str, str], tmp_path, count) -> None:
    """Whatever of a batch a store knows, the logits are those of its pixels, and only the rest is encoded."""
    model, files = redrawn(tiny(*parts)), [str(tmp_path / f"{k}.png") for k in range(3)]
    for number, file in enumerate(files):
        Image.fromarray(picture(number, 20 + 12 * number, 28)).save(file)
    pictures = [open_image(file) for file in files]
    rows = [[1, pictures[0], 10, pictures[1]], [1, 30], [2, pictures[2], 11, pictures[0]]]
    store = FeatureStore(tmp_path / "store", torch.nn.ModuleList(model.images.towers()), "as here")
    try:
        model.requires_grad_(False)
        expected = model.logits(model.pack(rows))
        model.feature_store = store
        batch = model.pack(rows, paths=files)
        torch.testing.assert_close(model.logits(batch), expected, rtol=1e-4, atol=1e-4)
        entries = [store.entry(file) for file in files]
        known = [tower.known_from(entry) for entry in entries if entry is not None]
        assert [picture.size for picture in known] == [picture.size for picture in pictures]
        calls = count(model, together=10**6)
        for given in ((known[0], pictures[1], pictures[2]), (pictures[0], known[1], known[2]), tuple(known)):
            new = {id(old): picture for old, picture in zip(pictures, given, strict=True)}
            mixed = model.pack([[new.get(id(item), item) for item in row] for row in rows], paths=files)
            units = [] if mixed.images is None else model.images.units(mixed.images)
            assert len(units) < len(model.images.units(batch.images))
            calls.clear()
            torch.testing.assert_close(model.logits(mixed), expected, rtol=1e-4, atol=1e-4)
            assert len(calls) == bool(units)
        assert mixed.counts == batch.counts
        assert mixed.encoder_pixels == batch.encoder_pixels
        for param in model.images.vision.parameters():
            param.ds_id = 0  # as under ZeRO-3: a rank that knows all encodes a blank picture
        torch.testing.assert_close(model.logits(mixed), expected, rtol=1e-4, atol=1e-4)
        assert len(calls) == 1
    finally:
        model.feature_store = None
        for param in model.images.vision.parameters():
            param.__dict__.pop("ds_id", None)
        model.requires_grad_(True)
