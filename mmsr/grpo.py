"""Group Relative Policy Optimisation, and the losses that people compare with it, as pure functions of tensors.

For G rollouts o_1 … o_G of one question with rewards R_i, token t of rollout i has the loss

    l_it = − min(ρ_it A_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) A_i) + β k3_it                                (1)
    A_i  = (R_i − mean(R)) / (std(R) + ε)                                                                  (2)
    ρ_it = π(o_it) / π_old(o_it),    k3_it = min(e^d − d − 1, 10),    d = log(π_ref/π) within [−20, 20]    (3)

and the loss of one optimizer update is Σ_it w_it l_it over the tokens that the model sampled itself, where the weights

    sequence:  w_it = 1 / (number of rollouts · tokens of rollout i)    token:  w_it = 1 / (tokens of all rollouts)  (4)
    constant:  w_it = 1 / (number of rollouts · tokens that a rollout may have)

are fixed for the whole update before the first micro-batch runs, so the gradient does not depend on how the update is
cut into micro-batches. A rollout without such tokens does not count.

The functions below are (2) `group_advantages`, (4) `episode_weights`, and (1) with (3) `token_losses`. Supervised
fine-tuning replaces l_it by −log π(o_it): `likelihood_losses`. The other losses change one or two of these equations:

    dr_grpo   (2) without the division, and (4) constant
    gspo      (3) ρ_it = (Π_t π(o_it) / π_old(o_it))^(1/n_i), one ratio for the n_i tokens of a rollout
    cispo     (1) the policy term is − c_it A_i log π(o_it), where c_it is the clipped ratio, without a gradient

Where this departs from the papers and the official code, and why: docs/algorithm.md.

Shape letters: E rollouts (`episodes`), G of one group, R trained tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Sequence

import torch
from torch import Tensor

MOST_GAP = 20.0  # bound of |d|; e^20 is far from infinite in fp32, and its square too
MOST_K3 = 10.0


# ---- (2) advantages


def group_advantages(
    rewards: Tensor,
    group_ids: Tensor,
    eps: float,
    keep: Tensor | None = None,
    divide: bool = True,
) -> tuple[Tensor, Tensor]:
    """Equation (2): A_i = (R_i − mean(R)) / (std(R) + eps) within each group; without `divide`, R_i − mean(R).

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
        centred = group_rewards - group_rewards.mean()  # (G,)
        std = group_rewards.std()  # unbiased
        advantages[members] = centred / (std + eps) if divide else centred
        varied |= members
    return advantages, varied


def overlong_penalty(tokens: int, limit: int, buffer: int) -> float:
    """DAPO's soft penalty of a rollout of so many tokens: 0 up to `limit − buffer`, then linear to 1 at `limit`."""
    over = tokens - (limit - buffer)
    return min(max(over / buffer, 0.0), 1.0)


# ---- (4) weights


def episode_weights(
    trained_tokens: Sequence[int], norm: str, episodes: int, tokens: int, token_limit: int = 0
) -> list[float]:
    """Equation (4): the weight w_it of each token of some episodes, one number per episode.

    `trained_tokens` has the number of trained tokens of each of them. `episodes` and `tokens` count the whole update:
    all micro-batches of all ranks. `norm` is "sequence", "token" or "constant"; that divides by `token_limit`.
    """
    if norm == "token":
        return [1.0 / max(tokens, 1)] * len(trained_tokens)
    if norm == "constant":
        return [1.0 / (episodes * token_limit)] * len(trained_tokens)
    return [1.0 / (episodes * max(n, 1)) for n in trained_tokens]


# ---- (1) and (3) losses


@dataclass(frozen=True)
class LossOptions:
    """What the loss of an update is made of, as config.py has it."""

    loss: str = "grpo"
    kl: float = 0.0  # β
    clip_low: float = 0.2  # ε_low
    clip_high: float = 0.2  # ε_high
    loss_norm: str = "sequence"
    token_limit: int = 0  # tokens that a rollout may have, for the constant norm
    importance_cap: float = 0.0  # of `importance_weights`; 0: none
    importance_bound: float = 0.0  # of `agreement`; 0: none


class Losses(NamedTuple):
    """Per-token values (R,) of one pass: the loss of (1), and detached statistics."""

    loss: Tensor
    kl: Tensor  # k3
    clipped: Tensor  # bool: the clip is active; in (1) it stops the gradient


