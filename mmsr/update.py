"""One optimizer update: micro-batches, one global denominator, image features computed once.

The gradient of an update is a sum over its trained tokens, so it does not depend on how they are cut into
micro-batches, nor on how its episodes are dealt over ranks. The distinct images of a rank's share go through the vision
tower once: their features are detached leaves that every micro-batch reads and adds gradient to, and one backward pass
through the tower follows the last micro-batch.

With several ranks each holds some of the episodes. Weights come from counts over all of them, and every rank runs the
same passes: who has fewer micro-batches runs empty ones, and who has no picture encodes an empty one. An update that
meets a value which is not finite is skipped by all, and one that finds no room on some rank is begun again by all with
smaller micro-batches.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from mmsr import grpo
from mmsr.episode import Episode, Example
from mmsr.model import Qwen2_5_VL, logits
from mmsr.pack import Pack, cut, pack, unique_tokens
from mmsr.system.chunked_log_probs import chunked_log_probs
from mmsr.system.errors import UserError
from mmsr.system.lockstep import Lockstep, OutOfRoom
from mmsr.system.optimizer import MasterWeights
from mmsr.system.parallel import SINGLE, Ranks
from mmsr.vision import MERGE, PATCH_VALUES, Image

NO_PICTURE = Image(torch.zeros(MERGE**2, PATCH_VALUES), (MERGE, MERGE), "no picture")


class ImageFeatures:
    """Features of the distinct images of some packs, (M, d), each image encoded once."""

    def __init__(self, model: Qwen2_5_VL, images: Sequence, train: bool, idle: bool = False):
        """`idle`: run the tower, on an empty picture, even where there is none."""
        distinct = {image.key: image for image in images}
        train = train and any(p.requires_grad for p in model.visual.parameters())
        self.start, total = {}, 0
        for key, image in distinct.items():
            self.start[key] = total
            total += image.tokens
        self.encoded = len(distinct)
        if idle and not distinct:
            distinct = {NO_PICTURE.key: NO_PICTURE}
        with torch.set_grad_enabled(train):
            self.output = model.encode_images(list(distinct.values())) if distinct else None
        self.leaf = self.output.detach().requires_grad_(train) if distinct else None
        if self.leaf is not None:
            self.leaf.grad_dtype = torch.float32  # what micro-batches add up in

    def of(self, batch: Pack) -> Tensor | None:
        """The rows that `batch.image_index` wants, (M, d)."""
        if not batch.images:
            return None
        index = [torch.arange(self.start[i.key], self.start[i.key] + i.tokens) for i in batch.images]
        return self.leaf[torch.cat(index).to(self.leaf.device)]

    def backward(self) -> None:
        """Send the summed gradients of all micro-batches through the vision tower."""
        if self.output is not None and self.output.requires_grad:
            gradient = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad
            self.output.backward(gradient.to(self.output.dtype))


class Stats:
    """Sums over the updates and trained tokens of a step, divided when it is over."""

    def __init__(self):
        self.sums: Counter = Counter()
        self.gap_max = 0.0

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] += float(value.detach().sum() if isinstance(value, Tensor) else value)

    def over(self, ranks: Ranks) -> Stats:
        """The same of all ranks together."""
        whole = Stats()
        whole.sums, whole.gap_max = Counter(ranks.sum(self.sums)), ranks.max(self.gap_max)
        return whole

    def merge(self, other: Stats) -> None:
        self.sums.update(other.sums)
        self.gap_max = max(self.gap_max, other.gap_max)

    def metrics(self) -> dict[str, float]:
        per_update = {k: self.sums[k] / max(self.sums["updates"], 1) for k in ("loss", "grad_norm")}
        n = self.sums["tokens"] or float("nan")  # a mean over nothing is no number, and not 0
        per_token = {k: self.sums[k] / n for k in ("kl", "entropy", "clip_fraction", "logp_gap")}
        counts = {k: int(self.sums[k]) for k in ("trained", "trained_unique", "encoded", "skipped_updates")}
        return {**per_update, **per_token, "logp_gap_max": self.gap_max, **counts}


@dataclass(frozen=True)
class Share:
    """This rank's episodes of one update, and what all ranks' shares hold together."""

    episodes: Sequence[Episode]
    tokens: int  # trained ones, of all ranks, as are the next three
    trained: int  # episodes with trained tokens
    pictures: int
    unsound: int  # episodes whose reward or advantage is not finite

    @classmethod
    def of(cls, episodes: Sequence[Episode], ranks: Ranks) -> Share:
        learnt = [e for e in episodes if any(e.loss_mask)]
        counts = dict(
            tokens=sum(sum(e.loss_mask) for e in learnt),
            trained=len(learnt),
            pictures=sum(len(e.images) for e in learnt),
            unsound=sum(not (math.isfinite(e.reward) and math.isfinite(e.advantage)) for e in learnt),
        )
        return cls(episodes, **ranks.sum(counts))


class Trainer:
    """Updates `model` on scored episodes (their `advantage` set).

    `sft` replaces the policy loss by the negative log-likelihood: advantage 1, no clip, no reference.
    With several `ranks`, model and reference are sharded over them and every method is collective.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        optimizer: MasterWeights,
        suppressed: Tensor,  # (V,) bool, as in sampling
        *,
        reference: Qwen2_5_VL | None = None,
        kl: float = 0.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        loss_norm: str = "sequence",
        importance_cap: float = 0.0,
        temperature: float = 1.0,
        micro_tokens: int = 16384,
        max_grad_norm: float = 1.0,
        max_skipped: int = 5,
        sft: bool = False,
        ranks: Ranks = SINGLE,
    ):
        self.model, self.optimizer, self.suppressed, self.reference = model, optimizer, suppressed, reference
        self.kl, self.clip_low, self.clip_high, self.loss_norm = kl, clip_low, clip_high, loss_norm
        self.importance_cap, self.temperature, self.sft = importance_cap, temperature, sft
        self.micro_tokens, self.max_grad_norm, self.max_skipped = micro_tokens, max_grad_norm, max_skipped
        self.device, self.ranks, self.lockstep = suppressed.device, ranks, Lockstep(ranks, [model, reference])
        self.skipped_in_a_row = self.longest = 0
        self.idle = _idle_episode(int((~suppressed).nonzero()[0]))
        self.rehearsed = ranks.size == 1

    def step(self, mini_batches: Sequence[Sequence[Episode]], lr: float) -> dict[str, float]:
        """One optimizer update per mini-batch, over all ranks' episodes in it; returns the step's metrics and counters.

        π_old is frozen first, by a pass over all mini-batches but the first, for which it is π itself. Raises
        UserError when too many updates in a row had to be skipped, or when one episode is too long for the memory.
        """
        if not self.rehearsed:
            self._rehearse()
        shares = [share for batch in mini_batches if (share := Share.of(batch, self.ranks)).tokens]
        frozen = Stats()
        old = [None, *(self._with_room(self._old_logps, share, frozen) for share in shares[1:])]
        stats = frozen.over(self.ranks)
        for share, old_logps in zip(shares, old):
            self._update(share, old_logps, lr, stats)
        return stats.metrics()

    def _update(self, share: Share, old_logps, lr: float, stats: Stats) -> None:
        norm = math.nan
        if not share.unsound:
            found = self._with_room(self._gradient, share, old_logps).over(self.ranks)
            norm = self._clip()
        if math.isfinite(norm) and math.isfinite(found.sums["loss"]):
            self.optimizer.step(lr)
            found.add(updates=1, grad_norm=norm)
            stats.merge(found)
            self.skipped_in_a_row = 0
        else:
            self._skip(stats)
        self.model.zero_grad(set_to_none=True)

    def _skip(self, stats: Stats) -> None:
        stats.add(skipped_updates=1)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row were skipped: a reward, the loss or the gradient was not "
                "finite; lower --lr, check the reward, or raise --max-skipped"
            )

    # ---- the gradient -----------------------------------------------------------------------------------------------

    def _gradient(self, share: Share, old_logps: Sequence[Tensor] | None) -> Stats:
        """Leave the gradient of one update in the parameters; returns what this rank saw on the way."""
        parts, packs = self._packs(share.episodes)
        self.optimizer.expect(len(packs))
        weights, advantages = self._per_episode(share)
        with self.lockstep.phase("vision pass"):
            features = self._features(self.model, packs, share, train=True)
            reference = self._features(self.reference, packs, share) if self.reference else None
        stats = Stats()
        for part, batch in zip(parts, packs):
            old = None if old_logps is None else torch.cat([old_logps[i] for i in part])
            seen = stats if part[0] < len(share.episodes) else None
            with self.lockstep.phase("micro-batch", final=len(part) == 1):
                self._micro_batch(batch, features, reference, weights, advantages, old, seen)
        if share.pictures:
            with self.lockstep.phase("vision backward pass"):
                features.backward()
        trained = sum(len(p.input_ids) for part, p in zip(parts, packs) if part[0] < len(share.episodes))
        stats.add(encoded=features.encoded, trained=trained, trained_unique=unique_tokens(share.episodes))
        return stats

    def _packs(self, episodes: Sequence[Episode]) -> tuple[list[list[int]], list[Pack]]:
        """Micro-batches: indices, and their packs. As many on every rank; the empty ones hold the idle episode."""
        parts = cut(episodes, self.micro_tokens)
        wanted = max(1, int(self.ranks.max(len(parts))))
        parts += [[len(episodes)]] * (wanted - len(parts))
        packs = [pack([*episodes, self.idle], part, self.device) for part in parts]
        self.longest = max(len(p.input_ids) for p in packs)
        return parts, packs

    def _features(self, model: Qwen2_5_VL, packs: Sequence[Pack], share: Share, train: bool = False) -> ImageFeatures:
        """Of the pictures of `packs`. The tower runs if any rank has a picture: all ranks run the same passes."""
        return ImageFeatures(model, [image for p in packs for image in p.images], train, idle=share.pictures > 0)

    def _micro_batch(
        self, batch: Pack, features: ImageFeatures, reference: ImageFeatures | None,
        weights: Tensor, advantages: Tensor, old: Tensor | None, stats: Stats | None,
    ) -> None:  # fmt: skip
        """Forward and backward pass; `weights` and `advantages` per episode, `old` (R,) or None for π itself."""
        logps, entropy = self.log_probs(self.model, batch, features)
        old = logps.detach() if old is None else old
        ref = None
        if reference:
            with torch.no_grad():
                ref, _ = self.log_probs(self.reference, batch, reference)
        losses = self._losses(logps, old, ref, advantages[batch.episode_index], batch.sampled_logps)
        loss = (losses.loss * weights[batch.episode_index]).sum()
        (loss * self.ranks.size).backward()  # FSDP takes the mean over the ranks
        if stats is None:
            return  # an empty micro-batch
        gap = (old - batch.sampled_logps).abs()
        stats.add(loss=loss, kl=losses.kl, entropy=entropy, clip_fraction=losses.clipped, logp_gap=gap)
        stats.add(tokens=len(gap))
        stats.gap_max = max(stats.gap_max, float(gap.max()))

    def _per_episode(self, share: Share) -> tuple[Tensor, Tensor]:
        """Weight of a token and advantage of each episode, the idle one last, with 0 and 0."""
        lengths = [sum(e.loss_mask) for e in share.episodes]
        rows = [i for i, n in enumerate(lengths) if n]
        weights = torch.zeros(len(lengths) + 1, device=self.device)
        each = grpo.episode_weights([lengths[i] for i in rows], self.loss_norm, share.trained, share.tokens)
        weights[rows] = torch.tensor(each, device=self.device)
        advantages = [e.advantage for e in share.episodes] + [0.0]
        return weights, torch.tensor(advantages, device=self.device, dtype=torch.float32)

    def _losses(self, logps, old, ref, advantages, sampled) -> grpo.Losses:
        if self.sft:
            nothing = torch.zeros_like(logps.detach())
            return grpo.Losses(-logps, nothing, nothing.bool())
        importance = (old - sampled).exp().clamp(max=self.importance_cap) if self.importance_cap else None
        return grpo.token_losses(logps, old, advantages, self.clip_low, self.clip_high, ref, self.kl, importance)

    def log_probs(self, model: Qwen2_5_VL, batch: Pack, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R,) of the trained tokens, and the entropies (R,) of what they were drawn from."""

        def head_fn(hidden: Tensor, head: Tensor):
            rows = hidden[batch.rows]  # (R, d)
            return chunked_log_probs(logits, rows, head, batch.targets, self.temperature, self.suppressed)

        return model(
            batch.input_ids,
            batch.position_ids,
            batch.attention_fn,
            features.of(batch),
            batch.image_index,
            head_fn=head_fn,
        )

    @torch.no_grad()
    def _old_logps(self, share: Share, stats: Stats) -> list[Tensor]:
        """Log-probabilities of each episode's trained tokens, the idle one last: they outlive how the batch is cut."""
        parts, packs = self._packs(share.episodes)
        with self.lockstep.phase("first vision pass"):
            features = self._features(self.model, packs, share)
        stats.add(encoded=features.encoded)
        episodes = [*share.episodes, self.idle]
        found = [torch.empty(0, device=self.device)] * len(share.episodes)
        found.append(torch.zeros(1, device=self.device))
        for part, batch in zip(parts, packs):
            with self.lockstep.phase("first pass", final=len(part) == 1):
                logps, _ = self.log_probs(self.model, batch, features)
            lengths = [sum(episodes[i].loss_mask) for i in part]
            for i, mine in zip(part, logps.split(lengths)):  # a pack has them episode by episode
                found[i] = mine
        return found

    def _clip(self) -> float:
        """Scale the gradient down to the largest norm allowed. Returns its norm before, over all ranks."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, norm)
        return float(norm)

    # ---- room -------------------------------------------------------------------------------------------------------

    def _with_room(self, work: Callable, *args):
        """work(*args), and again with micro-batches half as long for as long as some rank runs out of memory."""
        while True:
            try:
                return work(*args)
            except OutOfRoom as error:
                reason, final = str(error), error.final
            self.model.zero_grad(set_to_none=True)
            if final:
                raise UserError(
                    f"{reason}, which cannot be cut any smaller: lower --max-tokens, --max-pixels or --mini-batch, or "
                    "train on more devices"
                )
            self.micro_tokens = int(min(self.micro_tokens, self.ranks.max(self.longest))) // 2
            if self.ranks.main:
                print(f"{reason}: going on with --micro-tokens {self.micro_tokens}", file=sys.stderr)

    def _rehearse(self) -> None:
        """An update on nothing, so that `lockstep` learns what each pass consists of."""
        nothing = Share([], tokens=1, trained=1, pictures=1, unsound=0)
        self._old_logps(nothing, Stats())
        self._gradient(nothing, None)
        self.model.zero_grad(set_to_none=True)
        self.rehearsed = True


def _idle_episode(token: int) -> Episode:
    """One token after another, of weight 0: what a rank runs when it has nothing left and others have."""
    return Episode(Example("", b"", "", ()), -1, 0, [token] * 2, [0, 1], [0.0] * 2, prompt_length=1)


def split(episodes: Sequence[Episode], parts: int, groups: int) -> list[list[Episode]]:
    """Deal `groups` whole groups, by group id, into `parts` mini-batches. `episodes` may be only one rank's of them."""
    size = math.ceil(groups / parts)
    return [[e for e in episodes if e.group_id // size == part] for part in range(parts)]
