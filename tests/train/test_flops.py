"""The step's operations are those that torch's own counter sees, for every factor; and those that a step needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alignment_toy import grpo, questions
from tiny_compositions import labels, redrawn, samples, tiny
from tiny_vlm import colour_photos, tiny_vlm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastmllm.alignment import prompts_of
from fastmllm.compression import METHODS, Placement
from fastmllm.data.packing import Batch
from fastmllm.kernels.attention import attention
from fastmllm.kernels.cross_attention import cross_attention
from fastmllm.models.efficientnet import EfficientNet, EfficientNetConfig
from fastmllm.models.flops import flop_formulas
from fastmllm.models.vlm import ModelConfig
from fastmllm.modules.depthwise_conv import DepthwiseConv
from fastmllm.train.engine import EngineConfig
from fastmllm.train.flops import FlopMeter, Work
from fastmllm.train.meters import read_log


def counted(model: nn.Module, loss: Callable[[], Tensor], vision: nn.Module | None = None) -> tuple[Work, int]:
    """Return what the meter counts in a pass forward and backward, and what torch's counter sees of it."""
    meter = FlopMeter(model, vision)
    with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
        with meter.forward():
            value = loss()
        with meter.backward():
            value.backward()
    meter.close()
    return meter.take(), counter.get_total_flops()


