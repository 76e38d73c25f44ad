"""What the tiny models of test_mllm do not say, against transformers: videos, layer lists, strategies, vocabularies."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers")

import transformers as tf

from fastmllm.infer.generation import generate_tokens
from fastmllm.infer.sampling import SamplingParams
from fastmllm.models.families import build
from fastmllm.models.mllm import MLLM
from tests.support.tiny_mllm import IMAGE, MODELS, SIGLIP, VEND, VIDEO, VOCAB, VSTART, oracle, pixels, redraw

PERCEIVER = {"use_resampler": False, "resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4,
             "resampler_head_dim": 8}  # fmt: skip


def variant(name, changes):
    """Return a family's tiny model with another config.json, redrawn."""
    model, _ = MODELS[name]()
    raw = model.config.to_dict()
    for key, value in changes.items():
        merged = isinstance(value, dict) and raw[key].get("model_type") == value.get(
            "model_type", raw[key]["model_type"]
        )
        raw[key] = {**raw[key], **value} if merged else value
    made = type(model)(type(model.config)(**raw))
    made.set_attn_implementation("eager")
    return redraw(made)


def words(count, start=0):
    return [20 + (start + 3 * k) % 90 for k in range(count)]


def rows(*samples, left=False):
    """Pad rows, with the types that transformers wants beside them."""
    length = max(map(len, samples))
    pads = [[0] * (length - len(s)) for s in samples]
    ids = torch.tensor([p + s if left else s + p for s, p in zip(samples, pads, strict=True)])
    ones = [[1] * len(s) for s in samples]
    mask = torch.tensor([p + s if left else s + p for s, p in zip(ones, pads, strict=True)])
    return {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": (ids == IMAGE) + 2 * (ids == VIDEO).int()}


def videos(apart, **more):
    """Two images and two videos, 2 x 4 x 12 and 3 x 4 x 12 patches; in one run each, or a run a frame."""

    def video(frames, tokens):
        if not apart:
            return [VSTART, *[VIDEO] * frames * tokens, VEND]
        return [t for k in range(frames) for t in (*words(2, k), VSTART, *[VIDEO] * tokens, VEND)]

    images, clips = torch.tensor([[1, 2, 4], [1, 4, 6]]), torch.tensor([[2, 4, 12], [3, 4, 12]])
    return {
        "pixel_values": pixels(int(images.prod(-1).sum()), 96), "image_grid_thw": images,
        "pixel_values_videos": pixels(int(clips.prod(-1).sum()), 96, seed=3), "video_grid_thw": clips,
        **rows([1, *words(2), *video(2, 12), *words(2), VSTART, *[IMAGE] * 2, VEND, *words(3)], [1, *words(4)],
               [1, VSTART, *[IMAGE] * 6, VEND, *words(1), *video(3, 12), *words(5, 7)], left=True),
        **more,
    }  # fmt: skip


def multi():
    """Two images of one sample, no tiles; then a tiled one."""
    return {
        "pixel_values": pixels(3, 5, 3, 28, 28), "image_sizes": torch.tensor([[56, 56], [30, 30], [56, 56]]),
        "batch_num_images": torch.tensor([2, 1]),
        **rows([1, *words(2), *[IMAGE] * 17, *words(2), *[IMAGE] * 17, 9], [1, *[IMAGE] * (16 + 5 * 6), *words(3)]),
    }  # fmt: skip


def across(vocab=VOCAB):
    """Rows of which some see no image, with tokens from the end of the vocabulary."""
    batch = MODELS["idefics"]()[1]
    batch["input_ids"][0, 3], batch["input_ids"][1, 2] = vocab - 1, vocab - 2
    return batch


def fixed(count, left=False):
    return {
        "pixel_values": pixels(2, 3, 28, 28),
        **rows([1, *words(3), *[IMAGE] * count, *words(6)], [1, *words(2)], [1, *[IMAGE] * count, 9], left=left),
    }


SIGLIP_TOWER = {"model_type": "siglip_vision_model", **SIGLIP}
CASES = {
    "left padding": ("llava", {}, lambda: fixed(16, left=True)),
    "two layers": ("llava", {"vision_feature_layer": [-2, 1]}, lambda: fixed(16)),
    "two of SigLIP": ("llava_onevision", {"vision_feature_layer": [1, -1]}, lambda: oracle("llava_onevision")[1]),
    "SigLIP without its first patch": ("llava", {"vision_config": SIGLIP_TOWER}, lambda: fixed(15)),
    "SigLIP": (
        "llava", {"vision_config": SIGLIP_TOWER, "vision_feature_select_strategy": "full"}, lambda: fixed(16),
    ),
    "tied": ("llava", {"tie_word_embeddings": True}, lambda: fixed(16)),
    "a part of a patch": (
        "llava_onevision",
        {"vision_config": {"image_size": 30}, "image_grid_pinpoints": [[30, 60], [60, 30], [60, 60]]},
        lambda: {**oracle("llava_onevision")[1], "pixel_values": pixels(2, 5, 3, 30, 30),
                 "image_sizes": torch.tensor([[60, 60], [30, 54]])},
    ),
    "several images": ("llava_onevision", {}, multi),
    "seconds": (
        "qwen2_5_vl", {"vision_config": {"tokens_per_second": 2}},
        lambda: videos(False, second_per_grid_ts=torch.tensor([1.0, 0.5])),
    ),
    "no seconds": ("qwen2_vl", {}, lambda: videos(False)),
    "frames apart": ("qwen3_vl", {}, lambda: videos(True)),
    "more words": ("idefics", {"additional_vocab_size": 3}, lambda: across(VOCAB + 3)),
    "more words, tied": (
        "idefics", {"additional_vocab_size": 3, "tie_word_embeddings": True}, lambda: across(VOCAB + 3),
    ),
    "no resampler": ("idefics", {"use_resampler": False, "perceiver_config": PERCEIVER}, across),
}  # fmt: skip


# transformers 5.17 cut the seconds between two frames to whole ones
OLD = tuple(map(int, tf.__version__.split(".")[:2])) < (5, 23)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_checkpoint_equal_transformers(case, tmp_path):
    name, changes, batch = CASES[case]
    if OLD and case == "seconds":
        pytest.skip("transformers cuts seconds")
    theirs, batch = variant(name, changes), batch()
    theirs.save_pretrained(tmp_path / "theirs")
    accepted = batch if "qwen" in name else {k: v for k, v in batch.items() if k != "mm_token_type_ids"}
    with torch.no_grad():
        expected = theirs(**accepted).logits[batch["attention_mask"].bool()]
        ours = MLLM.from_pretrained(tmp_path / "theirs")
        found = ours.logits(ours.inputs(batch))
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
        ours.save_pretrained(tmp_path / "ours")
        again = type(theirs).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
        assert torch.equal(again(**accepted).logits, theirs(**accepted).logits)


@pytest.mark.skipif(OLD, reason="transformers cuts seconds")
@pytest.mark.parametrize("seconds", [[0.7, 1.3], [0.04, 0.3], [1.1, 0.1]])
@pytest.mark.parametrize("rate", [2, 25])
@pytest.mark.parametrize("as_list", [False, True])
def test_positions_of_a_video_equal_transformers(seconds, rate, as_list, tmp_path):
    """Seconds times tokens a second is a product in float32 where the processor gives a tensor."""
    theirs = variant("qwen2_5_vl", {"vision_config": {"tokens_per_second": rate}})
    seconds = seconds if as_list else torch.tensor(seconds)
    batch = videos(False, second_per_grid_ts=seconds)
    theirs.save_pretrained(tmp_path)
    given = {k: v for k, v in batch.items() if not k.startswith("pixel")}
    expected, _ = theirs.model.get_rope_index(**given)
    expected = expected[:, batch["attention_mask"].bool()]
    found = MLLM.from_pretrained(tmp_path).inputs(batch).position_ids
    places = (batch["input_ids"][batch["attention_mask"].bool()] == VIDEO).nonzero()[:, 0]
    for video in places.split([24, 36]):  # from its start: what stands behind a long one differs, see below
        assert torch.equal(found[:, video] - found[:, video[:1]], expected[:, video] - expected[:, video[:1]])


@pytest.mark.parametrize(
    ("name", "cls"), [("llava_next", tf.LlavaNextConfig), ("llava_onevision", tf.LlavaOnevisionConfig)]
)
def test_canvases_that_config_json_leaves_out_are_the_familys(name, cls):
    raw = json.loads(cls().to_json_string())
    expected = raw.pop("image_grid_pinpoints")
    raw["image_token_id"] = IMAGE
    with torch.device("meta"):
        policy = build(raw, "a checkpoint").images.policy
    assert [list(p) for p in policy.pinpoints] == expected


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl"])
def test_a_grid_without_its_first_patch_is_refused(name):
    """transformers raises in forward."""
    raw = MODELS[name]()[0].config.to_dict() | {
        "vision_config": SIGLIP_TOWER,
        "vision_feature_select_strategy": "default",
    }
    with pytest.raises(ValueError, match="drops the first patch of an encoder without a class token"):
        build(raw, "a checkpoint")


def test_an_answer_longer_than_opts_positions_is_refused_before_it_starts(tmp_path, monkeypatch):
    oracle("blip2")[0].save_pretrained(tmp_path)
    model = MLLM.from_pretrained(tmp_path)
    inputs = model.inputs(oracle("blip2")[1])
    room = 128 - inputs.max_seqlen
    assert len(generate_tokens(model, inputs, SamplingParams(max_new_tokens=room + 1))[0]) == room + 1
    monkeypatch.setattr(model, "start", lambda *_: pytest.fail("started"))
    with pytest.raises(ValueError, match="a sequence of 129 tokens is longer than the 128 learned positions"):
        generate_tokens(model, inputs, SamplingParams(max_new_tokens=room + 2))


class Elsewhere(torch.Tensor):
    """A tensor on another device: nothing but `cpu` may read it."""

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") not in ("as_subclass", "cpu"):
            raise RuntimeError(f"{func} reads a tensor of another device")
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_may_lie_on_any_device(name, tmp_path):
    theirs, batch = oracle(name)
    theirs.save_pretrained(tmp_path)
    model = MLLM.from_pretrained(tmp_path)
    expected = model.inputs({**batch, "labels": batch["input_ids"]})
    found = model.inputs({k: v.as_subclass(Elsewhere) for k, v in {**batch, "labels": batch["input_ids"]}.items()})
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.plan.labels, expected.plan.labels)
    shutil.rmtree(tmp_path)


def test_text_behind_a_video_longer_in_time_than_in_space_starts_behind_it(tmp_path):
    """transformers 5.23 (and 5.17) looks at height and width only (issue 45381): there the text starts inside of it."""
    theirs = variant("qwen2_vl", {})
    theirs.save_pretrained(tmp_path)
    batch = {
        "pixel_values_videos": pixels(20, 96), "video_grid_thw": torch.tensor([[5, 2, 2]]),
        **rows([1, VSTART, *[VIDEO] * 5, VEND, 9]),
    }  # fmt: skip
    found = MLLM.from_pretrained(tmp_path).inputs(batch).position_ids
    expected, _ = theirs.model.get_rope_index(**{k: v for k, v in batch.items() if not k.startswith("pixel")})
    assert found[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert expected[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 6, 3, 4]  # when this fails, transformers is mended
