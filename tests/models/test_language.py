"""The decoder against transformers' Llama and Qwen2: forward, gradients, cache, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from fastmllm.models.language import LanguageConfig, LanguageModel

LENGTHS = (7, 1, 12)
SHAPE = {
    "vocab_size": 97,
    "width": 48,
    "depth": 3,
    "num_heads": 6,
    "num_kv_heads": 2,
    "head_dim": 8,
    "mlp_width": 80,
    "rope_theta": 10000.0,
    "norm_eps": 1e-5,
}


def packed(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Random ids (T,), positions (T,), boundaries (S+1,) and the longest length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SHAPE["vocab_size"], (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return ids, positions, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths)


def hugging_face(family: str, tie: bool) -> torch.nn.Module:
    """A tiny transformers model of the same shape, eager attention, biases and norms away from their initial values."""
    transformers = pytest.importorskip("transformers")
    bias = {"attention_bias": True} if family == "llama-bias" else {}
    kind = "Qwen2" if family == "qwen2" else "Llama"
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=SHAPE["vocab_size"],
        hidden_size=SHAPE["width"],
        num_hidden_layers=SHAPE["depth"],
        num_attention_heads=SHAPE["num_heads"],
        num_key_value_heads=SHAPE["num_kv_heads"],
        intermediate_size=SHAPE["mlp_width"],
        rms_norm_eps=SHAPE["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE["rope_theta"]},
        tie_word_embeddings=tie,
        attn_implementation="eager",
        **bias,
    )
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(4)  # activations far enough from zero that a wrong gate shows
    return model


def ours(family: str = "llama", tie: bool = True) -> LanguageModel:
    """Our decoder of the same shape."""
    biases = {"qkv_bias": family != "llama", "output_bias": family == "llama-bias"}
    return LanguageModel(LanguageConfig(**SHAPE, tie_embeddings=tie, **biases)).eval()


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("family", "tie"), [("llama", True), ("llama", False), ("llama-bias", False), ("qwen2", True)])
def test_equals_transformers(family: str, tie: bool) -> None:
    theirs, mine = hugging_face(family, tie), ours(family, tie)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    ids, positions, starts, longest = packed()

    embeds = mine.embed(ids).detach().requires_grad_()
    logits = mine.logits(mine(embeds, positions, starts, longest))
    weights = torch.randn_like(logits)
    (logits * weights).sum().backward()

    begin = 0
    gradient = torch.zeros_like(embeds)
    for length in LENGTHS:
        part = slice(begin, begin + length)
        theirs_embeds = embeds.detach()[None, part].clone().requires_grad_()
        expected = theirs(inputs_embeds=theirs_embeds).logits[0]
        assert relative(logits[part], expected) <= 1e-5
        (expected * weights[part]).sum().backward()
        gradient[part] = theirs_embeds.grad[0]
        begin += length
    assert relative(embeds.grad, gradient) <= 1e-4
    theirs_grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert set(theirs_grads) == {name for name, _ in mine.named_parameters()}
    for name, parameter in mine.named_parameters():
        if parameter.grad is None:  # an untied table: the embeddings are given, not looked up
            assert name == "model.embed_tokens.weight"
            assert not tie
        else:
            assert relative(parameter.grad, theirs_grads[name]) <= 1e-4, name


def test_sequences_do_not_see_each_other() -> None:
    model = ours()
    ids, positions, starts, longest = packed()
    embeds = model.embed(ids).detach()
    whole = model(embeds, positions, starts, longest)
    changed = embeds.clone()
    changed[:7] += 1
    assert torch.equal(model(changed, positions, starts, longest)[7:], whole[7:])
    later = embeds.clone()
    later[12] += 1  # the fifth token of the third sequence: nothing before it may move
    after = model(later, positions, starts, longest)
    assert torch.equal(after[:12], whole[:12])
    assert not torch.equal(after[12:], whole[12:])


def test_frozen_weights_pass_the_gradient_and_take_none() -> None:
    model = ours()
    model.requires_grad_(False)
    ids, positions, starts, longest = packed()
    embeds = model.embed(ids).requires_grad_()
    model(embeds, positions, starts, longest).square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.isfinite().all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_checkpointing_changes_nothing_but_runs_layers_twice() -> None:
    model = ours()
    ids, positions, starts, longest = packed()
    calls = []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    gradients = []
    for recompute in (False, True):
        model.gradient_checkpointing = recompute
        model.zero_grad()
        embeds = model.embed(ids).detach().requires_grad_()
        model(embeds, positions, starts, longest).square().sum().backward()
        gradients.append((embeds.grad, model.model.layers[0].mlp.up_proj.weight.grad.clone()))
    assert len(calls) == 3  # one without, two with
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.equal(plain, checkpointed)


@torch.no_grad()
def test_cache_continues_what_one_call_computes() -> None:
    model = ours()
    ids, positions, starts, longest = packed()
    whole = model(model.embed(ids), positions, starts, longest)
    cuts = (4, 1, 6)  # the prompts; then ragged pieces, then one token each
    cache = model.new_cache(3, longest)
    begins = starts[:-1].tolist()
    rows = torch.cat([torch.arange(b, b + n) for b, n in zip(begins, cuts, strict=True)])
    bounds = torch.tensor([0, *cuts]).cumsum(0).to(torch.int32)
    first = model(model.embed(ids[rows]), positions[rows], bounds, max(cuts), cache)
    torch.testing.assert_close(first, whole[rows])
    cache = cache.select([2, 0])  # the second sequence has ended
    for begin, counts in (((6, 4), (4, 2)), ((10, 6), (1, 1)), ((11, 7), (1, 0))):
        kept = [place for place, count in enumerate(counts) if count]
        if len(kept) < 2:
            cache = cache.select(kept)
        rows = torch.cat(
            [torch.arange(begins[s] + b, begins[s] + b + n) for s, b, n in zip((2, 0), begin, counts, strict=True)]
        )
        bounds = torch.tensor([0, *(counts[place] for place in kept)]).cumsum(0).to(torch.int32)
        out = model(model.embed(ids[rows]), positions[rows], bounds, max(counts), cache)
        torch.testing.assert_close(out, whole[rows])


@torch.no_grad()
def test_bf16_stays_near_fp32_with_and_without_cache() -> None:
    exact, model = ours(), ours()
    model.load_state_dict(exact.state_dict())
    model.bfloat16()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids, positions, starts, longest = packed()
    truth = exact(exact.embed(ids), positions, starts, longest)
    out = model(model.embed(ids), positions, starts, longest)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), truth) < 2e-2
    cache = model.new_cache(3, longest)
    assert relative(model(model.embed(ids), positions, starts, longest, cache).float(), truth) < 2e-2


def test_rejects_what_does_not_fit() -> None:
    model = ours()
    ids, positions, starts, longest = packed()
    embeds = model.embed(ids)
    with pytest.raises(ValueError, match=r"packed \(T, 48\)"):
        model(embeds[None], positions, starts, longest)
    with pytest.raises(ValueError, match="position_ids"):
        model(embeds, positions[1:], starts, longest)
    with pytest.raises(ValueError, match="no_grad"):
        model(embeds, positions, starts, longest, model.new_cache(3, 12))
    with torch.no_grad(), pytest.raises(ValueError, match="do not fit into max_length 11"):
        model(embeds, positions, starts, longest, model.new_cache(3, 11))
    with torch.no_grad(), pytest.raises(ValueError, match="3 sequences for a cache of 2"):
        model(embeds, positions, starts, longest, model.new_cache(2, 12))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_kv_heads": 4}, "no multiple"),
        ({"head_dim": 7}, "even"),
        ({"depth": 0}, "depth"),
        ({"norm_eps": 0.0}, "eps"),
    ],
)
def test_config_rejects(change: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageConfig(**(SHAPE | change))