class Chain(nn.Module):
    """Three layers, of which some are checkpointed."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.layers, self.again = nn.ModuleList(nn.Linear(8, 8) for _ in range(3)), again

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            block = nn.Sequential(layer, nn.GELU())
            x = checkpoint(block, x, use_reentrant=False) if self.again else block(x)
        return x.sum()


ONE = 2 * 5 * 8 * 8  # a layer's forward pass over 5 rows


@pytest.mark.parametrize(
    "learns, factors",
    [((0, 1, 2), (2, 3, 3)), ((2,), (1, 1, 2)), ((0,), (2, 2, 2)), ((1,), (1, 2, 2)), ((0, 2), (2, 2, 3))],
)
def test_a_layer_costs_one_two_or_three(learns: tuple[int, ...], factors: tuple[int, ...]) -> None:
    model = Chain()
    for index, layer in enumerate(model.layers):
        layer.requires_grad_(index in learns)
    work, seen = counted(model, lambda: model(torch.randn(5, 8)))
    assert work.model == work.hardware == seen == sum(factors) * ONE


def test_checkpointing_costs_the_hardware_one_more() -> None:
    model, plain = Chain(again=True), Chain()
    x = torch.randn(5, 8)
    work, seen = counted(model, lambda: model(x))
    assert work.model == counted(plain, lambda: plain(x))[0].model
    assert work.hardware == seen == work.model + 3 * ONE


def batch_of(lengths: tuple[int, ...] = (9, 14), images: int = 2, visual: int = 4) -> Batch:
    """Pack samples; each of the first `images` shows as many visual tokens."""
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    total = int(bounds[-1])
    labels = torch.full((total,), -100)
    labels[-5:] = 7
    return Batch(
        input_ids=torch.arange(total) % 50 + 5,
        labels=labels,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens=bounds.int(),
        max_seqlen=max(lengths),
        image_index=torch.cat([bounds[i] + torch.arange(1, visual + 1) for i in range(images)]),
        pixels=torch.randint(0, 255, (images, 32, 32, 3), dtype=torch.uint8),
        num_targets=5,
        ids=[str(i) for i in range(len(lengths))],
        image_paths=[str(i) for i in range(images)],
    )


STAGES: dict[str, tuple[str, ...]] = {
    "connector": ("connector",),
    "connector and language model": ("connector", "language"),
    "all": ("vision", "connector", "language"),
    "last layer": ("language.model.layers.1",),
    "vision": ("vision",),
}


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("learns", STAGES)
def test_every_stage_of_a_vlm(learns: str, again: bool) -> None:
    config = ModelConfig(image_size=32, visual_tokens=4, dtype="float32", train_vision="vision" in STAGES[learns])
    model = tiny_vlm(config=config).train()
    for name, param in model.named_parameters():
        param.requires_grad_(name.startswith(STAGES[learns]))
    model.language.gradient_checkpointing = again
    work, seen = counted(model, lambda: model(batch_of()), model.vision)
    assert work.hardware == seen
    assert work.vision_s > 0
    tokens, width, patches = 2 * 16, 24, 2 * 2 * 16 * (8 * 8 * 3) * 24
    block = 2 * tokens * width * (4 * width + 2 * 4 * width) + 2 * 4 * width * 16 * 16  # products, then attention
    # patches learn without a gradient of the pixels
    assert work.vision == (2 * patches + 3 * block if config.train_vision else patches + block)


def test_cached_features_cost_nothing() -> None:
    model = tiny_vlm().train()
    model.requires_grad_(False).connector.requires_grad_(True)
    batch = batch_of()
    work, _ = counted(model, lambda: model(batch), model.vision)
    features = model.encode_images(batch.pixels)  # type: ignore[arg-type]
    model.feature_cache = type("Cache", (), {"gather": lambda self, paths: features})()  # type: ignore[assignment]
    batch.pixels = None
    cached, seen = counted(model, lambda: model(batch), model.vision)
    assert cached.hardware == seen
    assert cached.vision == 0
    assert cached.model == work.model - work.vision


@pytest.mark.parametrize("kind", ["merged", "judged"])
def test_an_encoder_that_a_compressor_looks_into_is_vision(kind: str) -> None:
    config = ModelConfig(image_size=32, visual_tokens=9, dtype="float32")
    batch = batch_of((14, 19), visual=9)
    model = tiny_vlm(config=config).train().requires_grad_(False)
    model.connector.requires_grad_(True)
    plain, _ = counted(model, lambda: model.connector(model.encode_images(batch.pixels)).sum(), model.vision)
    judged = Placement.of("connector", METHODS["topk"], 9, scorer="received", layer=-1)
    model.placement = Placement(merge=9) if kind == "merged" else judged
    work, _ = counted(model, lambda: model(batch), model.vision)
    assert work.vision_s > 0
    assert work.vision == plain.vision if kind == "judged" else 0 < work.vision < plain.vision
    assert not {"forward", "encode"} & set(vars(model.vision))


@pytest.mark.parametrize("inner", [1, 2])
def test_sampled_answers_cost_their_forward_passes(tmp_path: Path, inner: int) -> None:
    """Sampling from a cache, the log-probabilities of then and those of the reference: one F each."""
    model, photos = tiny_vlm(), colour_photos(tmp_path / "photos", count=1)
    run = grpo(tmp_path, photos, model=model, grpo={"inner": inner, "group": 2})
    alike = {"name": [sample for sample in questions(photos)["name"] if sample.image is not None]}
    prompts = prompts_of(model, alike, {}, run.stage, EngineConfig())(0)  # of one length: torch counts padding too
    run.rollouts.begin()
    meter = FlopMeter(model, model.vision)
    with (
        sdpa_kernel(SDPBackend.MATH),  # torch does not count the CPU's flash attention
        FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter,
        meter.forward(),
    ):
        run.rollouts(0, [prompts])
    work = meter.take()
    meter.close()
    assert work.model == work.hardware == counter.get_total_flops()
    assert work.vision_s > 0


def test_steps_of_sampling_say_what_it_took(tmp_path: Path) -> None:
    photos = colour_photos(tmp_path / "photos", count=1)
    for name, changes in (("without", {"kl": 0.0}), ("with", {"kl": 0.1})):
        grpo(tmp_path / name, photos, grpo={"inner": 2, "group": 2} | changes).run()
    without, reference = (read_log(tmp_path / name / "log.jsonl") for name in ("without", "with"))
    for first, second in ((0, 1), (2, 3)):
        assert without[first].model_tflop > without[second].model_tflop == reference[second].model_tflop
    assert 0 < reference[0].model_tflop - without[0].model_tflop < without[1].model_tflop


def test_attention_costs_its_own_segments() -> None:
    model = tiny_vlm().train()
    model.requires_grad_(True)
    one, _ = counted(model, lambda: model(batch_of((23,), images=1)))
    two, _ = counted(model, lambda: model(batch_of((9, 14), images=1)))
    layers, width, forward_and_backward = 2, 4 * 8, 3
    pairs = 23 * 24 // 2 - 9 * 10 // 2 - 14 * 15 // 2
    assert one.model - two.model == forward_and_backward * 4 * layers * width * pairs


def test_rows_without_label_have_no_logits() -> None:
    model = tiny_vlm().train()
    model.requires_grad_(True)
    few, more = batch_of(), batch_of()
    more.labels[-8:], more.num_targets = 7, 8
    vocabulary, width = model.language.head_weight.shape
    difference = counted(model, lambda: model(more))[0].model - counted(model, lambda: model(few))[0].model
    assert difference == 3 * 3 * 2 * vocabulary * width


def test_a_loss_that_counts_its_own_targets() -> None:
    model = tiny_vlm().train()
    model.requires_grad_(True)
    batch = batch_of()
    hidden, labels = torch.randn(len(batch.labels), 32, requires_grad=True), batch.labels
    told, _ = counted(model, lambda: model.language.lm_head(hidden, labels, 5))
    work, seen = counted(model, lambda: model.language.lm_head(hidden, labels))
    assert work.hardware == seen
    assert work == told


PARTS = [
    ("vit", "fixed", "mlp", "flamingo"), ("mllama", "mllama", "none", "mllama"), ("qwen", "native", "merger", "tokens"),
    ("vit", "tiles", "resampler", "idefics"), ("vit", "dual", "mlp", "cogagent"), ("vit", "fixed", "qformer", "tokens"),
    ("vit", "anyres", "pixel_shuffle", "tokens"),
]  # fmt: skip


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("learns", ["all", "language", "images"])
def test_every_kind_of_composition(parts: tuple[str, str, str, str], learns: str) -> None:
    model = redrawn(tiny(*parts)).train()
    for name, param in model.named_parameters():
        param.requires_grad_(learns == "all" or name.startswith(learns))
    inputs = model.pack(samples(), labels(samples()))
    work, seen = counted(model, lambda: model(inputs), model.images)
    model.requires_grad_(True).eval().zero_grad()
    assert work.hardware == pytest.approx(seen, rel=1e-12)
    assert 0 < work.vision < work.model


def test_depthwise_convolutions_cost_their_own_channel() -> None:
    """torch's counter multiplies the gradient of a grouped convolution's weight by all channels, so it is no judge."""
    layer, grid = DepthwiseConv(6, 3), [(2, 4, 5)]
    x = torch.randn(40, 6, requires_grad=True)
    work, _ = counted(layer, lambda: layer(x, grid).sum())
    assert work.model == work.hardware == 3 * 2 * 40 * 6 * 9
    encoder = EfficientNet(EfficientNetConfig()).requires_grad_(False)
    pixels = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    meter = FlopMeter(encoder)
    with FlopCounterMode(display=False) as counter, meter.forward():
        encoder(pixels)
    work = meter.take()
    assert work.model == work.hardware == counter.get_total_flops() > 0
    meter.close()
    with meter.forward():
        encoder(pixels)
    assert meter.take() == Work()


@pytest.mark.parametrize("learns", ["q", "kv", "qkv", ""])
def test_attention_needs_the_products_of_plain_torch(learns: str) -> None:
    """Two products forward and those of the gradients, and once more the scores, which plain torch keeps."""
    q, k, v = (torch.randn(6, 2, 8, requires_grad=name in learns) for name in "qkv")
    starts, stops = torch.zeros(6, dtype=torch.int32), torch.full((6,), 6, dtype=torch.int32)
    bounds = torch.tensor([0, 6], dtype=torch.int32)

    def plain() -> Tensor:
        scores = (q.transpose(0, 1) @ k.permute(1, 2, 0)).softmax(-1)
        return (scores @ v.transpose(0, 1)).sum()

    with FlopCounterMode(display=False) as counter:
        loss = plain()
        if learns:
            loss.backward()
    needed, product = counter.get_total_flops(), 2 * 2 * 8 * 36
    for call in (
        lambda: attention(q, k, v, bounds, max_seqlen_q=6).sum(),
        lambda: cross_attention(q, k, v, starts, stops).sum(),
    ):
        meter = FlopMeter(nn.Identity())
        with meter.forward():
            call()
        work = meter.take()
        assert (work.model, work.hardware) == (needed, needed + bool(learns) * product)
