"""A multimodal language model of any published composition: image path, language model, and how they meet."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastmllm.kernels.splice_tokens import splice_tokens
from fastmllm.models.continuation import Continuation
from fastmllm.models.image_path import ImagePath, Visual
from fastmllm.models.inputs import Inputs, make_inputs, unpad
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel
from fastmllm.models.media import Deepstack, Media
from fastmllm.models.packing import Packing, Sample, pack
from fastmllm.models.weights.folder import read_config, read_state, write_folder
from fastmllm.models.weights.mapping import Rule, fill, to_ours, to_theirs

if TYPE_CHECKING:
    from fastmllm.models.composition import MLLMConfig

SIDECARS = ("*.json", "*.jinja", "*.txt", "*.model")  # tokenizer, processor, chat template; never code
NOT_SIDECARS = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How a checkpoint of the family is written.

    Args:
        rules: names and forms, under the names of the files that transformers writes today.
        aliases: (older prefix, today's prefix): files with either are read, and written as they were read.
        unused: patterns of tensors that this model does not compute with; kept, and written back.
        spare: beginnings of our names that `rules` give to tensors of parts that are not built (encoder blocks behind
            the layer that is used); kept, and written back.
        tied: the head is the embedding table and has no tensor of its own.
    """

    rules: Sequence[Rule]
    aliases: Sequence[tuple[str, str]] = ()
    unused: Sequence[str] = ()
    spare: Sequence[str] = ()
    tied: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Blueprint:
    """What a family's `build` makes of a config.json.

    Args:
        images: the image path.
        language: the decoder.
        layout: of its checkpoints.
        placeholders: tokens that visual tokens replace; none where layers look across instead.
        packing: how it takes pictures, where that is known: a processor's batch needs none.
    """

    images: ImagePath
    language: LanguageModel
    layout: Layout
    placeholders: tuple[int, ...] = ()
    packing: Packing | None = None


@dataclass(slots=True)
class _Checkpoint:
    """What must survive from reading to writing."""

    raw: dict[str, Any]
    layout: Layout
    rest: dict[str, Tensor] = field(default_factory=dict)  # under the checkpoint's names
    spare: dict[str, Tensor] = field(default_factory=dict)  # under ours
    used_aliases: list[tuple[str, str]] = field(default_factory=list)
    folder: Path | None = None


