"""A training stage: what learns, how fast, for how long; and the proof that exactly that learned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastmllm.data.phases import Phase, ends_of
from fastmllm.data.shards import SourceConfig
from fastmllm.train.engine import EngineConfig
from fastmllm.train.grpo import GRPOConfig
from fastmllm.train.lora import LoRAConfig
from fastmllm.train.pairs import PAIR_KINDS, ContrastiveConfig, MatchingConfig
from fastmllm.train.prefer import PreferConfig
from fastmllm.train.rules import Rule, named_by, roles_of

KINDS = ("instruct", "prefer", "grpo", *PAIR_KINDS)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Describe one stage.

    Args:
        name: for folders, logs and messages.
        steps: optimizer steps.
        trainable: learning rate, or `Rule`, by role of the model ("vision", "connector", "cross_attention", "llm",
            "embeddings") or by parameter pattern (fnmatch over parameter names); everything else is frozen. A later
            rule overrides an earlier one; a rate of 0 freezes.
        batch_size: samples in a micro-batch; the samples of a step are this times accumulation times ranks.
        weight_decay: for parameters of two or more dimensions, where a rule has none of its own; norms, biases and
            gates have none.
        betas, eps: of AdamW.
        warmup: steps over which the learning rate rises from 0.
        schedule: "cosine" (down to `final` of the rate) or "constant".
        final: fraction of the learning rate that a cosine ends at.
        clip: largest global gradient norm; 0 does not clip.
        seed: of dropout and whatever else the model draws; a rank adds its number.
        may_be_zero: roles or patterns of parameters that may get an all-zero gradient at step 1 (behind a zero-init
            gate).
        mixture: task -> weight of the questions drawn; empty = by their number.
        phases: parts of the stage with mixtures, image sizes and visual tokens of their own, in place of `mixture`.
        visual_tokens: token counts an image may take, one drawn a micro-batch; empty = the model's own.
        sources: shards to learn from instead of a mixture of the data's questions.
        max_tokens: positions of a micro-batch, filled with as many samples as fit; 0 = `batch_size` samples.
        max_images: images of a micro-batch that is filled so; 0 = any number.
        balance_steps: steps whose samples are arranged so that ranks get equal vision work; 0 = as drawn.
        kind: what is learned from: "instruct", answers; "prefer", pairs of a right and a wrong one; "grpo", the model's
            own answers and whether they are right; "contrastive" and "qformer", pairs of an image and a caption.
        prefer, grpo, contrastive, qformer: of a stage of that kind.
        image_size: side of the square that images are resized to, pixels; None = the model's own.
        lora: roles that learn through adapters, merged at the stage's end; None = weights learn.
        zero_stage, offload: of the engine in this stage; None = the recipe's.
    """

    name: str
    steps: int
    trainable: Mapping[str, float | Rule]
    batch_size: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    warmup: int = 0
    schedule: str = "cosine"
    final: float = 0.0
    clip: float = 1.0
    seed: int = 0
    may_be_zero: tuple[str, ...] = field(default=())
    mixture: Mapping[str, float] = field(default_factory=dict)
    visual_tokens: tuple[int, ...] = field(default=())
    sources: tuple[SourceConfig, ...] = field(default=())
    phases: tuple[Phase, ...] = field(default=())
    max_tokens: int = 0
    max_images: int = 0
    balance_steps: int = 0
    kind: str = "instruct"
    prefer: PreferConfig = field(default_factory=PreferConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    qformer: MatchingConfig = field(default_factory=MatchingConfig)
    image_size: int | None = None
    lora: LoRAConfig | None = None
    zero_stage: int | None = None
    offload: str | None = None

    def __post_init__(self) -> None:
        where = f"stage {self.name!r}"
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(f"{where}: steps ({self.steps}) and batch_size ({self.batch_size}) must be at least 1")
        if not self.trainable:
            raise ValueError(f"{where}: trainable is empty, so nothing learns; add a rule such as connector.*: 1e-3")
        rates = {key: rule.lr if isinstance(rule, Rule) else rule for key, rule in self.trainable.items()}
        if bad := [f"{key}: {rate}" for key, rate in rates.items() if not 0 <= rate < math.inf]:
            raise ValueError(f"{where}: learning rates must be finite and not negative: {', '.join(bad)}")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"{where}: image_size ({self.image_size}) must be at least 1")
        if lacks := [role for role in (() if self.lora is None else self.lora.roles) if role not in self.trainable]:
            raise ValueError(f"{where}: lora is for {lacks[0]}, which has no rule; add it to trainable with a rate")
        self.engine(EngineConfig())  # refuses what no engine has
        if self.balance_steps < 0 or (self.balance_steps and not self.sources):
            raise ValueError(f"{where}: balance_steps ({self.balance_steps}) is for sources and must not be negative")
        if min(self.max_tokens, self.max_images) < 0 or (self.max_images and not self.max_tokens):
            raise ValueError(
                f"{where}: max_tokens ({self.max_tokens}) and max_images ({self.max_images}) must not be negative, and "
                "max_images goes with max_tokens"
            )
        if self.max_tokens and (self.batch_size != 1 or self.balance_steps or self.kind != "instruct"):
            raise ValueError(
                f"{where}: max_tokens fills micro-batches of kind instruct to a budget: leave batch_size and "
                "balance_steps out, or max_tokens"
            )
        if self.mixture and self.sources:
            raise ValueError(f"{where}: sources, which have weights, take the place of a mixture; leave one out")
        if self.sources and self.kind not in ("instruct", *PAIR_KINDS):
            raise ValueError(f"{where}: sources hold answers and captions to learn from, not for kind {self.kind}")
        if self.phases:
            if self.mixture or self.sources or self.max_tokens or self.kind != "instruct":
                raise ValueError(
                    f"{where}: phases have mixtures, for kind instruct; leave the stage's mixture, sources and "
                    "max_tokens out"
                )
            ends_of(self.phases, self.steps)
        if self.kind not in KINDS:
            raise ValueError(f"{where}: kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.kind in PAIR_KINDS and (self.visual_tokens or self.balance_steps):
            raise ValueError(
                f"{where}: a pair has one image with all of its encoder's tokens; leave visual_tokens and "
                "balance_steps out"
            )
        if self.kind != "instruct" and len(self.visual_tokens) > 1:
            raise ValueError(
                f"{where}: visual_tokens {self.visual_tokens}: a reference belongs to one number of visual tokens, so "
                f"a stage of kind {self.kind} takes one"
            )
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"{where}: schedule is {self.schedule!r}; choose cosine or constant")
        if not 0 <= self.warmup <= self.steps:
            raise ValueError(f"{where}: warmup ({self.warmup}) must lie between 0 and steps ({self.steps})")
        if self.clip < 0 or self.weight_decay < 0 or not 0 <= self.final <= 1:
            raise ValueError(f"{where}: clip and weight_decay must not be negative, final must lie in 0..1")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"{where}: betas {self.betas} must be two numbers in 0..1")

    def engine(self, config: EngineConfig) -> EngineConfig:
        """Return the engine's configuration in this stage.

        Raises:
            ValueError: they do not go together.
        """
        own = {"zero_stage": self.zero_stage, "offload": self.offload}
        try:
            return replace(config, **{key: value for key, value in own.items() if value is not None})  # type: ignore[arg-type]
        except ValueError as error:
            raise ValueError(f"stage {self.name!r}: {error}") from error

    def identity(self) -> dict[str, Any]:
        """Return what decides on what is learned: all but how it is spread and what is recomputed."""
        values = asdict(self)
        for rule in values["trainable"].values():
            if isinstance(rule, dict):
                del rule["checkpointing"]
        return {key: value for key, value in values.items() if key not in ("zero_stage", "offload")}

    def factor(self, step: int) -> float:
        """Return what multiplies every learning rate at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


def set_modes(model: nn.Module) -> None:
    """Put what learns in train mode and what is wholly frozen in eval mode (its dropout and batch statistics stop)."""
    params = list(model.parameters())
    if params and not any(param.requires_grad for param in params):
        model.eval()
        return
    model.training = True
    for child in model.children():
        set_modes(child)


class GradientCheck:
    """Watch the first step: every parameter that was declared trainable must receive a gradient that is not zero.

    Make it before the engine, so that its hooks run while the gradient is still there (ZeRO moves it away).
    """

    def __init__(self, model: nn.Module, groups: Sequence[Mapping[str, Any]], may_be_zero: Sequence[str] = ()) -> None:
        self._model = model
        self._names = [name for group in groups for name in group["names"]]
        roles = roles_of(model)
        self._may_be_zero: set[str] = set()
        for key in may_be_zero:
            try:
                fits = set(named_by(key, self._names, roles)).intersection(self._names)
            except ValueError as error:
                raise ValueError(f"may_be_zero: {error}") from error
            if not fits:
                raise ValueError(f"may_be_zero: {key!r} names no trainable parameter")
            self._may_be_zero |= fits
        self._largest: dict[str, Tensor] = {}
        params = [param for group in groups for param in group["params"]]
        self._hooks = [
            param.register_post_accumulate_grad_hook(self._hook(name))
            for name, param in zip(self._names, params, strict=True)
        ]

    def _hook(self, name: str) -> Any:
        def hook(param: Tensor) -> None:
            grad = param.grad
            if grad is None or grad.numel() == 0:
                return
            largest = grad.detach().abs().amax().float()
            self._largest[name] = torch.maximum(self._largest[name], largest) if name in self._largest else largest

        return hook

    def close(self) -> dict[str, str]:
        """Remove the hooks.

        Returns:
            on this rank, parameter name -> "reached" | "zero" | "none".
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        largest = torch.stack(list(self._largest.values())).tolist() if self._largest else []
        states = {
            name: "zero" if value == 0.0 else "reached" for name, value in zip(self._largest, largest, strict=True)
        }
        return {name: states.get(name, "none") for name in self._names}

    def verify(self, states: Sequence[Mapping[str, str]]) -> None:
        """Judge what the ranks saw.

        Args:
            states: what `close` returned, of each rank.

        Raises:
            RuntimeError: names the declared parameters that got no gradient, and frozen ones that did.
        """
        seen = {name: {state[name] for state in states} for name in self._names}
        unreached = [name for name in self._names if seen[name] == {"none"}]
        zero = [
            name
            for name in self._names
            if "reached" not in seen[name] and name not in unreached and name not in self._may_be_zero
        ]
        stray = [
            name for name, param in self._model.named_parameters() if not param.requires_grad and param.grad is not None
        ]
        problems = []
        if unreached:
            problems.append(f"not part of the loss: {_some(unreached)}")
        if zero:
            problems.append(f"all-zero gradient: {_some(zero)} (behind a zero-init gate? list it in may_be_zero)")
        if stray:
            problems.append(f"frozen, yet it has a gradient: {_some(stray)}")
        if problems:
            raise RuntimeError(f"after step 1, what learned is not what was declared: {'; '.join(problems)}")


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
