"""Hand-worked numbers and finite differences for the equations of grpo.py."""

import math

import pytest
import torch

from mmsr.grpo import LossOptions, agreement, episode_weights, group_advantages, sequence_ratio, token_losses


def test_advantage_equals_the_hand_worked_one():
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.9, 0.1], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 0, 7, 7])
    advantages, varied = group_advantages(rewards, groups, eps=0.05)
    std = math.sqrt(4 * 0.25 / 3)  # unbiased
    want = [0.5 / (std + 0.05), -0.5 / (std + 0.05)]
    pair = 0.4 / (math.sqrt(0.32) + 0.05)
    torch.testing.assert_close(advantages, torch.tensor([want[0], want[1], want[1], want[0], pair, -pair]).double())
    assert varied.all()


def test_group_of_equal_rewards_has_no_advantage_and_no_nan():
    advantages, varied = group_advantages(torch.full((4,), 0.1), torch.tensor([0, 0, 1, 1]), eps=0.0)
    assert advantages.tolist() == [0, 0, 0, 0] and not varied.any()


def test_episode_left_out_changes_neither_mean_nor_std():
    groups = torch.tensor([0, 0, 0])
    keep = torch.tensor([True, True, False])
    with_failure, varied = group_advantages(torch.tensor([1.0, 0.0, -50.0]), groups, 1e-6, keep)
    without, _ = group_advantages(torch.tensor([1.0, 0.0]), groups[:2], 1e-6)
    assert with_failure.tolist() == [*without.tolist(), 0.0]
    assert varied.tolist() == [True, True, False]


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope",
    [
        (2.0, 1.0, -2.0, -2.0),
        (2.0, 1.5, -2.6, 0.0),  # clipped at 1 + .3
        (2.0, 0.5, -1.0, -1.0),  # below the range, but the minimum keeps the gradient
        (-2.0, 0.5, 1.6, 0.0),  # clipped at 1 − .2
        (-2.0, 1.5, 3.0, 3.0),
    ],
)
def test_surrogate_is_clipped_on_the_right_side_only(advantage, ratio, loss, slope):
    """`slope` is d loss / d log π = −A · ratio where the gradient lives."""
    logps = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    losses = token_losses(
        logps, torch.zeros(1).double(), torch.tensor([advantage]).double(), LossOptions(clip_high=0.3)
    )
    losses.loss.sum().backward()
    assert losses.loss.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(slope)
    assert bool(losses.clipped) == (slope == 0)


def test_k3_is_nonnegative_and_its_gradient_right():
    logps = torch.tensor([-1.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-1.5, -0.5, -0.1], dtype=torch.float64)
    zero = torch.zeros(3).double()
    losses = token_losses(logps, logps.detach(), zero, LossOptions(kl=0.5), ref)
    want = [math.exp(d) - d - 1 for d in (-0.5, 1.5, 0.0)]
    torch.testing.assert_close(losses.kl, torch.tensor(want).double())
    losses.loss.sum().backward()
    torch.testing.assert_close(logps.grad, 0.5 * (1 - (ref - logps.detach()).exp()))


@pytest.mark.parametrize("gap", [11.5, 60.0, 100.0, 1e9, -11.5, -1e9])
def test_one_token_that_the_reference_knows_far_better_makes_the_update_infinite(gap):
    logps = torch.tensor([-gap, -1.0] if gap > 0 else [0.0, -1.0], requires_grad=True)
    ref = torch.tensor([0.0, -1.5] if gap > 0 else [gap, -1.5])
    losses = token_losses(logps, logps.detach(), torch.zeros(2), LossOptions(kl=0.5), ref)
    losses.loss.sum().backward()
    assert losses.kl[0] == 10 and logps.grad[0] == 0, "official bounds; no pull, and 0 · inf is not 0"
    assert logps.grad[1] == pytest.approx(0.5 * (1 - math.exp(-0.5)))


def test_the_bounds_of_k3_change_the_bits_of_ordinary_values():
    gap = torch.linspace(-10, 2.5, 10_001)
    logps = torch.full_like(gap, -12.0).requires_grad_()
    ref = logps.detach() + gap
    losses = token_losses(logps, logps.detach(), torch.zeros_like(gap), LossOptions(kl=1.0), ref)
    losses.loss.sum().backward()
    plain = logps.detach().clone().requires_grad_()
    k3 = (ref - plain).exp() - (ref - plain) - 1
    k3.sum().backward()
    assert torch.equal(losses.kl, k3.detach()) and torch.equal(logps.grad, plain.grad)


@pytest.mark.parametrize("loss", ["grpo", "gspo"])
def test_gradient_equals_finite_differences(loss):
    torch.manual_seed(0)
    logps = torch.randn(50, dtype=torch.float64, requires_grad=True)
    old, ref, advantages = (torch.randn(50, dtype=torch.float64) for _ in range(3))
    importance = torch.rand(50, dtype=torch.float64)
    episodes = torch.arange(50) % 6
    options = LossOptions(loss, kl=0.1, clip_high=0.3)
    assert torch.autograd.gradcheck(
        lambda x: token_losses(x, old, advantages, options, ref, importance, episodes).loss, (logps,)
    )


