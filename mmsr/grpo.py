"""Group Relative Policy Optimisation as pure functions of tensors.

For G rollouts o_1 … o_G of one question with rewards R_i, token t of rollout i has the loss

    l_it = − min(ρ_it A_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) A_i) + β k3_it                                (1)
    A_i  = (R_i − mean(R)) / (std(R) + ε)                                                                  (2)
    ρ_it = π(o_it) / π_old(o_it),    k3_it = min(e^d − d − 1, 10),    d = log(π_ref/π) within [−20, 20]    (3)

and the loss of one optimizer update is Σ_it w_it l_it over the tokens that the model sampled itself, where the weights

    sequence:  w_it = 1 / (number of rollouts · tokens of rollout i)    token:  w_it = 1 / (tokens of all rollouts)  (4)

are fixed for the whole update before the first micro-batch runs, so the gradient does not depend on how the update is
cut into micro-batches. A rollout without such tokens does not count.

The functions below are (2) `group_advantages`, (4) `episode_weights`, and (1) with (3) `token_losses`. Supervised
fine-tuning replaces l_it by −log π(o_it): `likelihood_losses`. Where this departs from the paper and the official code,
and why: docs/algorithm.md.

Shape letters: E rollouts (`episodes`), G of one group, R trained tokens.
"""

from __future__ import annotations

from typing import NamedTuple, Sequence

import torch
from torch import Tensor

MOST_GAP = 20.0  # bound of |d|; e^20 is far from infinite in fp32, and its square too
MOST_K3 = 10.0


def group_advantages(
    rewards: Tensor, group_ids: Tensor, eps: float, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Equation (2): A_i = (R_i − mean(R)) / (std(R) + eps) within each group.

    `rewards` (E,), `group_ids` (E,), `keep` (E,) bool. Episodes that are not kept, such as those that a tool's failure
    ended, count in no mean or std; their A is 0. Returns advantages (E,) and `varied` (E,) bool: kept, in a group whose
    kept rewards are not all equal. Elsewhere A is 0: there is nothing to prefer.
    """
    if keep is None:
        keep = torch.ones_like(rewards, dtype=torch.bool)  # (E,)
    advantages = torch.zeros_like(rewards)  # (E,)
    varied = torch.zeros_like(keep)  # (E,)
    for group_id in group_ids.unique():
        members = (group_ids == group_id) & keep  # (E,)
        if members.sum() < 2:
            continue
        group_rewards = rewards[members]  # (G,), fewer where some are not kept
        # A reward that is NaN is not equal to itself: it goes into the advantages, and the update refuses those.
        if group_rewards.max() == group_rewards.min():
            continue
        mean = group_rewards.mean()
        std = group_rewards.std()  # unbiased
        advantages[members] = (group_rewards - mean) / (std + eps)
        varied |= members
    return advantages, varied


def episode_weights(trained_tokens: Sequence[int], norm: str, episodes: int, tokens: int) -> list[float]:
    """Equation (4): the weight w_it of each token of some episodes, one number per episode.

    `trained_tokens` has the number of trained tokens of each of them. `episodes` and `tokens` count the whole update:
    all micro-batches of all ranks. `norm` is "sequence" or "token".
    """
    if norm == "token":
        return [1.0 / max(tokens, 1)] * len(trained_tokens)
    return [1.0 / (episodes * max(n, 1)) for n in trained_tokens]


class Losses(NamedTuple):
    """Per-token values (R,) of one pass: the loss of (1), and detached statistics."""

    loss: Tensor
    kl: Tensor  # k3
    clipped: Tensor  # bool: the clip of (1) is active and stops the gradient


def token_losses(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    ref_logps: Tensor | None = None,
    kl: float = 0.0,
    importance: Tensor | None = None,
) -> Losses:
    """Equations (1) and (3). Every tensor is (R,), advantages repeated per token; only `logps` carries a gradient.

    `kl` is β. `ref_logps` None means no reference and β = 0. `importance` (R,) multiplies the policy term.
    """
    # The policy term of (1): min(ρ A, clip(ρ) A).
    ratio = (logps - old_logps).exp()  # (R,) ρ of (3)
    unclipped = ratio * advantages  # (R,)
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages  # (R,)
    surrogate = torch.minimum(unclipped, bounded)  # (R,)
    clipped = surrogate.detach() < unclipped.detach()  # (R,) bool
    if importance is not None:
        surrogate = surrogate * importance
    if ref_logps is None:
        no_kl = torch.zeros_like(logps.detach())  # (R,)
        return Losses(-surrogate, no_kl, clipped)

    # The KL term: k3 of (3). A value out of bounds has no gradient. The inner bound is what keeps that gradient 0:
    # without it 0 · exp(∞) would be NaN.
    gap = (ref_logps - logps).clamp(-MOST_GAP, MOST_GAP)  # (R,) d of (3)
    k3 = (gap.exp() - gap - 1).clamp(max=MOST_K3)  # (R,)
    return Losses(-surrogate + kl * k3, k3.detach(), clipped)


def likelihood_losses(logps: Tensor) -> Losses:
    """Supervised fine-tuning: the negative log-likelihood of each token. `logps` (R,)."""
    zeros = torch.zeros_like(logps.detach())  # (R,)
    return Losses(-logps, zeros, zeros.bool())


def importance_weights(old_logps: Tensor, sampled_logps: Tensor, cap: float) -> Tensor:
    """min(π_old / π_sampled, cap), (R,): the correction for what sampler and trainer compute differently."""
    return (old_logps - sampled_logps).exp().clamp(max=cap)
