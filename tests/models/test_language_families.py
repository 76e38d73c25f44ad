"""The decoder against transformers' Llama, Mistral, Qwen2, Qwen3 and the texts of Qwen-VL and Llama-3.2-Vision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmllm.models.language import LanguageModel
from fastmllm.models.weights.language import DECODER_RULES, LANGUAGE_RULES, language_config, language_fields
from fastmllm.models.weights.mapping import fill, prefixed, to_ours, to_theirs

LENGTHS = (7, 1, 12)
SIZES = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
}  # fmt: skip
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 3, 2]}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
# name -> model class, and what the configuration says beside the sizes
CAUSAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", {"rope_scaling": YARN, "rope_theta": 5000.0, "num_key_value_heads": None}),
    "llama-gelu": ("Llama", {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16, "attention_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 4}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-bias": ("Qwen3", {"head_dim": 8, "attention_bias": True, "rope_scaling": {"type": "linear", "factor": 2.0}}),
}
TEXT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl", "Qwen2VLText", {"rope_parameters": MROPE}),
    "qwen2_5_vl": ("qwen2_5_vl", "Qwen2_5_VLText", {"rope_scaling": MROPE | {"type": "mrope"}}),
    "qwen2_5_vl-yarn": ("qwen2_5_vl", "Qwen2_5_VLText", {"rope_scaling": MROPE | YARN}),
    "qwen3_vl": ("qwen3_vl", "Qwen3VLText", {"head_dim": 12, "rope_parameters": MROPE | {"mrope_interleaved": True}}),
    "mllama": ("mllama", "MllamaText", {"cross_attention_layers": [], "rope_parameters": LLAMA3, "pad_token_id": 96}),
}


def redrawn(model: torch.nn.Module) -> torch.nn.Module:
    """Draw norms and biases away from 1 and 0, and weights large enough that a wrong gate shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(0.3 * noise + float("norm" in name))
            else:
                parameter.copy_(noise * (0.7 if "embed" in name else 1.2 * parameter.shape[1] ** -0.5))
    return model.eval()


def oracle(name: str) -> tuple[torch.nn.Module, LanguageModel]:
    """Transformers' tiny model, and ours with its weights."""
    transformers = pytest.importorskip("transformers")
    if name in CAUSAL:
        kind, more = CAUSAL[name]
        config, model = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
        rules = LANGUAGE_RULES
    else:
        family, kind, more = TEXT[name]
        package = pytest.importorskip(f"transformers.models.{family}.modeling_{family}")
        config, model = getattr(package, f"{kind}Config"), getattr(package, f"{kind}Model")
        rules = prefixed(DECODER_RULES, ours="model.")
    raw = config(**(SIZES | more)).to_dict()
    made = config(**(SIZES | more), attn_implementation="eager")
    theirs = redrawn(model(made))
    mine = LanguageModel(language_config(raw, name))
    state, rest = to_ours(theirs.state_dict(), rules, name)
    assert not rest
    back = to_theirs(state, rules)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], value) for key, value in theirs.state_dict().items())
    if "lm_head.weight" not in state:
        state["lm_head.weight"] = mine.lm_head.weight
    fill(mine, state, name)
    mine.tie()
    assert language_config(language_fields(mine.config, raw["model_type"]), name) == mine.config
    return theirs, mine.eval()


def ids_of(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, SIZES["vocab_size"], (sum(lengths),), generator=generator)
    return (
        ids,
        torch.cat([torch.arange(length) for length in lengths]),
        torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    )