# ---- the other losses

EPISODES = torch.tensor([0, 0, 2, 2, 2])  # whose token each is; episode 1 is in another micro-batch


def test_a_sequence_ratio_is_no_geometric_mean_of_its_own_tokens():
    logps = torch.tensor([0.1, 0.3, -0.2, 0.0, 0.5])
    ratio = sequence_ratio(logps, torch.zeros(5), EPISODES)
    torch.testing.assert_close(ratio, torch.tensor([0.2, 0.2, 0.1, 0.1, 0.1]).exp())


def test_gspo_is_another_than_one_clipped_term_for_each_rollout():
    """The paper's objective, a term for each rollout, written out: mean over rollouts of min(s A, clip(s) A)."""
    torch.manual_seed(1)
    logps = (0.3 * torch.randn(5, dtype=torch.float64)).requires_grad_()
    old = 0.3 * torch.randn(5, dtype=torch.float64)
    advantage = {0: 1.5, 2: -0.5}
    plain = logps.detach().clone().requires_grad_()
    terms = []
    for episode, a in advantage.items():
        ratio = (plain - old)[EPISODES == episode].mean().exp()
        terms.append(-torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a))
    (sum(terms) / 2).backward()
    per_token = torch.tensor([advantage[int(i)] for i in EPISODES], dtype=torch.float64)
    found = token_losses(logps, old, per_token, LossOptions("gspo"), episode_index=EPISODES)
    weights = torch.tensor(episode_weights([2, 3], "sequence", 2, 5), dtype=torch.float64)[EPISODES // 2]
    total = (found.loss * weights).sum()
    total.backward()
    assert total.item() == pytest.approx(sum(terms).item() / 2)
    torch.testing.assert_close(logps.grad, plain.grad)


def test_gspo_clips_single_tokens():
    logps = torch.tensor([0.9, 0.1, 0.0, 0.0, 0.0], requires_grad=True)  # the mean of the first two is .5
    found = token_losses(logps, torch.zeros(5), torch.ones(5), LossOptions("gspo"), episode_index=EPISODES)
    found.loss.sum().backward()
    assert found.clipped.tolist() == [True, True, False, False, False]
    assert logps.grad.tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("advantage", [2.0, -2.0])
def test_cispo_stops_the_gradient_of_a_token_or_lets_the_weight_have_one(advantage):
    ratios = torch.tensor([0.05, 1.0, 3.0, 9.0], dtype=torch.float64)
    logps = ratios.log().requires_grad_()
    options = LossOptions("cispo", clip_low=1.0, clip_high=4.0)
    found = token_losses(logps, torch.zeros(4).double(), torch.full((4,), advantage).double(), options)
    found.loss.sum().backward()
    torch.testing.assert_close(logps.grad, -advantage * torch.tensor([0.05, 1.0, 3.0, 5.0]).double())
    torch.testing.assert_close(found.loss, logps.grad * logps)
    assert found.clipped.tolist() == [False, False, False, True]


def test_all_losses_but_their_weights_have_one_gradient_where_the_ratio_is_1():
    for loss in ("grpo", "dr_grpo", "gspo", "cispo"):
        logps = torch.tensor([-1.0, -2.0, -0.5, -0.1, -3.0], requires_grad=True)
        advantages = torch.tensor([1.0, 1.0, -0.5, -0.5, -0.5])
        found = token_losses(logps, logps.detach(), advantages, LossOptions(loss), episode_index=EPISODES)
        weights = torch.tensor([0.25, 0.25, *[1 / 6] * 3])  # the gradient of a mean is spread over its tokens
        (found.loss * weights).sum().backward()
        torch.testing.assert_close(logps.grad, -advantages * weights)


def test_dr_grpo_divides_by_the_deviation_or_by_the_length():
    advantages, varied = group_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.zeros(4), 0.05, divide=False)
    assert advantages.tolist() == [0.75, -0.25, -0.25, -0.25] and varied.all()
    assert episode_weights([4, 1, 5], "constant", 3, 10, token_limit=50) == [1 / 150] * 3


def test_a_rollout_on_which_sampler_and_trainer_disagree_is_told_by_single_tokens():
    old = torch.tensor([0.4, 0.4, 1.0, -1.0, 0.1])
    assert agreement(old, torch.zeros(5), EPISODES, bound=2.0).tolist() == [0, 0, 1, 1, 1]
    assert agreement(-old, torch.zeros(5), EPISODES, bound=2.0).tolist() == [0, 0, 1, 1, 1], "either way"
    assert agreement(old, torch.zeros(5), EPISODES, bound=2.3).tolist() == [1] * 5


def test_weights_are_the_two_means():
    lengths = [4, 1, 5]
    assert episode_weights(lengths, "token", 3, 10) == [0.1] * 3
    assert episode_weights(lengths, "sequence", 3, 10) == pytest.approx([1 / 12, 1 / 3, 1 / 15])
    for norm in ("token", "sequence"):
        assert sum(w * n for w, n in zip(episode_weights(lengths, norm, 3, 10), lengths)) == pytest.approx(1)