class MLLM(nn.Module):
    """A whole model: images and text in, hidden states, logits or a loss out; packed, without padding.

    Args:
        blueprint: the parts.
        raw: the config.json that they were made from.

    Build one with `from_pretrained`, or `from_config` for a fresh composition.

    Attributes:
        packing: what `pack` does with pictures; None for a checkpoint of others, until one is set.
    """

    def __init__(self, blueprint: Blueprint, raw: Mapping[str, Any]) -> None:
        super().__init__()
        self.images: ImagePath = blueprint.images
        self.language: LanguageModel = blueprint.language
        self.placeholders, self.packing = blueprint.placeholders, blueprint.packing
        self.checkpoint = _Checkpoint(dict(raw), blueprint.layout)

    @classmethod
    def from_config(cls, config: MLLMConfig, seed: int = 0) -> MLLM:
        """Compose a fresh model: see `fastmllm.models.compose.compose`."""
        from fastmllm.models.compose import compose

        return compose(config, seed)

    # Checkpoints ------------------------------------------------------------------------------------------------------
    @classmethod
    def from_pretrained(
        cls, folder: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> MLLM:
        """Load a checkpoint folder of transformers.

        Args:
            folder: config.json and safetensors of one of the families in `fastmllm.models.families`.
            dtype: of the parameters; None keeps the file's.
            device: where they go.

        Returns:
            The model in evaluation mode.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown architecture or variant, or tensors that do not fit; the message names them.
        """
        folder = Path(folder)
        raw = read_config(folder)
        with torch.device("meta"):
            model = cls(_build(raw, str(folder)), raw)
        checkpoint, layout = model.checkpoint, model.checkpoint.layout
        checkpoint.folder = folder
        state = {_today(name, layout, checkpoint.used_aliases): t for name, t in read_state(folder).items()}
        ours, checkpoint.rest = to_ours(state, layout.rules, str(folder), layout.unused)
        own = model.state_dict()
        checkpoint.spare = {n: t for n, t in ours.items() if n not in own and n.startswith(tuple(layout.spare))}
        ours = {name: t for name, t in ours.items() if name not in checkpoint.spare}
        if layout.tied:
            ours["language.lm_head.weight"] = ours["language.model.embed_tokens.weight"]
        if dtype is not None:
            ours = {name: t.to(dtype) if t.is_floating_point() else t for name, t in ours.items()}
        fill(model, ours, str(folder))
        model.language.tie()
        return model.to(device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers loads: weights, config.json, and the processor's files if there were any.

        Args:
            folder: made if absent.
        """
        folder = Path(folder)
        theirs = self.checkpoint_state()
        raw = self.checkpoint.raw | {"dtype": str(self.language.head_weight.dtype).removeprefix("torch.")}
        source = self.checkpoint.folder
        if source is not None and source.resolve() != folder.resolve():
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted({f for pattern in SIDECARS for f in source.glob(pattern)}):
                if file.name not in NOT_SIDECARS:
                    shutil.copyfile(file, folder / file.name)
        write_folder(folder, raw, theirs)

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return all weights under the checkpoint's names, with what is kept apart."""
        state = self.state_dict()
        if self.checkpoint.layout.tied:
            del state["language.lm_head.weight"]
        theirs = to_theirs(state | self.checkpoint.spare, self.checkpoint.layout.rules, self.checkpoint.rest)
        return {_then(name, self.checkpoint.used_aliases): t for name, t in theirs.items()}

    # Batches ----------------------------------------------------------------------------------------------------------
    def inputs(self, batch: Mapping[str, Any]) -> Inputs:
        """Pack what the family's processor in transformers made, with its placeholders repeated.

        Args:
            batch: input_ids (B, L), attention_mask and labels (B, L) or absent, and the family's image tensors.

        Returns:
            The packed batch, on the CPU; `to(device)` moves it.

        Raises:
            ValueError: something is missing or does not fit.
        """
        mask = batch.get("attention_mask")
        samples, labels = unpad(batch["input_ids"], mask, batch.get("labels"))
        seen = self.images.read(batch)
        if seen is None:
            return make_inputs(samples, labels=labels, placeholders=self.placeholders)
        if seen.media is None:
            return make_inputs(
                samples, placeholders=self.placeholders, counts=seen.counts, grids=seen.grids, labels=labels,
                images=seen.arguments, spatial_merge_size=self.images.merge_size,
                time_intervals=seen.time_intervals, expanded=True,
            )  # fmt: skip
        packed = make_inputs(samples, labels=labels, images=seen.arguments)
        keep = torch.ones_like(batch["input_ids"]).bool() if mask is None else mask.bool()
        return packed.with_media(seen.media[0][keep], seen.media[1][keep], seen.media[2])

    def pack(
        self, samples: Sequence[Sample], labels: Sequence[Sequence[int]] | None = None, sees: str = "latest"
    ) -> Inputs:
        """Pack token ids and pictures, by the model's own resolution policy.

        Args:
            samples: each a sequence of token ids and, where pictures stand, PIL images or (H, W, 3) uint8. The text
                that a policy puts around pictures (`Plan.text`) is the caller's, as token ids.
            labels: aligned with the samples; -100 where a token is not scored. They are shifted here.
            sees: what a row looks at across, where layers do: a policy of `media_ranges`. "latest" is the picture last
                introduced, with all of its tiles; its placeholder sees it too. In CogAgent it is always the sample.

        Returns:
            The packed batch, on the CPU.

        Raises:
            ValueError: no policy is known, labels do not fit, or a picture that the policy refuses.
        """
        if self.packing is None:
            raise ValueError(
                "fastmllm::MLLM.pack: this checkpoint names no resolution policy: set `packing`, or use inputs()"
            )
        inner = bool(self.language.inner_layers)
        return pack(
            samples, labels, self.images, self.packing, spliced=inner or not self.looks_across,
            across="sample" if inner else sees if self.looks_across else None,
            mrope=self.language.config.mrope_section is not None,
        )  # fmt: skip

    # Computation ------------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return self.language.head_weight.device

    @property
    def looks_across(self) -> bool:
        """Whether layers look at images beside the text, instead of tokens in it."""
        return bool(self.language.cross_layers or self.language.inner_layers)

    def start(self, inputs: Inputs, cache: KVCache | None = None) -> tuple[Tensor, Continuation]:
        """Run a whole batch.

        Args:
            inputs: on any device.
            cache: empty, of as many sequences as the batch has samples; filled.

        Returns:
            Hidden states (T', D) of all rows after the final norm, and what later tokens need besides the cache.
        """
        ends = inputs.plan.cu_seqlens[1:].long() - 1
        inputs = inputs.to(self.device)
        plan = inputs.plan
        x = self.language.embed(inputs.input_ids)
        visual = None if inputs.images is None else self.images(**inputs.images)
        deepstack = media = None
        if self.looks_across:
            media = self._media(visual, inputs)
        if visual is not None and (media is None or visual.across is not None):
            x = splice_tokens(x, visual.tokens.to(x.dtype), plan)
            if visual.planes:
                deepstack = Deepstack(tokens=visual.planes, index=plan.visual_rows)
        hidden = self.language(
            x, plan.position_ids, plan.cu_seqlens, plan.max_seqlen, cache, media=media, deepstack=deepstack
        )
        if media is not None:
            media = media.at(ends.to(self.device))
        return hidden, Continuation(language=self.language, media=media)

    def _media(self, visual: Visual | None, inputs: Inputs) -> Media:
        """Say what each row sees; without images every row sees nothing, as a row without one does beside others."""
        if visual is not None and inputs.media_start is not None and inputs.media_stop is not None:
            start, stop = inputs.media_start, inputs.media_stop
            tokens = visual.tokens if visual.across is None else visual.across
            return Media(tokens=tokens, start=start, stop=stop, max_tokens=inputs.max_media)
        nothing = torch.zeros(inputs.plan.source.shape, dtype=torch.int32, device=self.device)
        tokens = self.language.head_weight.new_zeros(0, self.images.across_width or self.images.width)
        return Media(tokens=tokens, start=nothing, stop=nothing, max_tokens=0)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return (T', V) logits of all rows, sample after sample, without padding."""
        return self.language.logits(self.start(inputs)[0])

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the loss of a packed batch: the fp32 sum of cross-entropy over its target tokens.

        Raises:
            ValueError: the batch has no labels.
        """
        if inputs.plan.labels is None:
            raise ValueError("MLLM: a loss needs labels; pack the batch with them, or call logits()")
        hidden, _ = self.start(inputs)
        return self.language.lm_head(hidden, inputs.plan.labels.to(self.device), inputs.plan.num_targets)


def _build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    from fastmllm.models.families import build

    return build(raw, origin)


def _today(name: str, layout: Layout, used: list[tuple[str, str]]) -> str:
    """Give a tensor its name of today; remember which older prefix it had."""
    for alias in layout.aliases:
        if name.startswith(alias[0]):
            if alias not in used:
                used.append(alias)
            return alias[1] + name.removeprefix(alias[0])
    return name


def _then(name: str, used: Sequence[tuple[str, str]]) -> str:
    """Give a tensor the name that it was read under."""
    for old, today in used:
        if name.startswith(today):
            return old + name.removeprefix(today)
    return name
