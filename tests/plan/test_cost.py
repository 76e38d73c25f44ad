"""Costs: what is counted without numbers is what a model with numbers computes and holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from pictures import picture

from fastmllm.bench.meters import LiveBytes, count_flops
from fastmllm.bench.roofline import Rates
from fastmllm.compression import Placement
from fastmllm.data.resolution import CogAgent, Fixed, InternVL, Mllama, Native
from fastmllm.hf.compress.crossed import CROSSED
from fastmllm.hf.compress.seams import SEAMS
from fastmllm.models.composition import ConnectorSizes, ResolutionSizes
from fastmllm.models.eva import EvaConfig
from fastmllm.models.mllama_vision import MllamaVisionConfig
from fastmllm.models.mllm import MLLM
from fastmllm.models.packing import Packing
from fastmllm.models.qwen_vision import QwenVisionConfig
from fastmllm.models.sizes import text
from fastmllm.models.vision import VisionConfig
from fastmllm.plan.builders import IMAGE_TOKEN, composed
from fastmllm.plan.cost import Batch, Costs, measure
from fastmllm.plan.stacks import STACKS, Stack
from fastmllm.plan.tokens import count_tokens, find_placement

RATES = Rates(flops=1e12, bytes=1e11)
TEXT = text("llama", 64, 32, 48, 4, 4, 2)
VIT = VisionConfig(width=16, depth=3, num_heads=2, mlp_ratio=2.0, patch_size=14, image_size=56, layer_scale=None)
QWEN = QwenVisionConfig(width=16, depth=2, num_heads=2, mlp_width=20, out_width=32, patch_size=14, window=None)
MLLAMA = MllamaVisionConfig(
    width=16, depth=2, global_depth=1, num_heads=2, mlp_width=20, layers=(0,), tile_size=56, patch_size=14
)  # fmt: skip
EVA = EvaConfig(width=16, depth=2, num_heads=2, mlp_width=20, image_size=112, rope_grid=4, layer=2)
SMALL = {  # a stack of each kind, tiny
    "tiles": Stack(
        policy=InternVL(image_size=56, max_tiles=4), seam=SEAMS["internvl"], about="",
        make=partial(composed, VIT, resolution="tiles", connector="pixel_shuffle"),
    ),
    "fixed": Stack(
        policy=Fixed(image_size=56), seam=SEAMS["llava"], about="", make=partial(composed, VIT)
    ),
    "across": Stack(
        policy=Fixed(image_size=56, queries=3, cross=True), seam=None, about="",
        make=partial(composed, VIT, fusion="flamingo", connector="resampler", cross_every=2,
                     connector_sizes=ConnectorSizes(tokens=3, depth=2, num_heads=2, head_dim=8)),
    ),
    "native": Stack(
        policy=Native(min_pixels=None, max_pixels=None), seam=SEAMS["qwen2_5_vl"], about="",
        make=partial(composed, QWEN, resolution="native", connector="merger",
                     resolution_sizes=ResolutionSizes(min_pixels=None, max_pixels=None)),
    ),
    "mllama": Stack(
        policy=Mllama(image_size=56), seam=CROSSED["mllama"][0], about="",
        make=partial(composed, MLLAMA, resolution="mllama", fusion="mllama", connector="none", cross_every=2),
    ),
    "dual": Stack(
        policy=CogAgent(image_size=56, cross_image_size=112, border_tokens=0), seam=None, about="",
        make=partial(composed, VIT, resolution="dual", fusion="cogagent", high_res=EVA),
    ),
}  # fmt: skip
SIZE = (150, 100)
BATCH = Batch(samples=2, images=2, text_tokens=5, new_tokens=8)


def shape_of(stack: Stack) -> MLLM:
    with torch.device("meta"):
        model = MLLM(stack.make(TEXT), {})
    model.packing = Packing(policy=stack.policy, image_token=IMAGE_TOKEN)
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def cost(stack: Stack, compress: str | None = None, batch: Batch = BATCH) -> Costs:
    plan, placement = stack.policy.plan(*SIZE), find_placement(compress, stack, "small")
    counts = count_tokens(plan, stack, placement)
    return measure(shape_of(stack), plan, counts, placement, batch, RATES, behind=stack.behind)


def real(stack: Stack, placement: Placement | None = None) -> tuple[MLLM, list]:
    """Return the same model with numbers, and the same batch."""
    torch.manual_seed(0)
    model = MLLM(stack.make(TEXT), {}).to(torch.bfloat16).eval().requires_grad_(False)
    model.packing = Packing(policy=stack.policy, image_token=IMAGE_TOKEN)
    model.placement = placement or Placement()
    samples = [
        [*(picture(*SIZE, seed=2 * s + i) for i in range(BATCH.images)), *[2] * BATCH.text_tokens]
        for s in range(BATCH.samples)
    ]
    return model, samples


@pytest.mark.parametrize("name", SMALL)
def test_operations_and_bytes_are_those_of_a_real_run(name: str) -> None:
    stack = SMALL[name]
    found, (model, samples) = cost(stack), real(stack)
    inputs = model.pack(samples)
    assert found.prompt == inputs.num_tokens // BATCH.samples
    cache = model.language.new_cache(BATCH.samples, found.prompt + BATCH.new_tokens)
    held = []

    def start() -> None:
        hidden, going_on = model.start(inputs, cache)
        model.language.logits(hidden[: BATCH.samples])
        held.append(going_on)

    with torch.no_grad():
        flops = count_flops(start)
        assert found.encode.flops + found.prefill.flops == flops
        assert found.encode.flops == count_flops(lambda: model.images(**inputs.images))
        for _ in range(BATCH.new_tokens // 2):
            held[0].extend(torch.zeros(2, dtype=torch.int64), [1, 1], cache)
        step = count_flops(lambda: model.language.logits(held[0].extend(torch.zeros(2).long(), [1, 1], cache)))
    # torch counts no attention over a cache on a CPU
    attention = found.decode.parts["llm attention"].flops
    assert found.decode.flops - attention == step
    assert attention == BATCH.samples * 4 * 4 * 4 * 8 * (found.prompt + BATCH.new_tokens // 2 + 1)
    assert found.kv == sum(t.nbytes for t in cache.keys + cache.values)
    media = held[0].media
    assert found.cross_kv == (0 if media is None else sum(t.nbytes for pair in media.kv.values() for t in pair))
    assert (found.cross_kv > 0) == (name in ("across", "mllama", "dual"))
    assert found.weights == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("name", ["fixed", "dual"])
def test_the_most_that_is_alive_is_that_of_a_real_run(name: str) -> None:
    stack = SMALL[name]
    found, (model, samples) = cost(stack), real(stack)
    inputs = model.pack(samples)
    pixels = sum(value.nbytes for value in inputs.images.values() if isinstance(value, torch.Tensor))
    with torch.no_grad(), LiveBytes() as live:
        model.images(**inputs.images)
    assert found.encode.peak == live.peak + pixels
    with torch.no_grad(), LiveBytes() as live:
        cache = model.language.new_cache(BATCH.samples, found.prompt + BATCH.new_tokens)
        hidden, _ = model.start(inputs, cache)
        model.language.logits(hidden[: BATCH.samples])
    assert found.prefill.peak == pytest.approx(live.peak, rel=0.02)
    assert found.total == found.weights + max(found.encode.peak, found.prefill.peak)


@pytest.mark.parametrize("compress", ["fastv:0.5", "pyramiddrop:0.5/0.25/0.25"])
def test_stages_between_layers_are_those_of_a_real_run(compress: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmllm.compression.published import PUBLISHED

    monkeypatch.setitem(PUBLISHED, "PyramidDrop", {**PUBLISHED["PyramidDrop"], "at": "language:1/2/3"})
    stack = SMALL["fixed"]
    placement = find_placement(compress, stack, "small")
    found, (model, samples) = cost(stack, compress), real(stack, placement)
    inputs = model.pack(samples)
    cache = model.language.new_cache(BATCH.samples, found.prompt + BATCH.new_tokens)

    def start() -> None:
        hidden, _ = model.start(inputs, cache)
        model.language.logits(hidden[: BATCH.samples])

    with torch.no_grad():
        assert found.encode.flops + found.prefill.flops == count_flops(start)
    assert found.kv == sum(t.nbytes for t in cache.keys + cache.values) < cost(stack).kv
    assert found.prefill.parts["compressor"].flops > 0


def test_fewer_tokens_at_the_connector_cost_less() -> None:
    tiles = SMALL["tiles"]
    whole, half = cost(tiles), cost(tiles, "visionzip:2")
    assert half.encode.parts["vision"] == whole.encode.parts["vision"]
    assert half.encode.parts["connector"].flops == whole.encode.parts["connector"].flops // 2  # 2 of 4 tokens a tile
    assert half.encode.parts["compressor"].flops > 0
    assert half.prompt == whole.prompt - 2 * 2 * 5  # two images of five tiles
    behind, merged = cost(SMALL["native"], "divprune:3"), cost(SMALL["fixed"], "tome:8")
    assert behind.encode.parts["connector"] == cost(SMALL["native"]).encode.parts["connector"]
    assert merged.encode.parts["vision"].flops < cost(SMALL["fixed"]).encode.parts["vision"].flops
    assert merged.encode.parts["connector"].flops == cost(SMALL["fixed"]).encode.parts["connector"].flops // 2
    with pytest.raises(ValueError, match="there is no class token"):
        cost(SMALL["native"], "visionzip:2")


def test_formulas_of_a_published_stack() -> None:
    """What docs/planner.md says, written out for InternViT-300M and Qwen2.5-7B."""
    stack = STACKS["internvl"]
    plan = stack.policy.plan(1920, 1080)
    counts = count_tokens(plan, stack, Placement())
    found = measure(stack.build("qwen2.5-7b"), plan, counts, Placement(), Batch(), RATES, behind=False)
    tiles, rows, width = 9, 1025, 1024
    blocks = 24 * (4 * width**2 + 2 * width * 4096)
    patches = 588 * width * 1024
    assert found.encode.parts["vision"].flops == tiles * 2 * (rows * blocks + patches)
    assert found.encode.parts["vision attention"].flops == tiles * 24 * 4 * width * rows**2
    layer = 3584 * (3584 + 2 * 512) + 3584**2 + 3 * 3584 * 18944
    prompt = 2304 + 64
    assert found.prompt == prompt
    assert found.prefill.parts["llm"].flops == 2 * 28 * layer * prompt
    assert found.prefill.parts["llm attention"].flops == 28 * 4 * 3584 * prompt * (prompt + 1) // 2
    assert found.prefill.parts["embeddings"].flops == 2 * 3584 * 152064
    assert found.kv == 2 * 2 * 28 * 512 * (prompt + 128)
    seen = prompt + 64 + 1
    assert found.decode.parts["llm attention"].flops == 28 * 4 * 3584 * seen
    # each weight is read once, and so is the cache
    assert found.decode.parts["llm"].bytes == pytest.approx(2 * 28 * layer, rel=1e-3)
    assert found.decode.parts["llm attention"].bytes == pytest.approx(2 * 2 * 28 * 512 * seen, rel=0.02)
    assert found.decode.seconds == pytest.approx(found.decode.bytes / RATES.bytes)
    assert found.prefill.parts["llm"].seconds == pytest.approx(found.prefill.parts["llm"].flops / RATES.flops)


def test_a_batch_must_hold_something() -> None:
    with pytest.raises(ValueError, match="plan: new_tokens is 0; it must be at least 1"):
        replace(Batch(), new_tokens=0)
