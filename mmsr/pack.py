"""Episodes → micro-batches in which the prompt that a group shares is stored once.

A pack is one long sequence without padding. Each group contributes its prompt, then the completions of its rollouts. A
completion is all that follows the prompt, model turns and tool results alike. Here p and q are prompts, a, b and c
completions:

    input_ids   p0 p1 p2 | a0 a1 | b0 | q0 q1 | c0 c1
    predicts          a0 | a1 a2 | b1 |    c0 | c1 c2
                      b0

The last hidden state of the prompt predicts the first token of every completion, and each token of a completion
predicts the next. The last trained token (a2, b1, c2) is predicted but is no input. Log-probabilities are computed at
the positions that predict a trained token, and nowhere else. Attention lets a completion see its own group's prompt and
itself (`attention.SharedPrefix`).

The plain form is `add_gradient` in examples/plain_grpo.py, which sends the prompt through the model once for every
rollout of a group.

Shape letters: N packed tokens, R trained tokens, M image tokens, T tokens of one episode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from mmsr.attention import SharedPrefix
from mmsr.episode import Episode
from mmsr.model import mrope_positions
from mmsr.vision import Image


@dataclass
class Pack:
    """One micro-batch. The hidden state at `logits_index[r]` predicts `targets[r]`."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (3, N)
    attention_fn: SharedPrefix
    images: list[Image]  # in packed order; one twice where two groups, or two rollouts' results, have it
    image_index: Tensor  # (M,) packed positions of their placeholders
    logits_index: Tensor  # (R,) packed positions
    targets: Tensor  # (R,) token ids
    sampled_logps: Tensor  # (R,) log-probabilities as recorded while sampling
    episode_index: Tensor  # (R,) the episode of the update that each trained token belongs to


# ---- which episodes go together


def input_length(episode: Episode) -> int:
    """Number of tokens that the model has to see: all before the last trained one, which is only predicted."""
    for t in range(len(episode.loss_mask) - 1, -1, -1):
        if episode.loss_mask[t]:
            return t
    return 0


def unique_tokens(episodes: Sequence[Episode]) -> int:
    """Tokens that a pass over these episodes has to see when nothing is computed twice: prompts once per group."""
    prompt_lengths: dict[int, int] = {}  # by group
    completions = 0
    for episode in episodes:
        if any(episode.loss_mask):
            prompt_lengths[episode.group_id] = episode.prompt_length
            completions += input_length(episode) - episode.prompt_length
    return sum(prompt_lengths.values()) + completions


def split_into_micro_batches(episodes: Sequence[Episode], budget: int) -> list[list[int]]:
    """Indices of `episodes` per micro-batch of at most `budget` packed tokens, groups kept together.

    A group that does not fit into the last micro-batch as a whole starts a new one. Only a group larger than the budget
    is split, and each part repeats its prompt. An episode larger than the budget is a micro-batch by itself. Episodes
    without trained tokens are left out.
    """
    groups: dict[int, list[int]] = {}
    for i, episode in enumerate(episodes):
        if any(episode.loss_mask):
            groups.setdefault(episode.group_id, []).append(i)

    micro_batches: list[list[int]] = []
    room = 0  # tokens that the last micro-batch can still take
    for group_id in sorted(groups):
        group = groups[group_id]
        prompt_length = episodes[group[0]].prompt_length
        completion_lengths = [input_length(episodes[i]) - prompt_length for i in group]
        group_length = prompt_length + sum(completion_lengths)
        if group_length <= room:
            micro_batches[-1] += group
            room -= group_length
            continue
        micro_batches.append([])
        room = budget - prompt_length
        for i, completion_length in zip(group, completion_lengths):
            if micro_batches[-1] and completion_length > room:
                micro_batches.append([])
                room = budget - prompt_length
            micro_batches[-1].append(i)
            room -= completion_length
    return micro_batches


# ---- one pack


def pack(episodes: Sequence[Episode], indices: Sequence[int], device) -> Pack:
    """Lay out `episodes[i] for i in indices` as one packed sequence. Episodes of a group are adjacent in `indices`."""
    builder = _Builder()
    for i in indices:
        builder.add(episodes[i], i)
    return builder.finish(device)


class _Builder:
    """The lists that become a `Pack`."""

    def __init__(self):
        self.input_ids: list[int] = []
        self.position_ids: list[Tensor] = []  # (3, n) each
        self.groups: list[tuple[int, list[int]]] = []  # (prompt length, completion lengths)
        self.images: list[Image] = []
        self.image_index: list[Tensor] = []
        self.logits_index: list[int] = []
        self.targets: list[int] = []
        self.sampled_logps: list[float] = []
        self.episode_index: list[int] = []
        self.group_id: int | None = None  # of the last prompt
        self.prompt_end = 0  # packed position after the last prompt

    def add(self, episode: Episode, index: int) -> None:
        """Append an episode's completion, and before it its prompt where a new group starts."""
        prompt_length = episode.prompt_length
        end = input_length(episode)
        image_spans = [(offset, image.grid) for offset, image in episode.images]
        positions, _ = mrope_positions(len(episode.input_ids), image_spans)  # (3, T)

        if episode.group_id != self.group_id:
            self.group_id = episode.group_id
            self.groups.append((prompt_length, []))
            self._append(episode, positions, 0, prompt_length)
            self.prompt_end = len(self.input_ids)

        completion_start = len(self.input_ids)
        if end > prompt_length:  # else only its first token is trained, which the prompt predicts
            _, completion_lengths = self.groups[-1]
            completion_lengths.append(end - prompt_length)
            self._append(episode, positions, prompt_length, end)

        for t in range(prompt_length, end + 1):
            if not episode.loss_mask[t]:
                continue
            if t == prompt_length:
                predicted_at = self.prompt_end - 1
            else:
                predicted_at = completion_start + (t - prompt_length) - 1
            self.logits_index.append(predicted_at)
            self.targets.append(episode.input_ids[t])
            self.sampled_logps.append(episode.logps[t])
            self.episode_index.append(index)

    def _append(self, episode: Episode, positions: Tensor, start: int, end: int) -> None:
        """Append the episode's tokens [start, end), with their positions (3, T) and images."""
        shift = len(self.input_ids) - start  # from a place in the episode to one in the pack
        self.input_ids += episode.input_ids[start:end]
        self.position_ids.append(positions[:, start:end])
        for offset, image in episode.images:
            if start <= offset < end:
                first = shift + offset
                self.images.append(image)
                self.image_index.append(torch.arange(first, first + image.tokens))

    def finish(self, device) -> Pack:
        image_index = self.image_index or [torch.empty(0, dtype=torch.long)]
        return Pack(
            input_ids=torch.tensor(self.input_ids, device=device),
            position_ids=torch.cat(self.position_ids, 1).to(device),
            attention_fn=SharedPrefix(self.groups, device),
            images=self.images,
            image_index=torch.cat(image_index).to(device),
            logits_index=torch.tensor(self.logits_index, device=device),
            targets=torch.tensor(self.targets, device=device),
            sampled_logps=torch.tensor(self.sampled_logps, device=device, dtype=torch.float32),
            episode_index=torch.tensor(self.episode_index, device=device),
        )
