"""Losses of alignment: preferences (DPO, mDPO) and verifiable rewards (GRPO), as functions of log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

LARGEST_LOG_RATIO = 20.0  # e^20; beyond it a ratio is cut and has no gradient, so that 0 * inf never makes a NaN


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, reference_chosen: Tensor, reference_rejected: Tensor, beta: float
) -> Tensor:
    """Prefer one answer over another: -log sigmoid(beta * ((pc - rc) - (pr - rr))).

    With the same answer beside another image as the rejected side this is mDPO's conditional term (arXiv 2406.11839),
    which a model that ignores images cannot lower.

    Args:
        policy_chosen, policy_rejected: (P,) log pi(y | x) of the model that learns, summed over the answer's tokens.
        reference_chosen, reference_rejected: (P,) the same of the model that it started from.
        beta: how strongly the reference holds; a reward is beta * (policy - reference).

    Returns:
        (P,) losses; log 2 where the policy is the reference.

    Raises:
        ValueError: the four shapes differ.

    Source: Rafailov et al., arXiv 2305.18290, eq. 7.
    """
    _same("dpo_loss", policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    margin = (policy_chosen - reference_chosen) - (policy_rejected - reference_rejected)
    return -logsigmoid(beta * margin)


def anchor_loss(policy_chosen: Tensor, reference_chosen: Tensor, beta: float, anchor: float = 0.0) -> Tensor:
    """Hold the reward of the chosen answer above an anchor: -log sigmoid(beta * (pc - rc) - anchor).

    DPO alone lowers the probability of both answers as long as the rejected one's falls faster.

    Args:
        policy_chosen, reference_chosen: (P,) log pi(y | x).
        beta: as `dpo_loss`.
        anchor: the reward to exceed.

    Returns:
        (P,) losses.

    Raises:
        ValueError: the shapes differ.

    Source: Wang et al., mDPO, arXiv 2406.11839 (anchored preference).
    """
    _same("anchor_loss", policy_chosen, reference_chosen)
    return -logsigmoid(beta * (policy_chosen - reference_chosen) - anchor)


def group_advantages(rewards: Tensor, group_size: int, *, standardise: bool = False) -> Tensor:
    """Judge each answer against the others to its prompt: reward - mean of the group.

    Args:
        rewards: (N,), the `group_size` answers to a prompt side by side.
        group_size: G, at least 2.
        standardise: divide by the group's standard deviation (plus 1e-4), as GRPO was published (arXiv 2402.03300).
            The default does not: dividing weighs prompts that are almost always or almost never answered right above
            the others (Dr. GRPO, arXiv 2503.20783).

    Returns:
        (N,) advantages; exactly 0 throughout a group of equal rewards.

    Raises:
        ValueError: fewer than two answers to a prompt, or rewards that are no whole groups.
    """
    if group_size < 2 or rewards.dim() != 1 or len(rewards) % group_size:
        raise ValueError(
            f"group_advantages: rewards {tuple(rewards.shape)} must be whole groups of {group_size}, at least 2 each"
        )
    groups = rewards.reshape(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if standardise:
        centred = centred / (groups.std(1, keepdim=True) + 1e-4)
    equal = groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True)  # their mean need not round to them
    return centred.masked_fill(equal, 0.0).reshape(-1)


def grpo_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    ref_log_probs: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    kl: float = 0.0,
) -> Tensor:
    """Raise the probability of tokens with an advantage, within a clipped ratio, near a reference.

    A token's loss is -min(r A, clamp(r, 1 - clip, 1 + clip) A) + kl * (e^d - d - 1), with r = exp(log_prob - old) and
    d = ref - log_prob (Schulman's unbiased estimator of the KL divergence, never negative).

    Args:
        log_probs: (N,) of each sampled token under the model that learns.
        old_log_probs: (N,) under the model that sampled them; no gradient.
        ref_log_probs: (N,) under the reference; None where `kl` is 0.
        advantages: (N,) of the answer that each token belongs to.
        mask: (N,) bool; what is False counts nothing, whatever its values are.
        clip: half width of the ratio's interval around 1.
        kl: weight of the divergence.

    Returns:
        (N,) losses, 0 where masked. Their mean over an answer's own length favours short right answers and long wrong
        ones; divide sums by a constant instead (Dr. GRPO, arXiv 2503.20783).

    Raises:
        ValueError: shapes differ, or `kl` without a reference.

    Source: Shao et al., DeepSeekMath, arXiv 2402.03300, eq. 3 and 4.
    """
    _same("grpo_loss", log_probs, old_log_probs, advantages, mask)
    change = (log_probs - old_log_probs.detach()).masked_fill(~mask, 0.0)
    ratio = change.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO).exp()
    weight = advantages.detach().masked_fill(~mask, 0.0)
    loss = -torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight)
    if kl:
        if ref_log_probs is None:
            raise ValueError(f"grpo_loss: kl is {kl}, but there are no ref_log_probs; give them, or kl=0")
        _same("grpo_loss", log_probs, ref_log_probs)
        apart = (ref_log_probs.detach() - log_probs).masked_fill(~mask, 0.0)
        apart = apart.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
        loss = loss + kl * (apart.exp() - apart - 1)
    return loss


def _same(name: str, *tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors}) > 1:
        raise ValueError(f"{name}: shapes differ: {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}")
