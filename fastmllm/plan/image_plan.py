"""A picture on paper: what it costs under a policy, a compressor and a language model, on a device."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmllm.bench.roofline import Rates, Work
from fastmllm.data.images import open_image
from fastmllm.data.resolution import Plan
from fastmllm.plan.cost import Batch, Costs, measure
from fastmllm.plan.machine import check_machine, find_machine
from fastmllm.plan.meter import Phase
from fastmllm.plan.stacks import find_stack
from fastmllm.plan.tokens import TokenCounts, Waste, count_tokens, find_placement, waste_of
from fastmllm.train.devices import Device

DTYPE = "bfloat16"
MEMORY_SHARE = 0.92  # of the device's, for tensors: context and fragmentation have the rest


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePlan:
    """What a batch of equal pictures costs.

    Args:
        policy, compress, llm: names, as they were given.
        about: tower and connector, in words.
        plan: of the picture.
        waste: of the encoder's pixels.
        tokens: of one picture.
        batch: what is asked at once.
        costs: of the batch.
        device: figures.
        context: tokens that the language model was trained for.
    """

    policy: str
    compress: str | None
    llm: str
    about: str
    plan: Plan
    waste: Waste
    tokens: TokenCounts
    batch: Batch
    costs: Costs
    device: Device
    context: int

    @property
    def room(self) -> int:
        """Bytes that tensors may have."""
        return int(MEMORY_SHARE * self.device.memory)

    @property
    def fits(self) -> bool:
        return self.costs.total <= self.room

    @property
    def most_samples(self) -> int:
        """Prompts of this kind that fit at once, as far as all but the weights grows with them."""
        each = (self.costs.total - self.costs.weights) / self.batch.samples
        return max(int((self.room - self.costs.weights) / each), 0)

    @property
    def first_token_s(self) -> float:
        """Seconds up to the first token, without the host's."""
        return self.costs.encode.seconds + self.costs.prefill.seconds

    @property
    def answer_s(self) -> float:
        """Seconds up to the last token."""
        return self.first_token_s + self.batch.new_tokens * self.costs.decode.seconds

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        plan, costs = self.plan, self.costs
        return {
            "policy": self.policy, "compress": self.compress, "llm": self.llm, "about": self.about,
            "device": self.device.name, "dtype": DTYPE, "batch": asdict(self.batch),
            "image": {
                "size": plan.size, "tiles": len(plan.tiles), "grid": plan.grid, "resized": plan.resized,
                "effective_size": plan.effective_size, "effective_pixels": plan.effective_pixels,
                "encoder_pixels": plan.encoder_pixels, "waste": {**asdict(self.waste), "total": self.waste.total},
            },
            "tokens": asdict(self.tokens),
            "prompt_tokens": costs.prompt, "context": self.context,
            "phases": {name: _phase(phase) for name, phase in self.phases().items()},
            "memory": {
                "weights": costs.weights, "kv": costs.kv, "cross_kv": costs.cross_kv, "total": costs.total,
                "room": self.room, "fits": self.fits, "most_samples": self.most_samples,
            },
            "first_token_s": self.first_token_s, "answer_s": self.answer_s,
        }  # fmt: skip

    def phases(self) -> dict[str, Phase]:
        """Return the phases of an answer by name."""
        return {"encode": self.costs.encode, "prefill": self.costs.prefill, "decode": self.costs.decode}

    def shares(self) -> dict[str, float]:
        """Return where the time of the whole answer goes, the largest first; together 1."""
        seconds: dict[str, float] = {}
        for name, phase in self.phases().items():
            times = self.batch.new_tokens if name == "decode" else 1
            for part, work in phase.parts.items():
                seconds[f"{name}: {part}"] = times * work.seconds
        whole = sum(seconds.values())
        return {name: s / whole for name, s in sorted(seconds.items(), key=lambda item: -item[1])}


def _phase(phase: Phase) -> dict[str, Any]:
    def plain(work: Phase | Work) -> dict[str, float]:
        return {"flops": work.flops, "bytes": work.bytes, "seconds": work.seconds}

    return {**plain(phase), "peak": phase.peak, "parts": {name: plain(work) for name, work in phase.parts.items()}}


def image_size(image: str) -> tuple[int, int]:
    """Return the (width, height) that "1920x1080" says, or a file's.

    Raises:
        ValueError: neither of them.
    """
    if re.fullmatch(r"\d+x\d+", image):
        width, _, height = image.partition("x")
        return int(width), int(height)
    if not Path(image).exists():
        raise ValueError(f"plan: image {image!r} is neither WIDTHxHEIGHT, such as 1920x1080, nor a file")
    return open_image(image).size


def plan_image(
    size: tuple[int, int],
    *,
    policy: str = "internvl",
    compress: str | None = None,
    llm: str = "qwen2.5-7b",
    device: str = "h200",
    batch: Batch | None = None,
) -> ImagePlan:
    """Plan a picture.

    Args:
        size: width and height, pixels.
        policy: of `STACKS`, perhaps with other sizes ("internvl:max_tiles=6"): how pictures are taken, and by what.
        compress: as `fastmllm.patch` takes it, such as "visionzip:64".
        llm: of `LANGUAGES`, or a folder with a config.json.
        device: of `KINDS`.
        batch: what is asked at once.

    Raises:
        ValueError: an unknown name, with those that are known; a picture that the policy refuses; a compressor that has
            no place there.
    """
    check_machine(device)
    batch = batch or Batch()
    stack = find_stack(policy)
    placement = find_placement(compress, stack, policy)
    plan = stack.policy.plan(*size)
    counts = count_tokens(plan, stack, placement)
    model = stack.build(llm)
    deepest = max((layer for layer, _ in placement.stages), default=0)
    if deepest >= model.language.config.depth:
        raise ValueError(
            f"plan: {compress} drops tokens in front of layer {deepest}, but {llm} has "
            f"{model.language.config.depth} layers: a method or model whose layers fit"
        )
    machine = find_machine(device, DTYPE)
    rates = Rates(flops=machine.flops[DTYPE], bytes=machine.bandwidth)
    costs = measure(model, plan, counts, placement, batch, rates, behind=stack.behind)
    return ImagePlan(
        policy=policy, compress=compress, llm=str(llm), about=stack.about, plan=plan, waste=waste_of(plan),
        tokens=counts, batch=batch, costs=costs, device=machine, context=model.language.config.max_positions,
    )  # fmt: skip
