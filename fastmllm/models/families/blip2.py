"""BLIP-2 (arXiv 2301.12597) and InstructBLIP (2305.06500): EVA ViT, a Q-Former, a linear layer, OPT or Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastmllm.models.checkpoint import Layout
from fastmllm.models.families import tied
from fastmllm.models.families.parts import WholePath, cut, decoder, decoder_rules, decoder_unused, vision_tower
from fastmllm.models.image_path import Seen, Visual
from fastmllm.models.inputs import unpad
from fastmllm.models.mllm import Blueprint
from fastmllm.models.tower import Features
from fastmllm.models.vision import VisionTransformer
from fastmllm.models.weights.connectors import qformer_rules, read_qformer
from fastmllm.models.weights.mapping import Rule, Shape, prefixed
from fastmllm.models.weights.values import read_flag, read_part, read_size
from fastmllm.modules.qformer import ImageTokens, PackedText, QFormer, QFormerConfig

OPT_RULES = [
    Rule("model.embed_tokens.weight", "model.decoder.embed_tokens.weight"),
    Rule("model.embed_positions.weight", "model.decoder.embed_positions.weight"),
    Rule("model.norm.{p}", "model.decoder.final_layer_norm.{p}"),
    *prefixed(
        [
            *(Rule(f"self_attn.{part}_proj.{{p}}", f"self_attn.{part}_proj.{{p}}") for part in "qkv"),
            Rule("self_attn.o_proj.{p}", "self_attn.out_proj.{p}"),
            Rule("input_layernorm.{p}", "self_attn_layer_norm.{p}"),
            Rule("post_attention_layernorm.{p}", "final_layer_norm.{p}"),
            Rule("mlp.up_proj.{p}", "fc1.{p}"),
            Rule("mlp.down_proj.{p}", "fc2.{p}"),
        ],
        "model.layers.{i}.",
        "model.decoder.layers.{i}.",
    ),
    Rule("lm_head.weight", "lm_head.weight"),
]


# a buffer, 0 .. positions - 1
QFORMER_UNUSED: dict[str, Shape] = dict.fromkeys(
    ("embeddings.position_ids", "qformer.embeddings.position_ids"), (1, -1)
)


class QFormerPath(WholePath):
    """Encode images of one size, class tokens included; queries read them, with the question in InstructBLIP.

    Args:
        vision: the encoder.
        config: of the Q-Former.
        width: of the language model.
    """

    def __init__(self, vision: VisionTransformer, config: QFormerConfig, width: int) -> None:
        super().__init__()
        self.vision, self.width = vision, width
        self.qformer = QFormer(config)
        self.projection = nn.Linear(config.width, width)

    def connect(self, features: Features, arguments: Mapping[str, Any]) -> Visual:
        """Let the queries read the images, each with its packed question (InstructBLIP)."""
        (tokens,), images, grid = features, arguments["images"], arguments["grid"]
        each = grid[0] * grid[1] + 1
        bounds = torch.arange(images + 1, dtype=torch.int32, device=tokens.device) * each
        text = None
        if "text_ids" in arguments:
            text = PackedText(
                ids=arguments["text_ids"], cu_seqlens=arguments["text_bounds"], max_seqlen=arguments["longest_text"]
            )
        return Visual(tokens=self.projection(self.qformer(ImageTokens.of_images(tokens, bounds, each), text)))

    def blank(self) -> dict[str, Any]:
        """Return one image of zeros, and a question of one token where there is one."""
        arguments = super().blank()
        if self.qformer.config.vocab_size:
            arguments |= {"text_ids": torch.zeros(1, dtype=torch.int64), "longest_text": 1}
            arguments["text_bounds"] = torch.tensor([0, 1], dtype=torch.int32)
        return arguments

    def read(self, batch: Mapping[str, Any]) -> Seen | None:
        """Take `pixel_values` (I, 3, H, W), and `qformer_input_ids` with its mask, out of a processor's batch."""
        pixels = batch.get("pixel_values")
        if pixels is None or not len(pixels):
            return None
        size = self.vision.config.patch_size
        arguments: dict[str, Any] = {
            "patches": cut(pixels, size), "images": len(pixels),
            "grid": (pixels.shape[2] // size, pixels.shape[3] // size),
        }  # fmt: skip
        if self.qformer.config.vocab_size:
            if batch.get("qformer_input_ids") is None:
                raise ValueError("fastmllm::MLLM: InstructBLIP's Q-Former reads the question: give qformer_input_ids")
            rows, _ = unpad(batch["qformer_input_ids"], batch.get("qformer_attention_mask"))
            if len(rows) != len(pixels):
                raise ValueError(f"fastmllm::MLLM: {len(rows)} qformer_input_ids for {len(pixels)} images")
            arguments["text_ids"] = torch.tensor([token for row in rows for token in row])
            arguments["text_bounds"] = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
            arguments["longest_text"] = max(map(len, rows))
        return Seen(arguments=arguments, counts=[self.qformer.config.num_queries] * len(pixels))


def build(raw: Mapping[str, Any], origin: str) -> Blueprint:
    """Build the parts of a BLIP-2 or an InstructBLIP."""
    instruct = raw["model_type"] == "instructblip"
    text = {"model_type": "opt", **read_part(raw, "text_config", origin)}
    if read_flag(text, "is_encoder_decoder", False, origin) or text["model_type"] == "t5":
        raise ValueError(f"fastmllm::MLLM: {origin}: a T5 behind the Q-Former is not computed here, only decoders")
    if raw.get("image_token_index") is None:
        raise ValueError(f"fastmllm::MLLM: {origin}: config.json has no image_token_index, where the queries go")
    token = read_size(raw, "image_token_index", None, origin, least=0)
    language = decoder(text, f"{origin} (text_config)", tied=tied(raw, origin))
    vision = {"model_type": "blip_2_vision_model", **read_part(raw, "vision_config", origin)}
    tower = vision_tower(vision, "vision_model.", origin)
    queries = {**read_part(raw, "qformer_config", origin), "encoder_hidden_size": tower.module.config.width}
    number = read_size(raw, "num_query_tokens", 32, origin)
    config = read_qformer(queries, number, text=instruct or None, origin=f"{origin} (qformer_config)")
    opt = text["model_type"] == "opt"
    decoder_table = (
        prefixed(OPT_RULES, "language.", "language_model.")
        if opt
        else decoder_rules("language_model.model.", "language_model.")
    )
    return Blueprint(
        images=QFormerPath(tower.module, config, language.config.width),
        language=language,
        layout=Layout(
            rules=[
                *tower.rules,
                *prefixed(qformer_rules(config, instruct), "images.qformer."),
                Rule("images.projection.{p}", "language_projection.{p}"),
                *decoder_table,
            ],
            unused=tower.unused | QFORMER_UNUSED | ({} if opt else decoder_unused("language_model.model.")),
            whole=tower.whole,
            tied=language.config.tie_embeddings,
        ),
        placeholders=(token,),
    )
