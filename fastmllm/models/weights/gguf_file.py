"""GGUF files of Llama and Qwen2 models: shape, expanded weights, tokenizer. The only reader of the format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmllm.models.language import LanguageConfig

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer

# llama.cpp's tensor names -> Hugging Face's
_TENSORS: Mapping[str, str] = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_TENSORS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTROL, _USER_DEFINED = 3, 4  # tokenizer.ggml.token_type


class GgufFile:
    """Read one GGUF file of a Llama or Qwen2 model; opened when something is asked of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: GGUFReader | None = None

    @property
    def reader(self) -> GGUFReader:
        if self._reader is None:
            try:
                from gguf import GGUFReader
            except ModuleNotFoundError as error:
                raise ModuleNotFoundError(
                    f"fastmllm::weights: reading {self.path.name} needs the gguf package: pip install gguf"
                ) from error
            self._reader = GGUFReader(self.path)
        return self._reader

    def field(self, key: str, default: Any = None) -> Any:
        field = self.reader.get_field(key)
        if field is None and default is None:
            raise ValueError(f"fastmllm::weights: {self.path.name} has no metadata {key!r}")
        return default if field is None else field.contents()

    @property
    def architecture(self) -> str:
        architecture = self.field("general.architecture")
        if architecture not in ("llama", "qwen2"):
            raise ValueError(
                f"fastmllm::weights: {self.path.name} holds architecture {architecture!r}; supported: llama, qwen2"
            )
        return architecture

    def config(self) -> LanguageConfig:
        kind = self.architecture
        names = {tensor.name for tensor in self.reader.tensors}
        if "rope_freqs.weight" in names:
            raise ValueError(f"fastmllm::weights: {self.path.name} scales its rotary frequencies; not supported")
        width, heads = self.field(f"{kind}.embedding_length"), self.field(f"{kind}.attention.head_count")
        eps = self.field(f"{kind}.attention.layer_norm_rms_epsilon")
        return LanguageConfig(
            vocab_size=len(self.field("tokenizer.ggml.tokens")),
            width=width,
            depth=self.field(f"{kind}.block_count"),
            num_heads=heads,
            num_kv_heads=self.field(f"{kind}.attention.head_count_kv", heads),
            head_dim=self.field(f"{kind}.attention.key_length", width // heads),
            mlp_width=self.field(f"{kind}.feed_forward_length"),
            rope_theta=float(self.field(f"{kind}.rope.freq_base", 10000.0)),
            norm_eps=float(f"{eps:.6g}"),  # stored in fp32: 9.99999974e-06 is 1e-5
            max_positions=self.field(f"{kind}.context_length"),
            tie_embeddings="output.weight" not in names,
            qkv_bias="blk.0.attn_q.bias" in names,
            output_bias="blk.0.attn_output.bias" in names,
        )

    def state(self, config: LanguageConfig) -> dict[str, Tensor]:
        """Expand every tensor to fp32, under Hugging Face's names and in its row order."""
        from gguf import dequantize

        state: dict[str, Tensor] = {}
        for tensor in self.reader.tensors:
            stem, _, kind = tensor.name.rpartition(".")
            if stem.startswith("blk."):
                _, layer, part = stem.split(".", 2)
                target = f"model.layers.{layer}.{_LAYER_TENSORS.get(part, part)}.{kind}"
            else:
                target = f"{_TENSORS.get(stem, stem)}.{kind}"
            value = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
            if self.architecture == "llama" and stem.endswith((".attn_q", ".attn_k")):
                heads = config.num_heads if stem.endswith(".attn_q") else config.num_kv_heads
                value = undo_pairing(value, heads)
            state[target] = value
        return state

    def tokenizer(self) -> Tokenizer:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

        if (kind := self.field("tokenizer.ggml.model")) != "gpt2":
            raise ValueError(f"fastmllm::load_tokenizer: {self.path.name} holds a {kind!r} vocabulary; supported: gpt2")
        bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        splits: dict[str, list[Any]] = {
            "gpt-2": [byte_level],
            "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
            "qwen2": [pre_tokenizers.Split(Regex(_QWEN2_SPLIT), behavior="isolated"), bytes_only],
        }
        if (rule := self.field("tokenizer.ggml.pre", "gpt-2")) not in splits:
            raise ValueError(
                f"fastmllm::load_tokenizer: {self.path.name} splits text by {rule!r}; known rules: {sorted(splits)}"
            )
        tokens: list[str] = self.field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self.field("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(splits[rule])
        tokenizer.decoder = decoders.ByteLevel()
        kinds = self.field("tokenizer.ggml.token_type", [1] * len(tokens))
        for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            added = [token for token, kind in zip(tokens, kinds, strict=True) if kind == wanted]
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=special) for token in added])
        return tokenizer


def undo_pairing(weight: Tensor, num_heads: int) -> Tensor:
    """Put the rows of a query or key projection back into half-split order.

    Args:
        weight: (H * Dh, ...) with neighbouring rows as rotary pairs, as llama.cpp writes Llama files.
        num_heads: H.

    Returns:
        (H * Dh, ...) with row i paired to row i + Dh/2 of its head, as Hugging Face keeps it.
    """
    pairs = weight.unflatten(0, (num_heads, -1, 2))  # (H, Dh/2, 2, ...)
    return pairs.transpose(1, 2).reshape(weight.shape).contiguous()
