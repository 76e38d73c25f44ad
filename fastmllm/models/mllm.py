"""A multimodal language model of any published composition: image path, language model, and how they meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmllm.compression import Placement
from fastmllm.compression.reduction import Reduction, VisualRows
from fastmllm.kernels.splice_tokens import splice_tokens
from fastmllm.models.checkpoint import Checkpoint, Layout, tie
from fastmllm.models.continuation import Continuation
from fastmllm.models.families import build, untied
from fastmllm.models.image_path import ImagePath, Visual
from fastmllm.models.inputs import Inputs, make_inputs, unpad
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel
from fastmllm.models.media import Deepstack, Media
from fastmllm.models.packing import Packing, Sample, pack, rows_in_text
from fastmllm.models.roles import LANGUAGE, named_roles
from fastmllm.models.scoring import Scored
from fastmllm.models.tower import is_sharded
from fastmllm.models.weights.folder import read_config, read_state, write_folder

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastmllm.models.composition import MLLMConfig
    from fastmllm.models.feature_store import FeatureStore
    from fastmllm.models.talk import TalkConfig


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


class MLLM(Scored):
    """A whole model: images and text in, hidden states, logits or a loss out; packed, without padding.

    Args:
        blueprint: the parts.
        raw: the config.json that they were made from.

    Build one with `from_pretrained`, or `from_config` for a fresh composition.

    Attributes:
        packing: what `pack` does with pictures; None for a checkpoint of others, until one is set.
        config, tokenizer: what a recipe says, for what is asked in words; None without one (`models.talk.load_mllm`).
    """

    def __init__(self, blueprint: Blueprint, raw: Mapping[str, Any]) -> None:
        super().__init__()
        self.images: ImagePath = blueprint.images
        self.language: LanguageModel = blueprint.language
        self.placeholders, self.packing = blueprint.placeholders, blueprint.packing
        self.checkpoint = Checkpoint(dict(raw), blueprint.layout)
        self._placement = Placement()
        self.config: TalkConfig | None = None
        self.tokenizer: Tokenizer | None = None
        self.feature_cache: None = None  # features are in a store, not in memory
        self.feature_store: FeatureStore | None = None  # of a stage in which the tower is frozen

    @property
    def placement(self) -> Placement:
        """What reduces visual tokens inside of the language model.

        Images that layers look across to are not in the text and stay as they are.
        """
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        if placement.merge is not None or placement.connector is not None:
            raise ValueError(
                "MLLM: a published connector gets all tokens of its encoder; compress behind it: language:0"
            )
        if any(True for compressor in placement.compressors for _ in compressor.parameters()):
            raise ValueError("MLLM: a compressor with weights has no place in a published checkpoint")
        self._placement = placement

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return role ("vision", "connector", "cross_attention", "llm", "embeddings") -> names of its parameters."""
        images = {"images.": "connector", "images.vision.": "vision", "images.high.": "vision"}
        inside = {"images.vision.merger.": "connector", "images.vision.deepstack.": "connector"}  # Qwen's
        return named_roles(self, images | inside | LANGUAGE)

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
            The model in evaluation mode. Where config.json ties the head to the embedding table, but the file has two
            that differ, they stay two, as in transformers, and are saved as two.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: an unknown architecture or variant, or tensors that do not fit; the message names them.
        """
        folder = Path(folder)
        origin, raw = str(folder), read_config(folder)
        with torch.device("meta"):
            blueprint = build(raw, origin)
        checkpoint = Checkpoint(raw, blueprint.layout, folder=folder)
        ours = checkpoint.translate(read_state(folder), origin)
        if checkpoint.layout.tied and not tie(ours):
            checkpoint.raw = untied(raw)
            with torch.device("meta"):
                blueprint = build(checkpoint.raw, origin)
            checkpoint.layout = blueprint.layout
        model = cls(blueprint, checkpoint.raw)
        model.checkpoint = checkpoint
        checkpoint.fill(model, ours, origin, dtype)
        model.language.tie()
        return model.to(device).eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that transformers loads: weights, config.json, and the processor's files if there were any.

        Args:
            folder: made if absent.
        """
        folder = Path(folder)
        self.checkpoint.copy_sidecars(folder)
        write_folder(folder, self.checkpoint.config(self.language.head_weight.dtype), self.checkpoint_state())

    def checkpoint_state(self) -> dict[str, Tensor]:
        """Return all weights under the checkpoint's names, with what is kept apart."""
        return self.checkpoint.state(self)

    # Batches ----------------------------------------------------------------------------------------------------------
    def inputs(self, batch: Mapping[str, Any]) -> Inputs:
        """Pack what the family's processor in transformers made, with its placeholders repeated.

        Args:
            batch: input_ids (B, L), attention_mask and labels (B, L) or absent, and the family's image tensors; on any
                device, they are read on the CPU.

        Returns:
            The packed batch, on the CPU; `to(device)` moves it.

        Raises:
            ValueError: something is missing or does not fit.
        """
        batch = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
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
        self, samples: Sequence[Sample], labels: Sequence[Sequence[int]] | None = None, sees: str = "latest",
        paths: Sequence[str] = (),
    ) -> Inputs:  # fmt: skip
        """Pack token ids and pictures, by the model's own resolution policy.

        Args:
            samples: each a sequence of token ids and, where pictures stand, PIL images, (H, W, 3) uint8 or, of a
                feature store, `Known`. The text that a policy puts around pictures (`Plan.text`) is the caller's, as
                token ids.
            labels: aligned with the samples; -100 where a token is not scored. They are shifted here.
            sees: what a row looks at across, where layers do: a policy of `media_ranges`. "latest" is the picture last
                introduced, with all of its tiles; its placeholder sees it too. In CogAgent it is always the sample.
            paths: of the distinct pictures, in the order of their first places, for the model's feature store.

        Returns:
            The packed batch, on the CPU.

        Raises:
            ValueError: no policy is known, labels do not fit, or a picture that the policy refuses.
        """
        inner = bool(self.language.inner_layers)
        return pack(
            samples, labels, self.images, self.known_packing(), spliced=self._spliced,
            across="sample" if inner else sees if self.looks_across else None,
            mrope=self.language.config.mrope_section is not None, paths=paths,
        )  # fmt: skip

    def rows_of_picture(self, width: int, height: int) -> int:
        """Return the rows that a picture of this size, in pixels, takes in a batch of `pack`.

        Raises:
            ValueError: no policy is known, or it refuses the picture.
        """
        return rows_in_text(width, height, self.images, self.known_packing(), self._spliced)

    @property
    def _spliced(self) -> bool:
        """Whether visual tokens stand in the text; else one placeholder a picture does."""
        return bool(self.language.inner_layers) or not self.looks_across

    def known_packing(self) -> Packing:
        """Return `packing`.

        Raises:
            ValueError: there is none.
        """
        if self.packing is None:
            raise ValueError(
                "fastmllm::MLLM.pack: this checkpoint names no resolution policy: set `packing`, or use inputs()"
            )
        return self.packing

    # Computation ------------------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        # not of a parameter by its name: ZeRO-3 gathers what is named, on this rank alone where only this one asks
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of what the language model reads; asked as `device` is."""
        return next(self.language.parameters()).dtype

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
        hidden, media, reduction = self._decode(inputs, cache)
        if media is not None:
            ends = (inputs.plan.cu_seqlens if reduction is None else reduction.cu_seqlens)[1:].long() - 1
            media = media.at(ends.to(self.device))
        left = None if reduction is None else reduction.cu_seqlens
        return hidden, Continuation(language=self.language, media=media, cu_seqlens=left)

    def _decode(self, inputs: Inputs, cache: KVCache | None) -> tuple[Tensor, Media | None, Reduction | None]:
        """Run a batch; return hidden states, what its rows see across, and what became of its visual tokens."""
        reduction = self._reduction(inputs)
        # every rank runs the image path once a batch, image or not: sharded parameters are gathered in step
        blank = not inputs.shows_images and (self.training or is_sharded(self.images))
        inputs = (replace(inputs, images=self.images.blank()) if blank else inputs).to(self.device)
        plan = inputs.plan
        x = self.language.embed(inputs.input_ids)
        # not by its call: ZeRO-3 gathers in the backward pass for modules whose output is a tensor, not a Visual
        visual = None
        if inputs.shows_images:
            visual = self.images.forward(inputs.stored, self.feature_store, self.device, **(inputs.images or {}))
        if visual is not None and inputs.shown is not None:  # what several places show was encoded once
            visual = visual.at(*inputs.shown)
        deepstack = media = None
        if self.looks_across:
            media = self._media(visual, inputs)
        if blank and visual is not None:
            x = x + visual.nothing().to(x.dtype)
        elif visual is not None and (media is None or visual.across is not None):
            x = splice_tokens(x, visual.tokens.to(x.dtype), plan)
            if visual.planes:
                deepstack = Deepstack(tokens=visual.planes, index=plan.visual_rows)
        hidden = self.language(
            x, plan.position_ids, plan.cu_seqlens, plan.max_seqlen, cache, media=media, deepstack=deepstack,
            reduction=reduction,
        )  # fmt: skip
        if media is not None and reduction is not None:
            media = media.at(reduction.rows)
        return hidden, media, reduction

    def _reduction(self, inputs: Inputs) -> Reduction | None:
        """Return what `stages` do to this batch inside of the language model."""
        plan = inputs.plan
        if self.placement.merge is not None or self.placement.connector is not None:
            raise ValueError(
                "MLLM: a published connector gets all tokens of its encoder; compress behind it: language:0"
            )
        if not self.placement.stages or not inputs.shows_images or not inputs.counts:
            return None
        labels = None if plan.labels is None else plan.labels.to(self.device)
        visual = VisualRows.of_batch(
            plan.visual_rows, inputs.counts, plan.cu_seqlens, plan.labels, self.device, inputs.grids
        )
        return Reduction(self.placement.stages, visual, labels)

    def _media(self, visual: Visual | None, inputs: Inputs) -> Media:
        """Say what each row sees; without images every row sees nothing, as a row without one does beside others."""
        if visual is None:
            width = self.images.across_width or self.images.width
            tokens = torch.zeros(0, width, dtype=self.dtype, device=self.device)
        else:
            tokens = visual.tokens if visual.across is None else visual.across
        start, stop, longest = inputs.media_start, inputs.media_stop, inputs.max_media
        if start is None or stop is None:
            start = stop = torch.zeros(inputs.plan.source.shape, dtype=torch.int32, device=self.device)
        return Media(tokens=tokens, start=start, stop=stop, max_tokens=longest)

    def logits(self, inputs: Inputs) -> Tensor:
        """Return (T', V) logits of all rows, sample after sample, without padding."""
        return self.language.logits(self.start(inputs)[0])

    def scored(self, batch: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """Run a batch: hidden states (T', D), labels (T',) and boundaries (S + 1,) of the rows that are left of it.

        Raises:
            ValueError: the batch has no labels.
        """
        if batch.plan.labels is None:
            raise ValueError("MLLM: a loss needs labels; pack the batch with them, or call logits()")
        hidden, _, reduction = self._decode(batch, None)
        if reduction is None or reduction.labels is None:
            return hidden, batch.plan.labels.to(self.device), batch.cu_seqlens.to(self.device)
        return hidden, reduction.labels, reduction.cu_seqlens
