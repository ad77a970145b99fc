"""Episodes → training batches in which a group's shared prompt stands once.

A pack lays groups out as [prompt, member, member, …, prompt, member, …] along one token axis without padding. Hidden
states are read only where a sampled token is predicted. Shape letters: N packed tokens, R trained tokens, M image
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from mmsr.attention import SharedPrefix
from mmsr.episode import Episode
from mmsr.model import mrope_positions


@dataclass
class Pack:
    """One micro-batch. `logits_index[r]` is the packed position whose hidden state predicts `targets[r]`."""

    input_ids: Tensor  # (N,)
    position_ids: Tensor  # (3, N)
    attention_fn: SharedPrefix
    images: list  # vision.Image, one per placeholder run, in packed order
    image_index: Tensor  # (M,) packed positions of their placeholders
    logits_index: Tensor  # (R,)
    targets: Tensor  # (R,)
    sampled_logps: Tensor  # (R,) as recorded while sampling
    episode_index: Tensor  # (R,) which episode of the update a trained token belongs to


def input_length(episode: Episode) -> int:
    """Number of leading tokens that a forward pass must see: the last trained token is predicted, not fed."""
    for t in range(len(episode.loss_mask) - 1, -1, -1):
        if episode.loss_mask[t]:
            return t
    return 0


def unique_tokens(episodes: Sequence[Episode]) -> int:
    """Tokens that a pass over these episodes has to see when nothing is computed twice: prompts once per group."""
    trained = [episode for episode in episodes if any(episode.loss_mask)]
    prompts = {episode.group_id: episode.prompt_length for episode in trained}
    return sum(prompts.values()) + sum(input_length(e) - e.prompt_length for e in trained)


def split_into_micro_batches(episodes: Sequence[Episode], budget: int) -> list[list[int]]:
    """Indices of `episodes` per micro-batch of at most `budget` packed tokens, groups kept together.

    A group begins a micro-batch where it does not fit into the last one whole; only one larger than the budget is
    split, and its prompt stands once per part. An episode larger than the budget is a micro-batch of its own. Episodes
    without trained tokens are left out.
    """
    groups: dict[int, list[int]] = {}
    for i, episode in enumerate(episodes):
        if any(episode.loss_mask):
            groups.setdefault(episode.group_id, []).append(i)
    batches: list[list[int]] = []
    room = 0  # in the last of them
    for _, members in sorted(groups.items()):
        prompt = episodes[members[0]].prompt_length
        suffixes = [input_length(episodes[i]) - prompt for i in members]
        stands = prompt + sum(suffixes) <= room
        if stands:
            room -= prompt
        for i, suffix in zip(members, suffixes):
            if not stands or suffix > room:
                batches.append([])
                room, stands = budget - prompt, True
            batches[-1].append(i)
            room -= suffix
    return batches


def pack(episodes: Sequence[Episode], indices: Sequence[int], device) -> Pack:
    """Lay out `episodes[i] for i in indices` as one packed sequence. Members of a group are adjacent."""
    build = _Builder()
    for i in indices:
        build.add(episodes[i], i)
    return build.finish(device)


class _Builder:
    def __init__(self):
        self.ids: list[int] = []
        self.positions: list[Tensor] = []
        self.groups: list[tuple[int, list[int]]] = []
        self.images, self.image_index = [], []
        self.rows, self.targets, self.logps, self.owner = [], [], [], []
        self.group_id = None
        self.prompt_end = 0  # packed position after the current prompt

    def add(self, episode: Episode, index: int) -> None:
        prompt, end = episode.prompt_length, input_length(episode)
        spans = [(offset, image.grid) for offset, image in episode.images]
        positions, _ = mrope_positions(len(episode.input_ids), spans)
        if episode.group_id != self.group_id:
            self.group_id = episode.group_id
            self.groups.append((prompt, []))
            self._lay(episode, positions, 0, prompt)
            self.prompt_end = len(self.ids)
        start = len(self.ids)
        if end > prompt:
            self.groups[-1][1].append(end - prompt)
            self._lay(episode, positions, prompt, end)
        for t in range(prompt, end + 1):
            if episode.loss_mask[t]:
                self.rows.append(self.prompt_end - 1 if t == prompt else start + t - prompt - 1)
                self.targets.append(episode.input_ids[t])
                self.logps.append(episode.logps[t])
                self.owner.append(index)

    def _lay(self, episode: Episode, positions: Tensor, start: int, end: int) -> None:
        base = len(self.ids) - start
        self.ids += episode.input_ids[start:end]
        self.positions.append(positions[:, start:end])
        for offset, image in episode.images:
            if start <= offset < end:
                self.images.append(image)
                self.image_index.append(torch.arange(base + offset, base + offset + image.tokens))

    def finish(self, device) -> Pack:
        empty = [torch.empty(0, dtype=torch.long)]
        return Pack(
            input_ids=torch.tensor(self.ids, device=device),
            position_ids=torch.cat(self.positions, 1).to(device),
            attention_fn=SharedPrefix(self.groups, device),
            images=self.images,
            image_index=torch.cat(self.image_index or empty).to(device),
            logits_index=torch.tensor(self.rows, device=device),
            targets=torch.tensor(self.targets, device=device),
            sampled_logps=torch.tensor(self.logps, device=device, dtype=torch.float32),
            episode_index=torch.tensor(self.owner, device=device),
        )
