"""The rollouts of a step: which of them count, what is trained of them, and their advantages.

    the reward of a rollout that comes near its last token      penalise_overlong
    the groups in which there is nothing to prefer              zero_std_groups
    a new question takes the place of each of these             Batch.remove, Batch.add
    advantages (2), and which rollouts are trained              assign_advantages
    what of a rollout is trained whose tools failed             before_failing

The equations are those of grpo.py. A group is whole on one rank, so only what is divided by a standard deviation of the
whole batch (--advantage batch) needs the other ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Mapping, NamedTuple, Sequence

import torch
from torch import Tensor

from mmsr import grpo
from mmsr.config import Config
from mmsr.episode import LENGTH, TOOL_ERROR, UNJUDGED, Episode
from mmsr.system.parallel import SINGLE, Ranks


class Assigned(NamedTuple):
    """What `assign_advantages` counted on this rank."""

    zero_std_groups: int  # groups with nothing to prefer
    spared: (
        int  # rollouts of other groups that are not trained, or not all of them: out of tokens, or their tools failed
    )


@dataclass
class Batch:
    """The rollouts of a step. Those that dynamic sampling replaced are not trained, but they are counted and logged."""

    episodes: list[Episode] = field(default_factory=list)  # this rank's; a group's id is its place in the batch
    replaced: list[Episode] = field(default_factory=list)  # this rank's, whose groups had nothing to prefer
    counts: Counter[str] = field(default_factory=Counter)  # of tokens and images, over all ranks
    asked: int = 0  # questions, on all ranks
    draws: int = 0  # times that questions were asked
    zero_std_first: int = 0  # groups whose rewards were all equal, after the first draw, on all ranks
    assigned: Assigned | None = None
    short_of_budget: bool = False  # the paid calls did not do for another draw
    judge_error: str = ""  # one of the failures of the judge in the reward, on this rank

    @property
    def all(self) -> list[Episode]:
        return self.episodes + self.replaced

    def remove(self, places: Sequence[int]) -> None:
        """Make room for other groups in these places, on all ranks: those there get ids after the batch's own."""
        new_ids = {place: self.asked + i for i, place in enumerate(places)}
        kept = []
        for episode in self.episodes:
            if episode.group_id not in new_ids:
                kept.append(episode)
                continue
            episode.group_id = new_ids[episode.group_id]
            episode.trained = False
            episode.images = []  # patches, which only the update reads: many megabytes
            self.replaced.append(episode)
        self.episodes = kept

    def add(self, episodes: Sequence[Episode], counts: Mapping[str, float], questions: int) -> None:
        """Add this rank's new groups, with what all ranks computed for them and how many questions they all asked."""
        self.episodes += episodes
        self.counts.update(counts)
        self.asked += questions
        self.draws += 1


def penalise_overlong(episodes: Sequence[Episode], config: Config) -> None:
    """DAPO's soft penalty: take from the reward of those that --max-tokens cuts off, or nearly."""
    if not config.overlong_buffer:
        return
    for episode in episodes:
        share = grpo.overlong_penalty(len(episode.input_ids), config.max_tokens, config.overlong_buffer)
        episode.reward -= config.overlong_penalty * share
        episode.reward_parts["overlong"] = config.overlong_penalty * share


def zero_std_groups(episodes: Sequence[Episode], config: Config) -> set[int]:
    """The ids of this rank's groups whose rewards are all equal.

    A group in which failures left less than two rewards is none: other questions would meet the same failures.
    """
    rewards, group_ids, keep = _rewards(episodes)
    _, varied = grpo.group_advantages(rewards, group_ids, config.group_eps, keep)
    rewarded = Counter(group_ids[keep].tolist())  # rollouts by group
    return {group_id for group_id, n in rewarded.items() if n > 1} - set(group_ids[varied].tolist())


def assign_advantages(episodes: Sequence[Episode], config: Config, ranks: Ranks = SINGLE) -> Assigned:
    """Set every episode's `advantage` and whether it is `trained`.

    An episode that a failed tool ended takes no part, nor does one whose judge failed. One that ran out of tokens is
    compared, and with --mask-truncated it is not trained. With --fatal-errors one whose tools failed is compared, and
    is not made less likely. E is the number of episodes. Collective.
    """
    rewards, group_ids, keep = _rewards(episodes)  # (E,) each
    if config.algorithm == "sft":  # imitate what was right: demonstrations, or the model's own
        for episode, sound in zip(episodes, keep.tolist()):
            if config.imitates:
                episode.imitate()
            episode.advantage = 1.0
            episode.trained = sound and episode.reward_parts["accuracy"] == 1
        return Assigned(0, 0)
    by_group = config.advantage in ("group", "group-batch")
    advantages, varied = grpo.group_advantages(rewards, group_ids, config.group_eps, keep, by_group)  # (E,), (E,)
    if config.advantage == "batch":
        advantages = advantages / (standard_deviation(rewards[keep], ranks) + config.group_eps)
    if config.advantage == "group-batch":
        advantages = advantages / (standard_deviation(advantages[keep], ranks) + config.group_eps)

    spared = 0
    for i, episode in enumerate(episodes):
        truncated = config.mask_truncated and episode.status == LENGTH
        failed = fatal_token(episode, config.fatal_errors) is not None
        advantage = float(advantages[i])
        episode.advantage = max(advantage, 0.0) if failed else advantage
        takes_part = varied[i] if config.zero_std == "drop" else keep[i]
        episode.trained = bool(takes_part) and not truncated
        spared += bool(varied[i]) and (truncated or failed)
    zero_std = len(set(group_ids.tolist())) - len(set(group_ids[varied].tolist()))
    return Assigned(zero_std, spared)


def before_failing(episode: Episode, errors: int) -> Episode:
    """What is trained of an episode: after `errors` failed tool calls in a row only the turns before them.

    So a failure of the tools is held against nothing that the model said, and a good beginning is not lost. Returns the
    episode itself, or a copy with another mask: the episode tells what was sampled.
    """
    start = fatal_token(episode, errors)
    if start is None:
        return episode
    mask = episode.loss_mask[:start] + [0] * (len(episode.loss_mask) - start)
    return replace(episode, loss_mask=mask)


def fatal_token(episode: Episode, errors: int) -> int | None:
    """Where the turn begins that made the first of so many failed calls in a row; None if there were not so many.

    A call that was refused over its limit did not fail. 0 errors: never.
    """
    failed = 0
    for place, turn in enumerate(episode.turns):
        if turn.role != "tool":
            continue
        if not turn.failed:
            failed = 0
            continue
        if not failed:
            start = episode.turns[place - 1].start  # of the turn that made this call
        failed += 1
        if failed == errors:
            return start
    return None


def standard_deviation(values: Tensor, ranks: Ranks = SINGLE) -> float:
    """Of all ranks' values, unbiased; 0 for less than two. Collective."""
    total = ranks.sum({"n": len(values), "sum": float(values.sum())})
    n = total["n"]
    mean = total["sum"] / max(n, 1)
    squares = ranks.sum({"squares": float(((values - mean) ** 2).sum())})["squares"]
    return math.sqrt(squares / max(n - 1, 1))


def _rewards(episodes: Sequence[Episode]) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards (E,), group ids (E,), and whether each reward means something, (E,) bool."""
    sound = [episode.status != TOOL_ERROR and episode.judged != UNJUDGED for episode in episodes]
    rewards = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
    group_ids = torch.tensor([episode.group_id for episode in episodes], dtype=torch.long)
    return rewards, group_ids, torch.tensor(sound, dtype=torch.bool)