def image_positions(lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    """Positions (3, T) of sequences that are, where long enough, two words, an image of 2 x 2, and words."""
    parts = []
    for length in lengths:
        row = torch.arange(length).repeat(3, 1)
        if length > 6:
            row[:, 2:6] = 2 + torch.tensor([[0, 0, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]])
            row[:, 6:] -= 2  # the image is 4 tokens, and 2 positions
        parts.append(row)
    return torch.cat(parts, dim=1)


def assert_equal_gradients(mine: LanguageModel, theirs: torch.nn.Module, prefix: str = "") -> None:
    expected = {prefix + name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in mine.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in found.items():
        assert (gradient - expected[name]).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("name", CAUSAL)
def test_causal_models_equal_transformers(name: str) -> None:
    theirs, mine = oracle(name)
    ids, positions, starts = ids_of()
    logits = mine.logits(mine(mine.embed(ids), positions, starts, max(LENGTHS)))
    expected = torch.cat([theirs(part[None]).logits[0] for part in ids.split(LENGTHS)])
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_equal_gradients(mine, theirs)


@pytest.mark.parametrize("name", ["llama-llama3", "mistral-window", "qwen2-window", "qwen3"])
@torch.no_grad()
def test_greedy_generation_is_token_identical(name: str) -> None:
    theirs, mine = oracle(name)
    ids, positions, starts = ids_of()
    theirs.generation_config.eos_token_id = None
    expected = [
        theirs.generate(part[None], max_new_tokens=9, do_sample=False, pad_token_id=0)[0, len(part) :].tolist()
        for part in ids.split(LENGTHS)
    ]
    cache = mine.new_cache(len(LENGTHS), max(LENGTHS) + 9)
    hidden = mine(mine.embed(ids), positions, starts, max(LENGTHS), cache)[(starts[1:] - 1).long()]
    steps = torch.arange(len(LENGTHS) + 1, dtype=torch.int32)
    tokens = [mine.logits(hidden).argmax(-1)]
    while len(tokens) < 9:
        positions = torch.tensor(cache.next_positions)
        tokens.append(mine.logits(mine(mine.embed(tokens[-1]), positions, steps, 1, cache)).argmax(-1))
    assert torch.stack(tokens, 1).tolist() == expected
    assert len({tuple(row) for row in expected}) == 3


@pytest.mark.parametrize("name", TEXT)
def test_text_models_equal_transformers(name: str) -> None:
    theirs, mine = oracle(name)
    three = mine.config.mrope_section is not None
    ids, flat, starts = ids_of()
    positions = image_positions() if three else flat
    hidden = mine(mine.embed(ids), positions, starts, max(LENGTHS))
    parts = zip(ids.split(LENGTHS), positions.split(LENGTHS, dim=-1), strict=True)
    results = [theirs(inputs_embeds=theirs.embed_tokens(i)[None], position_ids=p[..., None, :]) for i, p in parts]
    expected = torch.cat([result.last_hidden_state[0] for result in results])
    assert (hidden - expected).abs().max() <= 1e-5 * expected.abs().max()
    if three:
        assert not torch.allclose(mine(mine.embed(ids), flat, starts, max(LENGTHS)), hidden)
    weights = torch.randn_like(hidden)
    (hidden * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_equal_gradients(mine, theirs, "model.")


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_mrope_decoding_goes_on_behind_the_image(name: str) -> None:
    theirs, mine = oracle(name)
    ids, _, starts = ids_of()
    positions = image_positions()
    cache = mine.new_cache(3, max(LENGTHS) + 4)
    mine(mine.embed(ids), positions, starts, max(LENGTHS), cache)
    assert cache.next_positions == [5, 1, 10]
    cache = cache.select([2, 0])
    steps, new = torch.arange(3, dtype=torch.int32), torch.randint(0, SIZES["vocab_size"], (2, 3))
    found = []
    for step in range(3):
        places = torch.tensor(cache.next_positions)
        found.append(mine(mine.embed(new[:, step]), places, steps, 1, cache))
    for row, sequence in enumerate((2, 0)):
        whole = torch.cat([ids.split(LENGTHS)[sequence], new[row]])
        first = [10, 5][row]
        places = torch.cat([positions.split(LENGTHS, 1)[sequence], (first + torch.arange(3)).expand(3, -1)], 1)
        expected = theirs(inputs_embeds=theirs.embed_tokens(whole)[None], position_ids=places[:, None])
        truth = expected.last_hidden_state[0, -3:]
        assert (torch.stack(found)[:, row] - truth).abs().max() <= 1e-5 * truth.abs().max()


@pytest.mark.parametrize("name", ["mistral-window", "qwen3", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_bf16_stays_near_fp32(name: str) -> None:
    _, mine = oracle(name)
    ids, flat, starts = ids_of()
    positions = flat if mine.config.mrope_section is None else image_positions()
    exact = mine(mine.embed(ids), positions, starts, max(LENGTHS))
    mine.bfloat16()
    result = mine(mine.embed(ids), positions, starts, max(LENGTHS), mine.new_cache(3, max(LENGTHS)))
    assert result.dtype == torch.bfloat16
    assert (result.float() - exact).norm() < 5e-2 * exact.norm()


@torch.no_grad()
def test_window_holds_in_ragged_pieces_with_a_cache() -> None:
    _, mine = oracle("qwen2-window")
    ids, positions, starts = ids_of()
    whole = mine(mine.embed(ids), positions, starts, max(LENGTHS))
    cuts = ((3, 1, 7), (4, 0, 5))  # of each sequence: in the first call, in the second
    cache, begins = mine.new_cache(3, max(LENGTHS)), [0, 0, 0]
    for counts in cuts:
        kept = [s for s in range(3) if counts[s]]
        cache = cache if len(kept) == 3 else cache.select(kept)
        rows = torch.cat([starts[s] + begins[s] + torch.arange(counts[s]) for s in kept])
        bounds = torch.tensor([0, *(counts[s] for s in kept)]).cumsum(0).to(torch.int32)
        out = mine(mine.embed(ids[rows]), positions[rows], bounds, max(counts), cache)
        torch.testing.assert_close(out, whole[rows])
        begins = [b + n for b, n in zip(begins, counts, strict=True)]


def test_dynamic_scaling_is_computed_up_to_the_trained_length_and_refused_behind_it() -> None:
    raw = SIZES | {"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    model = LanguageModel(language_config(raw | {"max_position_embeddings": 12}, "here")).eval()
    plain = LanguageModel(language_config(SIZES | {"model_type": "llama"}, "here")).eval()
    plain.load_state_dict(model.state_dict())
    ids, positions, starts = ids_of()
    assert torch.equal(*(m(m.embed(ids), positions, starts, 12) for m in (model, plain)))
    with torch.no_grad():
        cache = model.new_cache(3, 20)
        model(model.embed(ids), positions, starts, 12, cache)
        places, steps = torch.tensor(cache.next_positions), torch.arange(4, dtype=torch.int32)
        with pytest.raises(ValueError, match="13 tokens is longer than max_positions 12"):
            model(model.embed(ids[:3]), places, steps, 1, cache)
