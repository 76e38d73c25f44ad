"""Compose a vision-language model: encoder, compressor, connector, language model (LLaVA, arXiv 2304.08485).

Image tokens are inserted into the text at the placeholders: token-level fusion. Batches are packed, without padding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor, nn

from fastmllm.compression import Evidence, Placement, Tokens, compress
from fastmllm.compression.reduction import Reduction, VisualRows
from fastmllm.data.text import ChatTemplate
from fastmllm.kernels.insert_features import insert_features
from fastmllm.models.continuation import Continuation
from fastmllm.models.encoder import Encoder
from fastmllm.models.kv_cache import KVCache
from fastmllm.models.language import LanguageModel
from fastmllm.models.placing import loading_device
from fastmllm.models.roles import LANGUAGE, named_roles
from fastmllm.models.scoring import Scored
from fastmllm.models.vision import VisionTransformer
from fastmllm.models.weights import load_language, load_tokenizer, load_vision
from fastmllm.modules.projector import Projector

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from fastmllm.models.feature_store import FeatureStore
    from fastmllm.models.features import FeatureCache


ENCODED_TOGETHER = 64  # images
IMAGE_TOKEN_ID = 0  # stands where visual tokens go; its own embedding is replaced


class Batch(Protocol):
    """What the model reads of a packed batch (`fastmllm.data.packing.Batch`)."""

    input_ids: Tensor  # (T,)
    labels: Tensor  # (T,), already shifted
    position_ids: Tensor  # (T,)
    cu_seqlens: Tensor  # (S + 1,)
    max_seqlen: int
    image_index: Tensor  # (P * K,)
    pixels: Tensor | None  # (I, H, W, C) uint8
    num_targets: int
    image_paths: list[str]
    shown: Tensor | None  # (P,) image of each place; None: P = I
    features: dict[int, Tensor] | None  # image -> (N, Dv), of those that `pixels` leaves out


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(ChatTemplate):
    """What a vision-language model is made of, and the text around image, prompt and answer.

    The template's defaults suit a frozen SmolLM2: it starts with a token that absorbs attention, stays short, and ends
    an answer as running text does.

    Args:
        vision: an encoder that `load_vision` knows, or a folder.
        language: a language model that `load_language` knows, or a folder.
        image_size: side of the square that images are resized to, pixels.
        visual_tokens: K, tokens an image keeps; the default of training and generation.
        compress: how the encoder's grid becomes K tokens.
        connector_width: hidden width of the two-layer connector; None takes the language model's.
        train_vision: the encoder learns from the first stage on: nothing is cached of it. Whether it learns in a stage,
            the stage's rules say.
        dtype: "auto" is bfloat16 where the processor multiplies it natively, else float32.
    """

    vision: str = "efficientnet_lite0"
    language: str = "smollm2-135m-instruct"
    image_size: int = 224
    visual_tokens: int = 9
    compress: str = "pool"
    connector_width: int | None = None
    train_vision: bool = False
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    prefix: str = "<|im_start|>Picture:"
    prompt_lead: str = "\n"
    middle: str = " Answer:"
    answer_lead: str = " "
    suffix: str = "\n"
    between: str = ""
    system: str = "{}\n"

    def __post_init__(self) -> None:
        ChatTemplate.__post_init__(self)
        if self.image_size < 1 or self.visual_tokens < 1:
            raise ValueError(f"image_size {self.image_size} and visual_tokens {self.visual_tokens} must be positive")

    def torch_dtype(self) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if torch.cuda.is_available() or native_bfloat16() else torch.float32
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32


def native_bfloat16() -> bool:
    """Tell whether this CPU multiplies bfloat16 without emulation (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class VLM(Scored):
    """An image encoder and a language model joined by a trained connector.

    Args:
        vision: encoder: uint8 (I, H, W, 3) -> (I, N, Dv), row-major grid.
        connector: (..., Dv) -> (..., D).
        language: decoder over packed embeddings.
        config: sizes and defaults.
        tokenizer: of the language model; kept beside the weights so that a VLM can talk.
    """

    def __init__(
        self,
        vision: Encoder,
        connector: nn.Module,
        language: LanguageModel,
        config: ModelConfig,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.vision: Encoder = vision
        self.connector, self.language = connector, language
        self.config, self.tokenizer = config, tokenizer
        self.feature_cache: FeatureCache | None = None
        self.feature_store: FeatureStore | None = None  # of a stage that learns from shards
        self.compressors = nn.ModuleList()  # of the placement, so that those with weights learn and are saved
        self._placement = Placement()

    @property
    def placement(self) -> Placement:
        """What compresses visual tokens where, beside `config.compress`, which one in front of the decoder replaces."""
        return self._placement

    @placement.setter
    def placement(self, placement: Placement) -> None:
        connector = placement.connector
        if connector is not None and connector.position != "renumber":
            raise ValueError(
                f"VLM: {connector.name} at the connector: the text has one place a token, so positions are renumbered; "
                f"position={connector.position!r} is for language:0"
            )
        self._placement = placement
        self.compressors = nn.ModuleList(placement.compressors).to(self.language.head_weight)

    def roles(self) -> dict[str, tuple[str, ...]]:
        """Return role ("vision", "connector", "llm", "embeddings") -> names of its parameters."""
        parts = {"vision.": "vision", "connector.": "connector", "compressors.": "connector"}
        return named_roles(self, parts | LANGUAGE)

    @property
    def vision_learns(self) -> bool:
        """Whether the encoder is trained; it runs without graph otherwise."""
        return any(param.requires_grad for param in self.vision.parameters())

    @property
    def device(self) -> torch.device:
        # not of a parameter by its name: ZeRO-3 gathers what is named, on this rank alone where only this one asks
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of what the language model reads; asked as `device` is."""
        return next(self.language.parameters()).dtype

    def grid(self, pixels_on_a_side: int) -> int:
        """Return how many tokens a side the encoder makes of a square image."""
        return pixels_on_a_side // self.vision.stride

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Encode uint8 (I, H, W, 3) into the full grid (I, N, Dv).

        Unless the encoder is trained it runs without graph, and on `ENCODED_TOGETHER` images at a time where its
        weights are whole.
        """
        if self.vision_learns or self._sharded or len(pixels) <= ENCODED_TOGETHER:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_learns):
                return self.vision(pixels.to(self.device))
        with torch.no_grad():
            return torch.cat([self.vision(part.to(self.device)) for part in pixels.split(ENCODED_TOGETHER)])

    @property
    def _sharded(self) -> bool:
        """Whether the encoder's weights are spread over ranks (ZeRO-3), which then must call it equally often."""
        return any(hasattr(param, "ds_id") for param in self.vision.parameters())

    def embed_batch(self, batch: Batch) -> Tensor:
        """Embed a packed batch (T,) and put the visual tokens at their placeholders: (T, D)."""
        embeddings = self.language.embed(batch.input_ids.to(self.device))
        images = _places(batch)
        places = batch.image_index.numel()
        if (places == 0) != (images == 0) or (images and places % images):
            raise ValueError(
                f"VLM: {places} image places do not fit {images} images; "
                "every image needs the same number of places, and every place an image"
            )
        if images == 0:
            # every rank runs encoder and connector once a step, image or not: sharded parameters are gathered in step
            return embeddings + 0.0 * self._nothing().sum() if self.training or self._sharded else embeddings
        tokens = self._placed_tokens(batch, places // images)
        if batch.shown is not None:  # what several places show was encoded once
            tokens = tokens.unflatten(0, (-1, places // images))[batch.shown.to(self.device)].flatten(0, 1)
        return insert_features(embeddings, tokens.to(embeddings.dtype), batch.image_index.to(self.device))

    def start(self, batch: Batch, cache: KVCache | None = None) -> tuple[Tensor, Continuation]:
        """Run a packed batch: hidden states (T, D) after the final norm, and how its sequences go on."""
        reduction = self._reduction(batch)
        hidden = self._decode(batch, cache, reduction)
        left = None if reduction is None else reduction.cu_seqlens
        return hidden, Continuation(language=self.language, cu_seqlens=left)

    def _decode(self, batch: Batch, cache: KVCache | None, reduction: Reduction | None) -> Tensor:
        return self.language(
            self.embed_batch(batch),
            batch.position_ids.to(self.device),
            batch.cu_seqlens.to(self.device),
            batch.max_seqlen,
            cache,
            reduction=reduction,
        )

    def _reduction(self, batch: Batch) -> Reduction | None:
        """Return what `stages` do to this batch inside of the language model."""
        images = _places(batch)
        if not self.placement.stages or not images:
            return None
        seqlens = (batch.image_index.numel() // images,) * images
        side = math.isqrt(seqlens[0])
        whole = self.placement.connector is None and self.placement.merge is None and side * side == seqlens[0]
        grid = ((1, side, side),) * images if whole else None  # pooled or not, the encoder's squares stay squares
        visual = VisualRows.of_batch(batch.image_index, seqlens, batch.cu_seqlens, batch.labels, self.device, grid)
        return Reduction(self.placement.stages, visual, batch.labels.to(self.device))

    def logits(self, batch: Batch) -> Tensor:
        """Return (T', V) logits of all rows, sample after sample."""
        return self.language.logits(self.start(batch)[0])

    def scored(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return hidden states, labels and boundaries of the rows that are left of a batch."""
        reduction = self._reduction(batch)
        hidden = self._decode(batch, None, reduction)
        if reduction is None or reduction.labels is None:
            return hidden, batch.labels.to(self.device), batch.cu_seqlens.to(self.device)
        return hidden, reduction.labels, reduction.cu_seqlens

    def _nothing(self) -> Tensor:
        """Run encoder, compressor and connector on an image of zeros; the encoder not where features are cached."""
        compressor, side = self.placement.connector, self.grid(self.config.image_size)
        features = torch.zeros(1, side * side, self.vision.width, dtype=self.dtype, device=self.device)
        if self.feature_cache is None:
            pixels = torch.zeros(1, *[self.config.image_size] * 2, 3, dtype=torch.uint8)
            features = self.encode_images(pixels).to(self.dtype)
        if compressor is None or not any(True for _ in compressor.parameters()):
            return self.connector(features[:, 0])
        tokens, _ = compressor(Tokens.of(features, [(side, side)]))
        return self.connector(tokens.x)

    def _placed_tokens(self, batch: Batch, keep: int) -> Tensor:
        """Return (I * keep, D): the images' tokens as `placement` or the configuration compresses them, projected."""
        merge, compressor = self.placement.merge, self.placement.connector
        layer = None if compressor is None else compressor.layer
        if merge is None and layer is None:
            tokens = Tokens.of(self._features(batch))
            probe = None
        elif batch.pixels is None or not isinstance(self.vision, VisionTransformer):
            raise ValueError(
                "VLM: what looks into the encoder needs one with attention, and pixels, not cached features: "
                f"{type(self.vision).__name__}, pixels {'given' if batch.pixels is not None else 'missing'}"
            )
        else:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.vision_learns):
                tokens, probe = self.vision.encode(batch.pixels.to(self.device), probe_layer=layer, merge=merge)
        if compressor is not None:
            tokens, _ = compressor(tokens, Evidence(probe=probe))
        elif merge is None:
            tokens = compress(tokens, self.config.compress, keep=keep)
        if len(tokens.x) * _places(batch) != batch.image_index.numel() * _images(batch):
            raise ValueError(
                f"VLM: the text has {keep} places for each image, but {tokens.seqlens[:4]} tokens are left of them"
            )
        return self.connector(tokens.x.to(self.dtype))

    def _features(self, batch: Batch) -> Tensor:
        if self.feature_store is not None or batch.features:
            return self._stored_features(batch, self.feature_store, dict(batch.features or {}))
        if batch.pixels is not None:
            return self.encode_images(batch.pixels)
        if self.feature_cache is None:
            raise ValueError(
                "VLM: the batch has image paths but no pixels, and no feature_cache is set to look them up"
            )
        return self.feature_cache.gather(batch.image_paths).to(self.device)

    def _stored_features(self, batch: Batch, store: FeatureStore | None, found: dict[int, Tensor]) -> Tensor:
        """Return what was found and encode the rest, which is kept."""
        missing = [number for number in range(len(batch.image_paths)) if number not in found]
        if batch.pixels is not None:
            for number, features in zip(missing, self.encode_images(batch.pixels), strict=True):
                found[number] = features
                if store is not None:
                    store.put(batch.image_paths[number], features)
        elif self._sharded:
            self.encode_images(torch.zeros(1, *[self.config.image_size] * 2, 3, dtype=torch.uint8))  # as other ranks
        return torch.stack([found[number].to(self.device) for number in range(len(found))])


def _images(batch: Batch) -> int:
    return len(batch.image_paths) if batch.pixels is None or batch.features else batch.pixels.shape[0]


def _places(batch: Batch) -> int:
    """Return in how many places of the text an image stands."""
    return _images(batch) if batch.shown is None else len(batch.shown)


def build_vlm(config: ModelConfig, cache: Path | None = None, seed: int = 0) -> VLM:
    """Load the encoder and the language model of a recipe and put a fresh connector between them.

    Args:
        config: the recipe's model section.
        cache: folder for converted weights, or None.
        seed: of the connector's initial weights.
    """
    dtype = config.torch_dtype()
    language = load_language(config.language, dtype, cache=cache)
    vision = load_vision(config.vision, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        std = language.model.embed_tokens.weight.float().std().item()
        connector = make_connector(config, vision.width, language.config.width, std).to(dtype)
    model = VLM(vision, connector, language, config, load_tokenizer(config.language, cache=cache))
    model.requires_grad_(False)
    return model.to(loading_device(model))


def make_connector(config: ModelConfig, vision_width: int, width: int, out_std: float) -> Projector:
    """Make the fresh connector of a recipe's model; `out_std` is of the language model's embeddings."""
    hidden = config.connector_width or width
    return Projector(vision_width, width, hidden=hidden, norm=True, out_std=out_std)
