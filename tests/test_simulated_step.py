from __future__ import annotations

import pytest
import torch
from tiny_compositions import tiny
from tiny_vlm import tiny_vlm

from fastmllm.bench.meters import count_flops, peak_bytes
from fastmllm.models.compose import compose
from fastmllm.models.recompute import layers_of
from fastmllm.simulated_step import Load, batch_of, simulate
from fastmllm.train.rules import apply_rules, roles_of

LOAD = Load(samples=2, text_tokens=24, images=1, image_size=32, visual_tokens=4)


def layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for names in roles_of(model).values() for layer in layers_of(model, names)]


def real(model: torch.nn.Module, load: Load) -> tuple[int, int]:
    """Run the same micro-batch with numbers; return FLOPs and the most bytes that it held, its gradients not."""
    batch = batch_of(model, load)
    if getattr(batch, "pixels", None) is not None:
        batch.pixels = torch.zeros(batch.pixels.shape, dtype=torch.uint8)
    for param in model.parameters():
        if param.requires_grad:
            param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    return count_flops(lambda: model(batch).backward()), peak_bytes(lambda: model(batch).backward())


@pytest.mark.parametrize("rules", [{"connector": 1e-3}, {"vision": 1e-3, "llm": 1e-3}], ids=str)
def test_without_numbers_it_is_the_step_with_numbers(rules: dict[str, float]) -> None:
    """The CPU's own loss keeps logits, which no GPU does: fewer targets make that small."""
    model, shape = tiny_vlm(), tiny_vlm().to("meta")
    for one in (model, shape):
        apply_rules(one, rules)
    step = simulate(shape, LOAD)
    flops, held = real(model, LOAD)
    head = 2 * 48 * 32 * len(model.language.head_weight)
    assert abs(step.flops - flops) <= 2 * head  # what the loss computes a second time differs by device
    loss = 4 * (48 * len(model.language.head_weight) + 48 * 32)
    assert held - 2 * loss <= step.activations <= held + 2 * loss
    assert (step.tokens, step.visual_tokens) == (56, 8)


def test_recomputation_trades_memory_for_operations() -> None:
    shape = tiny_vlm().to("meta")
    apply_rules(shape, {"llm": 1e-3})
    load = Load(samples=2, text_tokens=400, images=1, image_size=32, visual_tokens=4)
    kept, again = simulate(shape, load), simulate(shape, load, layers(shape))
    rows = 4 * shape.language.config.width * kept.tokens  # bytes of one tensor between layers
    assert kept.activations - again.activations > 3 * rows
    assert 1.1 * kept.flops < again.flops < 4 / 3 * kept.flops


def test_a_frozen_part_in_front_costs_a_forward_pass() -> None:
    shape = tiny_vlm().to("meta")
    flops = {}
    for rules in ("connector", "llm"):
        apply_rules(shape, {rules: 1e-3})
        flops[rules] = simulate(shape, LOAD)
    language = sum(p.numel() for p in shape.language.parameters())
    assert flops["llm"].backward_elements <= language
    assert flops["connector"].backward_elements > flops["llm"].backward_elements
    assert flops["connector"].flops < flops["llm"].flops


@pytest.mark.parametrize("parts", [("vit", "fixed", "mlp", "tokens"), ("qwen", "native", "merger", "tokens")], ids=str)
def test_a_composition_is_simulated(parts: tuple[str, str, str, str]) -> None:
    model = compose(tiny(*parts))
    shape = model.to("meta")
    apply_rules(shape, {"llm": 1e-3})
    step = simulate(shape, Load(samples=2, text_tokens=16, image_size=28))
    more = simulate(shape, Load(samples=4, text_tokens=16, image_size=28))
    assert more.tokens == 2 * step.tokens
    assert 0 < step.visual_tokens < step.tokens
    assert more.flops == pytest.approx(2 * step.flops, rel=0.01)
    assert 1.4 * step.activations < more.activations < 2.2 * step.activations


def test_no_gradient_and_no_hook_stays() -> None:
    shape = tiny_vlm().to("meta")
    apply_rules(shape, {"llm": 1e-3})
    simulate(shape, LOAD, layers(shape))
    assert all(param.grad is None for param in shape.parameters())
    assert not any(module._forward_hooks for module in shape.modules())


def test_a_load_needs_text() -> None:
    with pytest.raises(ValueError, match="2 or more text tokens"):
        Load(samples=1, text_tokens=1)
