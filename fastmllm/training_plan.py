"""A recipe on paper: what each training stage would hold, send and take on any number of accelerators."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastmllm.models.mllm import MLLM
from fastmllm.models.recompute import layers_of
from fastmllm.models.shapes import mllm_shape, talk_shape, vlm_shape
from fastmllm.models.vlm import VLM, ModelConfig, native_bfloat16
from fastmllm.plan.machine import check_machine, find_machine
from fastmllm.recipe import Recipe
from fastmllm.simulated_step import Load, Step, simulate
from fastmllm.train.devices import DEVICES, Device
from fastmllm.train.engine import EngineConfig
from fastmllm.train.lora import Adapters
from fastmllm.train.pairs import PAIR_KINDS
from fastmllm.train.plan import Layout, ParamSize, StateBytes, param_sizes, state_bytes
from fastmllm.train.rules import apply_rules, recomputed_by, roles_of
from fastmllm.train.stages import StageConfig, set_modes
from fastmllm.train.traffic import Collective, collectives

UPDATE = 28  # bytes that AdamW moves for an element: master and two averages read and written, gradient read
GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumptions:
    """What a plan takes for granted; each can be given.

    Args:
        utilisation: of the device's peak by the products of a step.
        link_share: of the nominal rate that collectives reach.
        memory_share: of the device's memory that tensors can have; context, NCCL and fragmentation have the rest.
        text_tokens: of a sample, all scored.
        images: of a sample.
        image_size: side in pixels, of published models; a recipe's own model says its size.
        recompute: every layer keeps its input only, not just those of the roles that the recipe says.
    """

    utilisation: float = 0.4
    link_share: float = 0.8
    memory_share: float = 0.92
    text_tokens: int = 256
    images: int = 1
    image_size: int = 672
    recompute: bool = False

    def __post_init__(self) -> None:
        for name in ("utilisation", "link_share", "memory_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"plan: {name} is {getattr(self, name)}; give a share between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class StagePlan:
    """What one stage costs a rank; bytes, seconds.

    Args:
        name: of the stage.
        zero_stage, offload: of the engine in it.
        parameters, trainable: elements.
        state: what ZeRO leaves on the rank that holds most.
        total: the most that is there at once, activations included.
        step: a micro-batch.
        activations: of a micro-batch when nothing and when every layer is recomputed.
        collectives: of a step.
        near, far: bytes that a rank sends in a step to its node and to others.
        compute_s, communication_s, update_s: of a step.
        samples_per_s: of all ranks, when communication hides behind computation, and when nothing does.
        smallest: ZeRO stage whose total fits, or None.
    """

    name: str
    zero_stage: int
    offload: str
    parameters: int
    trainable: int
    state: StateBytes
    total: int
    step: Step
    activations: tuple[int, int]
    collectives: list[Collective]
    near: int
    far: int
    compute_s: float
    communication_s: float
    update_s: float
    samples_per_s: tuple[float, float]
    smallest: int | None

    @property
    def seconds(self) -> tuple[float, float]:
        """Of a step, when communication hides behind computation, and when nothing does."""
        hidden = max(self.compute_s, self.communication_s) + self.update_s
        return hidden, self.compute_s + self.communication_s + self.update_s


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingPlan:
    """The stages of a recipe, and what they were planned for."""

    model: str
    device: Device
    layout: Layout
    assumed: Assumptions
    stages: list[StagePlan]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def plan_training(
    recipe: Recipe,
    ranks: int,
    *,
    device: str = "h100",
    ranks_per_node: int = 8,
    model: str | None = None,
    assumed: Assumptions | None = None,
) -> TrainingPlan:
    """Plan every stage of a recipe.

    Args:
        recipe: its rules, batch sizes and engine count; its data is not looked at.
        ranks: accelerators.
        device: one of `KINDS`.
        ranks_per_node: accelerators of a machine.
        model: a published checkpoint's name or a folder with config.json, instead of the recipe's model.
        assumed: what the recipe does not say.

    Raises:
        ValueError: an unknown device or model, a rule that matches nothing in it, ranks that fill no whole nodes.
    """
    check_machine(device)
    if paired := [stage.name for stage in recipe.stages if stage.kind in PAIR_KINDS]:
        raise ValueError(f"plan: stages that learn from pairs ({', '.join(paired)}) are not planned; leave them out")
    assumed = assumed or Assumptions()
    dtype = recipe.engine.dtype if recipe.engine.dtype != "auto" else recipe.model.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device != "cpu" or native_bfloat16() else "float32"
    layout = Layout(engine=replace(recipe.engine, dtype=dtype), ranks=ranks, ranks_per_node=ranks_per_node)
    machine = find_machine(device, dtype)
    own = recipe.model
    shape: VLM | MLLM
    if model is not None:
        shape, name = mllm_shape(model), model
    elif isinstance(own, ModelConfig):
        shape, name = vlm_shape(own), f"{own.vision} + {own.language}"
    else:
        shape, name = talk_shape(own), own.folder or f"the composition of {recipe.name}"
    shape.to(getattr(torch, dtype))
    stages = [_plan_stage(shape, stage, layout, machine, assumed) for stage in recipe.stages]
    return TrainingPlan(model=name, device=machine, layout=layout, assumed=assumed, stages=stages)


def _plan_stage(
    model: VLM | MLLM, stage: StageConfig, layout: Layout, device: Device, assumed: Assumptions
) -> StagePlan:
    adapters = None if stage.lora is None else Adapters(model, stage.lora, stage.seed)
    try:
        return _plan_model(model, stage, layout, device, assumed, () if adapters is None else adapters.frozen())
    finally:
        if adapters is not None:
            adapters.remove()


def _plan_model(
    model: VLM | MLLM, stage: StageConfig, layout: Layout, device: Device, assumed: Assumptions, frozen: Collection[str]
) -> StagePlan:
    engine = stage.engine(layout.engine)
    layout = replace(layout, engine=engine)
    groups = apply_rules(
        model, stage.trainable, weight_decay=stage.weight_decay, betas=stage.betas, eps=stage.eps, frozen=frozen
    )
    set_modes(model)
    load = _load(model, stage, assumed)
    layers = [layer for names in roles_of(model).values() for layer in layers_of(model, names)]
    chosen = [module for modules in recomputed_by(model, stage.trainable).values() for module in modules]
    plain, saving = simulate(model, load), simulate(model, load, layers)
    step = saving if assumed.recompute else simulate(model, load, chosen) if chosen else plain
    params = param_sizes(model, groups, engine.dtype)
    state = state_bytes(params, layout)
    sent = collectives(params, layout, step.backward_elements)
    near, far = (sum(part) for part in zip(*(c.traffic(layout) for c in sent), strict=True)) if sent else (0, 0)
    learning = sum(param.numel for param in params if param.group is not None)
    compute = step.flops * engine.accumulation / (device.flops[engine.dtype] * assumed.utilisation)
    speed = assumed.link_share
    share = learning if engine.zero_stage == 0 else -(-learning // layout.ranks)
    update = UPDATE * share / device.bandwidth
    if engine.offload == "cpu":  # gradients go to the host, new weights come back
        update += 2 * share * 2 / (device.host * speed)
    plan = StagePlan(
        name=stage.name, zero_stage=engine.zero_stage, offload=engine.offload,
        parameters=sum(param.numel for param in params), trainable=learning, state=state,
        total=state.total(step.activations), step=step, activations=(plain.activations, saving.activations),
        collectives=sent, near=near, far=far, compute_s=compute,
        communication_s=near / (device.link * speed) + far / (device.network * speed), update_s=update,
        samples_per_s=(0.0, 0.0), smallest=_smallest(params, layout, step.activations, room(device, layout, assumed)),
    )  # fmt: skip
    samples = samples_of(stage, assumed, _visual_tokens(model, stage, assumed)) * engine.accumulation * layout.ranks
    fast, slow = plan.seconds
    return replace(plan, samples_per_s=(samples / fast, samples / slow))


def _load(model: VLM | MLLM, stage: StageConfig, assumed: Assumptions) -> Load:
    """Say what a micro-batch of a stage holds: pairs for "prefer", groups of answers for "grpo"."""
    answers = {"prefer": 2, "grpo": stage.grpo.group}.get(stage.kind, 1)
    visual = _visual_tokens(model, stage, assumed)
    size = stage.image_size or model.config.image_size if isinstance(model, VLM) else assumed.image_size
    return Load(
        samples=samples_of(stage, assumed, visual) * answers, text_tokens=assumed.text_tokens, images=assumed.images,
        image_size=size, visual_tokens=visual,
    )  # fmt: skip


def _visual_tokens(model: VLM | MLLM, stage: StageConfig, assumed: Assumptions) -> int:
    if isinstance(model, MLLM):
        return model.rows_of_picture(assumed.image_size, assumed.image_size)
    return max(stage.visual_tokens or (model.config.visual_tokens,))


def samples_of(stage: StageConfig, assumed: Assumptions, visual_tokens: int) -> int:
    """Return the samples of a micro-batch: a stage's number, or how many of the assumed size fit its budget."""
    if not stage.max_tokens:
        return stage.batch_size
    fit = [stage.max_tokens // (assumed.text_tokens + assumed.images * visual_tokens)]
    if stage.max_images and assumed.images:
        fit.append(stage.max_images // assumed.images)
    return max(1, min(fit))


def room(device: Device, layout: Layout, assumed: Assumptions) -> float:
    """Return the bytes that a rank may fill; the ranks of a CPU machine share its memory."""
    ranks = min(layout.ranks, layout.ranks_per_node) if device.name not in {d.name for d in DEVICES.values()} else 1
    return device.memory * assumed.memory_share / ranks


def _smallest(params: Sequence[ParamSize], layout: Layout, activations: int, room: float) -> int | None:
    for stage in range(1 if layout.engine.dtype == "bfloat16" else 0, 4):
        offload = layout.engine.offload if stage >= 2 else "none"
        engine: EngineConfig = replace(layout.engine, zero_stage=stage, offload=offload)
        if state_bytes(params, replace(layout, engine=engine)).total(activations) <= room:
            return stage
    return None