def token_losses(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    options: LossOptions = LossOptions(),
    ref_logps: Tensor | None = None,
    importance: Tensor | None = None,
    episode_index: Tensor | None = None,
) -> Losses:
    """Equations (1) and (3). Every tensor is (R,), advantages repeated per token; only `logps` carries a gradient.

    `ref_logps` None means no reference and β = 0. `importance` multiplies the policy term. `episode_index` says whose
    token each is, which only gspo asks.
    """
    if options.loss == "gspo":
        ratio = sequence_ratio(logps, old_logps, episode_index)  # (R,)
    else:
        ratio = (logps - old_logps).exp()  # (R,) ρ of (3)
    clip = (1 - options.clip_low, 1 + options.clip_high)
    if options.loss == "cispo":
        surrogate, clipped = weighted_likelihood(logps, ratio, advantages, clip)  # (R,), (R,)
    else:
        surrogate, clipped = clipped_surrogate(ratio, advantages, clip)  # (R,), (R,)
    if importance is not None:
        surrogate = surrogate * importance
    if ref_logps is None:
        no_kl = torch.zeros_like(logps.detach())  # (R,)
        return Losses(-surrogate, no_kl, clipped)

    # The KL term: k3 of (3). A value out of bounds has no gradient. The inner bound is what keeps that gradient 0:
    # without it 0 · exp(∞) would be NaN.
    gap = (ref_logps - logps).clamp(-MOST_GAP, MOST_GAP)  # (R,) d of (3)
    k3 = (gap.exp() - gap - 1).clamp(max=MOST_K3)  # (R,)
    return Losses(-surrogate + options.kl * k3, k3.detach(), clipped)


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The policy term of (1), min(ρ A, clip(ρ) A), and where the clip stops its gradient. All (R,)."""
    unclipped = ratio * advantages  # (R,)
    bounded = ratio.clamp(*clip) * advantages  # (R,)
    surrogate = torch.minimum(unclipped, bounded)  # (R,)
    return surrogate, surrogate.detach() < unclipped.detach()


def sequence_ratio(logps: Tensor, old_logps: Tensor, episode_index: Tensor) -> Tensor:
    """GSPO's ρ, the same for all tokens of a rollout: exp of the mean of log(π/π_old) over them. All (R,)."""
    return episode_means(logps - old_logps, episode_index).exp()


def weighted_likelihood(
    logps: Tensor, ratio: Tensor, advantages: Tensor, clip: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """CISPO's policy term c A log π, and where the weight c is a clipped ratio. All (R,).

    The gradient is c A ∇log π: a clipped token has a smaller weight, where in (1) it would have none.
    """
    weight = ratio.detach().clamp(*clip)  # (R,) c
    return weight * advantages * logps, weight != ratio.detach()


def likelihood_losses(logps: Tensor) -> Losses:
    """Supervised fine-tuning: the negative log-likelihood of each token. `logps` (R,)."""
    zeros = torch.zeros_like(logps.detach())  # (R,)
    return Losses(-logps, zeros, zeros.bool())


# ---- what sampler and trainer compute differently


def importance_weights(old_logps: Tensor, sampled_logps: Tensor, cap: float) -> Tensor:
    """min(π_old / π_sampled, cap), (R,): the correction for what sampler and trainer compute differently."""
    return (old_logps - sampled_logps).exp().clamp(max=cap)


def agreement(old_logps: Tensor, sampled_logps: Tensor, episode_index: Tensor, bound: float) -> Tensor:
    """1 for the tokens of rollouts for which Π_t π_old / π_sampled is within [1/bound, bound], 0 for others. (R,)."""
    gaps = episode_sums(old_logps - sampled_logps, episode_index)  # (R,)
    return (gaps.abs() <= math.log(bound)).to(old_logps.dtype)


# ---- over the tokens of a rollout


def episode_sums(values: Tensor, episode_index: Tensor) -> Tensor:
    """For each token the sum of `values` over the tokens of its rollout. All (R,)."""
    sums = values.new_zeros(int(episode_index.max()) + 1)  # by episode
    return sums.index_add(0, episode_index, values)[episode_index]


def episode_means(values: Tensor, episode_index: Tensor) -> Tensor:
    """For each token the mean of `values` over the tokens of its rollout. All (R,)."""
    return episode_sums(values, episode_index) / episode_sums(torch.ones_like(values), episode_index)
