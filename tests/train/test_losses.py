from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fastmllm.train.losses import anchor_loss, dpo_loss, group_advantages, grpo_loss


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64)


def plain_grpo(lp: float, old: float, ref: float, advantage: float, clip: float, kl: float) -> float:
    ratio, d = math.exp(lp - old), ref - lp
    cut = min(max(ratio, 1 - clip), 1 + clip)
    return -min(ratio * advantage, cut * advantage) + kl * (math.exp(d) - d - 1)


def test_dpo_is_its_formula() -> None:
    sides = draw(4, 9, scale=4.0)
    for pc, pr, rc, rr, loss in zip(*sides.tolist(), dpo_loss(*sides, beta=0.3).tolist(), strict=True):
        assert loss == pytest.approx(-math.log(1 / (1 + math.exp(-0.3 * ((pc - rc) - (pr - rr))))), rel=1e-12)
    assert torch.equal(dpo_loss(*sides[[0, 1, 0, 1]], beta=0.3), torch.full((9,), 2.0, dtype=torch.float64).log())


def test_the_anchor_is_its_formula() -> None:
    policy, reference = draw(2, 9, scale=4.0)
    found = anchor_loss(policy, reference, 0.3, 0.5)
    for p, r, loss in zip(policy.tolist(), reference.tolist(), found.tolist(), strict=True):
        assert loss == pytest.approx(math.log1p(math.exp(-(0.3 * (p - r) - 0.5))), rel=1e-12)


def test_preferences_push_where_they_should_and_never_overflow() -> None:
    chosen, rejected = draw(5).requires_grad_(), draw(5, seed=1).requires_grad_()
    dpo_loss(chosen, rejected, draw(5, seed=2), draw(5, seed=3), 0.5).sum().backward()
    assert (chosen.grad < 0).all()
    assert torch.equal(chosen.grad, -rejected.grad)
    far = torch.tensor([1e5, -1e5], requires_grad=True)
    loss = dpo_loss(far, torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 1e5]
    assert far.grad.tolist() == [0.0, -1.0]


def test_gradients_are_those_of_the_formulas() -> None:
    sides = [draw(6, seed=i).requires_grad_() for i in range(2)] + [draw(6, seed=i) for i in (2, 3)]
    assert gradcheck(lambda *s: dpo_loss(*s, beta=0.7), sides)
    assert gradcheck(lambda p: anchor_loss(p, sides[2], 0.7, 0.1), sides[:1])
    mask = torch.tensor([True, True, False, True, True, True])
    new = (draw(6, seed=4, scale=0.3)).requires_grad_()
    old, ref, advantages = draw(6, seed=5, scale=0.3), draw(6, seed=6), draw(6, seed=7)
    assert gradcheck(lambda lp: grpo_loss(lp, old, ref, advantages, mask, 0.2, 0.1), (new,))


def test_grpo_is_its_formula() -> None:
    values = [draw(40, seed=i, scale=0.5) for i in range(4)]
    mask = draw(40, seed=9) > -0.5
    found = grpo_loss(*values, mask, 0.2, 0.04)
    expected = [
        plain_grpo(*row, 0.2, 0.04) if kept else 0.0
        for row, kept in zip(zip(*(v.tolist() for v in values), strict=True), mask.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert grpo_loss(values[0], values[1], None, values[3], mask).tolist() == pytest.approx(
        [plain_grpo(*row, 0.2, 0.0) if kept else 0.0
         for row, kept in zip(zip(*(v.tolist() for v in values), strict=True), mask.tolist(), strict=True)]
    )  # fmt: skip


def test_what_is_clipped_has_no_gradient_and_what_is_masked_no_nan() -> None:
    new = torch.tensor([1.0, -1.0, 1.0, -1.0, 500.0, -500.0], requires_grad=True)
    advantages = torch.tensor([1.0, -1.0, -1.0, 1.0, 0.0, 1.0])
    mask = torch.ones(6, dtype=torch.bool)
    grpo_loss(new, torch.zeros(6), None, advantages, mask).sum().backward()
    # raised enough, lowered enough; raised though bad, lowered though good: these must come back
    assert new.grad[:4].tolist() == pytest.approx([0.0, 0.0, math.e, -1 / math.e])
    assert new.grad[4:].tolist() == [0.0, 0.0]
    wild = torch.tensor([0.5, math.nan, math.inf], requires_grad=True)
    loss = grpo_loss(wild, wild.detach(), wild.detach(), torch.ones(3), torch.tensor([True, False, False]), 0.2, 0.1)
    loss.sum().backward()
    assert loss.tolist() == [-1.0, 0.0, 0.0]
    assert wild.grad.tolist() == [-1.0, 0.0, 0.0]


@pytest.mark.parametrize("standardise", [False, True])
def test_a_group_of_equal_rewards_teaches_nothing(standardise: bool) -> None:
    rewards = torch.tensor([0.9, 0.9, 0.9, 1.0, 0.0, 0.5])  # the mean of three 0.9 is not 0.9 in fp32
    advantages = group_advantages(rewards, 3, standardise=standardise)
    assert advantages[:3].tolist() == [0.0, 0.0, 0.0]
    scale = rewards[3:].double().std().item() + 1e-4 if standardise else 1.0
    assert advantages[3:].tolist() == pytest.approx([0.5 / scale, -0.5 / scale, 0.0])
    log_probs = draw(6).requires_grad_()
    mask = torch.ones(6, dtype=torch.bool)
    grpo_loss(log_probs, log_probs.detach(), None, advantages.double(), mask).sum().backward()
    assert (log_probs.grad[:3] == 0).all()
    assert (log_probs.grad[3:5] != 0).all()


def test_wrong_shapes_say_so() -> None:
    with pytest.raises(ValueError, match=r"dpo_loss: shapes differ: \(2,\), \(3,\)"):
        dpo_loss(torch.zeros(2), torch.zeros(3), torch.zeros(2), torch.zeros(2), 0.1)
    with pytest.raises(ValueError, match="whole groups of 4"):
        group_advantages(torch.zeros(6), 4)
    with pytest.raises(ValueError, match=r"kl is 0\.1, but there are no ref_log_probs"):
        grpo_loss(torch.zeros(2), torch.zeros(2), None, torch.zeros(2), torch.ones(2, dtype=torch.bool), kl=0.1)
