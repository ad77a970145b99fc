"""What of a step's rollouts is trained, with which advantage, and what dynamic sampling replaces."""

import math

import pytest
import torch

from mmsr.batch import (
    Batch,
    assign_advantages,
    before_failing,
    penalise_overlong,
    standard_deviation,
    zero_std_groups,
)
from mmsr.config import Config
from mmsr.episode import ANSWERED, LENGTH, TOOL_ERROR, Episode, Example, Observation, Turn

EXAMPLE = Example("1", b"", "which river ?", ("tagus",))
LIMIT = Observation(ok=False, source="limit")
FAILED = Observation(ok=False, error="timeout", source="live")
FOUND = Observation(source="live")


def group(*rewards: float, group_id: int = 0, status: str = ANSWERED) -> list[Episode]:
    return [
        Episode(EXAMPLE, group_id, i, [0] * 5, [0, 0, 1, 1, 1], status=status, reward=reward, prompt_length=2)
        for i, reward in enumerate(rewards)
    ]


def searching(*found: Observation, reward: float = 0.0) -> Episode:
    """A rollout with a search for each of these results, then an answer. Turns of 3 tokens each, after 2 of prompt."""
    episode = Episode(EXAMPLE, 0, 0, reward=reward, prompt_length=2, status=ANSWERED)
    for turn in range(2 * len(found) + 1):
        start = 2 + 3 * turn
        if turn % 2:
            episode.turns.append(Turn("tool", "", start, start + 3, "image_search", observation=found[turn // 2]))
        else:
            episode.turns.append(Turn("assistant", "", start, start + 3, "image_search"))
        episode.loss_mask += [1 - turn % 2] * 3
    episode.loss_mask = [0, 0, *episode.loss_mask]
    episode.input_ids = [0] * len(episode.loss_mask)
    return episode


def advantages(episodes, **options) -> list[float]:
    assign_advantages(episodes, Config(**{"group_eps": 0.0, **options}))
    return [episode.advantage for episode in episodes]


def test_the_batch_deviation_is_that_of_a_group():
    """TRL's scale_rewards="batch": centred in the group, divided by the deviation of all rewards of the batch."""
    rewards = [0.0, 1.0, 0.2, 0.4]
    made = [*group(*rewards[:2]), *group(*rewards[2:], group_id=1)]
    std = torch.tensor(rewards, dtype=torch.float64).std().item()
    want = [-0.5 / std, 0.5 / std, -0.1 / std, 0.1 / std]
    assert advantages(made, advantage="batch") == pytest.approx(want, abs=1e-12)
    assert advantages(made, advantage="none-std") == pytest.approx([-0.5, 0.5, -0.1, 0.1])
    root = math.sqrt(0.5)
    assert advantages(made) == pytest.approx([-root, root, -root, root]), "both groups weigh as much"


def test_group_batch_leaves_groups_without_preference_out_of_the_deviation():
    """Batch-normalised group advantages: the more groups say nothing, the more the others weigh."""
    made = [*group(0.0, 1.0), *group(0.5, 0.5, group_id=1)]
    plain = torch.tensor([-1, 1, 0, 0], dtype=torch.float64) * math.sqrt(0.5)
    want = (plain / plain.std()).tolist()
    assert advantages(made, advantage="group-batch") == pytest.approx(want)


def test_a_deviation_of_nothing_is_not_0():
    assert standard_deviation(torch.tensor([])) == standard_deviation(torch.tensor([2.0])) == 0


def test_a_truncated_rollout_is_trained_or_left_out_of_its_groups_mean():
    made = [*group(1.0, 0.0), *group(0.0, status=LENGTH)]
    assert assign_advantages(made, Config(mask_truncated=True)).spared == 1
    assert [episode.trained for episode in made] == [True, True, False]
    assert made[0].advantage == pytest.approx((2 / 3) / (math.sqrt(1 / 3) + 0.05))
    assert assign_advantages(made, Config()).spared == 0
    assert all(episode.trained for episode in made)
    equal = group(0.1, 0.1, status=LENGTH)
    assert assign_advantages(equal, Config(mask_truncated=True)) == (1, 0), "there was nothing to train of it"


def test_the_overlong_penalty_is_not_dapos():
    """Equation 13 of DAPO: from L_max − L_cache down to −1 at L_max."""
    config = Config(max_tokens=100, overlong_buffer=20, overlong_penalty=0.5)
    for tokens, paid in ((10, 0.0), (80, 0.0), (85, 0.125), (90, 0.25), (100, 0.5), (120, 0.5)):
        episode = Episode(EXAMPLE, 0, 0, [0] * tokens, reward=1.0)
        penalise_overlong([episode], config)
        assert (episode.reward, episode.reward_parts["overlong"]) == (pytest.approx(1 - paid), pytest.approx(paid))
    untouched = Episode(EXAMPLE, 0, 0, [0] * 100, reward=1.0)
    penalise_overlong([untouched], Config(max_tokens=100))
    assert untouched.reward == 1.0 and not untouched.reward_parts


@pytest.mark.parametrize(
    "found, trained_tokens",
    [
        ((FOUND, FAILED, FAILED), 3),  # the first turn stays; the second made the first of the failed calls
        ((FAILED, FOUND, FAILED), 12),  # not in a row
        ((FAILED, LIMIT, FAILED), 12),  # a refused call is not the tool's failure
        ((FOUND, FOUND, FAILED), 12),
        ((FAILED, FAILED, FOUND), 0),
    ],
)
def test_what_follows_a_failing_tool_is_held_against_the_model(found, trained_tokens):
    config = Config(fatal_errors=2)
    spoiled, better = searching(*found), searching(FOUND, reward=1.0)
    assigned = assign_advantages([spoiled, better], config)
    trained = [before_failing(episode, 2) for episode in (spoiled, better)]
    assert [sum(episode.loss_mask) for episode in trained] == [trained_tokens, 6]
    assert sum(spoiled.loss_mask) == 12, "what was sampled is still told"
    assert assigned.spared == (spoiled.advantage == 0) == (trained_tokens < 12)
    assert spoiled.advantage <= 0 < better.advantage
    assert all(before_failing(episode, 0) is episode for episode in (spoiled, better))


def test_a_spoiled_rollout_that_is_better_than_the_others_is_not_trained():
    spoiled, worse = searching(FOUND, FAILED, FAILED, reward=1.0), searching(FOUND)
    assign_advantages([spoiled, worse], Config(fatal_errors=2))
    assert spoiled.advantage > 0 and spoiled.trained and before_failing(spoiled, 2).loss_mask[2:5] == [1, 1, 1]


def test_groups_to_replace_are_others_than_those_with_nothing_to_prefer():
    failed = [*group(0.0, 1.0, group_id=5, status=TOOL_ERROR), *group(0.4, group_id=5)]
    made = [*group(0.0, 1.0), *group(0.1, 0.1, group_id=3), *failed]
    assert zero_std_groups(made, Config()) == {3}, "questions asked while a tool is down would fail too"
    assert zero_std_groups([], Config()) == set()


def test_a_replaced_group_stays_in_the_update_or_is_lost():
    batch = Batch()
    first = [*group(0.1, 0.1), *group(0.0, 1.0, group_id=1), *group(0.1, 0.1, group_id=2)]
    for episode in first:
        episode.images = [(0, "patches")]
    batch.add(first, {"sampled": 10}, 3)
    batch.remove([0, 2])
    assert {episode.group_id for episode in batch.episodes} == {1}
    batch.add([*group(0.1, 0.1), *group(1.0, 0.0, group_id=2)], {"sampled": 7}, 2)
    batch.remove([0])
    batch.add(group(1.0, 0.0), {"sampled": 2}, 1)
    assert batch.asked == 6 and batch.draws == 3 and batch.counts["sampled"] == 19
    assert sorted(episode.group_id for episode in batch.episodes) == [0, 0, 1, 1, 2, 2]
    assert sorted(episode.group_id for episode in batch.replaced) == [3, 3, 4, 4, 5, 5], "after the batch's own"
    assert not any(episode.trained or episode.images for episode in batch.replaced)
    assert all(episode.images for episode in batch.episodes if episode.group_id == 1), "the update reads them"
    assert len(batch.all) == 12
    assert assign_advantages(batch.episodes, Config()) == (0, 0)
