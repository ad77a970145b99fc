"""The update: from episodes with advantages to a step of the optimizer.

    freeze π_old                                            Trainer.step
    for each mini-batch:                                    Trainer.update
        for each micro-batch:                               Trainer.accumulate_gradient
            forward pass, loss (1) to (4), backward pass    Trainer.forward_backward
        clip the gradient
        step of the optimizer

The equations are those of grpo.py. The gradient of an update is a sum over its trained tokens, so it does not depend on
how they are cut into micro-batches, nor on which rank has which episodes. Each distinct image of a rank goes through
the vision tower once per update (`ImageFeatures`), or once per step, in the rollouts, if the tower is frozen
(`KnownFeatures`).

With several ranks each holds some of the episodes. Weights (4) come from counts over all ranks, and every rank runs the
same passes, because FSDP's collectives need them all: a rank with fewer micro-batches adds empty ones, and a rank
without pictures encodes an empty one. An update that meets a value which is not finite is skipped by all ranks. One in
which some rank runs out of memory is repeated by all ranks with smaller micro-batches.

The plain form is `add_gradient` in examples/plain_grpo.py: one backward pass per rollout, and each encodes its images.

Shape letters: E this rank's episodes of an update, R trained tokens of a micro-batch, M image tokens, f numbers of each
token's features (the hidden size d, with DeepStack a multiple of it), V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor, nn

from mmsr import grpo
from mmsr.episode import Episode, Example
from mmsr.lora import as_reference, trains_tower
from mmsr.model import VLModel, logits
from mmsr.pack import Pack, pack, split_into_micro_batches, unique_tokens
from mmsr.system.chunked_log_probs import chunked_log_probs
from mmsr.system.errors import UserError
from mmsr.system.lockstep import Lockstep, RankOutOfMemory
from mmsr.system.optimizer import MasterWeights
from mmsr.system.parallel import SINGLE, Ranks, average_gradients
from mmsr.vision import Image, empty_picture

# ---- what an update is made of


@dataclass(frozen=True)
class LocalBatch:
    """This rank's episodes of one mini-batch, with counts over the mini-batch's episodes on all ranks."""

    episodes: Sequence[Episode]
    tokens: int  # trained tokens, on all ranks like the other counts
    trained: int  # episodes with trained tokens
    pictures: int
    non_finite: int  # episodes whose reward or advantage is not finite

    @classmethod
    def of(cls, episodes: Sequence[Episode], ranks: Ranks) -> LocalBatch:
        """Count over all ranks. Collective."""
        counts = dict(tokens=0, trained=0, pictures=0, non_finite=0)
        for episode in episodes:
            if not any(episode.loss_mask):
                continue
            counts["tokens"] += sum(episode.loss_mask)
            counts["trained"] += 1
            counts["pictures"] += len(episode.images)
            if not (math.isfinite(episode.reward) and math.isfinite(episode.advantage)):
                counts["non_finite"] += 1
        return cls(episodes, **ranks.sum(counts))


@dataclass(frozen=True)
class MicroBatch:
    """What one forward and backward pass computes."""

    indices: list[int]  # of the packed episodes in `LocalBatch.episodes`
    pack: Pack
    empty: bool  # holds the dummy episode alone: this rank has no more episodes, another one has


def split(episodes: Sequence[Episode], parts: int, groups: int) -> list[list[Episode]]:
    """Split into `parts` mini-batches of whole groups. Group ids are 0 … `groups` − 1; a rank has only some of them."""
    groups_per_part = math.ceil(groups / parts)
    mini_batches: list[list[Episode]] = [[] for _ in range(parts)]
    for episode in episodes:
        mini_batches[episode.group_id // groups_per_part].append(episode)
    return mini_batches


def _dummy_episode(token: int) -> Episode:
    """A prompt of one token and one trained token. Its weight (4) is 0, so it adds nothing to the gradient."""
    return Episode(
        Example("", b"", "", ()),
        group_id=-1,
        sample=0,
        input_ids=[token, token],
        loss_mask=[0, 1],
        logps=[0.0, 0.0],
        prompt_length=1,
    )


# ---- features of images


class ImageFeatures:
    """Features (M, f) of the distinct images of some packs, each image encoded once.

    Several micro-batches read the features of one image, but the tower's forward and backward pass should each run
    once. So the chain rule is cut in two at the features:

    1. `output` = tower(images) keeps the tower's graph. `leaf` is a detached copy that collects a gradient.
    2. Micro-batches read rows of `leaf`. Their backward passes end there and add up in `leaf.grad`.
    3. `backward`, after the last micro-batch, sends that sum through the tower.
    """

    def __init__(self, model: VLModel, images: Sequence[Image], train: bool, always_run: bool = False):
        """`always_run`: where there is no image, run the tower on an empty one, as other ranks run it on theirs."""
        distinct = {image.key: image for image in images}
        self.encoded = len(distinct)
        self.first_row: dict[str, int] = {}  # of each image in the features
        rows = 0
        for key, image in distinct.items():
            self.first_row[key] = rows
            rows += image.tokens

        if always_run and not distinct:
            nothing = empty_picture(model.config.vision.processor)
            distinct = {nothing.key: nothing}
        train = train and trains_tower(model)
        self.output: Tensor | None = None
        self.leaf: Tensor | None = None
        if distinct:
            with torch.set_grad_enabled(train):
                self.output = model.encode_images(list(distinct.values()))  # (M, f)
            self.leaf = self.output.detach().requires_grad_(train)  # (M, f)
            self.leaf.grad_dtype = torch.float32  # the dtype in which micro-batches add up

    def of(self, packed: Pack) -> Tensor | None:
        """The features (n, f) of a pack's n image tokens, in the order of `packed.image_index`.

        A pack of text gets (0, f) where there are features at all: so it is part of their graph, and every backward
        pass is the same row of collectives, whatever is frozen.
        """
        if self.leaf is None:
            return None
        if not packed.images:
            return self.leaf[:0]
        rows = []
        for image in packed.images:
            first = self.first_row[image.key]
            rows.append(torch.arange(first, first + image.tokens))
        return self.leaf[torch.cat(rows).to(self.leaf.device)]

    def backward(self) -> None:
        """Send the summed gradients of all micro-batches through the vision tower."""
        if self.output is None or not self.output.requires_grad:
            return
        gradient = torch.zeros_like(self.leaf) if self.leaf.grad is None else self.leaf.grad  # (M, f)
        self.output.backward(gradient.to(self.output.dtype))


class KnownFeatures:
    """`ImageFeatures` of a tower that is not trained: what the rollouts have encoded serves the whole step."""

    def __init__(self, known: dict[str, Tensor], encoded: int):
        """`known`: features (tokens of the image, f) by the images' keys. `encoded` of them were not encoded before."""
        self.known = known
        self.encoded = encoded

    def of(self, packed: Pack) -> Tensor | None:
        """The features of a pack's image tokens, in the order of `packed.image_index`."""
        if not packed.images:
            return None
        return torch.cat([self.known[image.key] for image in packed.images])

    def backward(self) -> None:
        """Nothing in the tower is trained."""


Features = ImageFeatures | KnownFeatures


class Stats:
    """Sums over the updates and trained tokens of a step, divided in `metrics`."""

    def __init__(self):
        self.sums: Counter = Counter()
        self.gap_max = 0.0

    def add(self, **values: Tensor | float) -> None:
        """Add numbers, and the sums of tensors."""
        for name, value in values.items():
            if isinstance(value, Tensor):
                value = value.detach().sum()
            self.sums[name] += float(value)

    def all_reduce(self, ranks: Ranks) -> Stats:
        """The same over all ranks. Collective."""
        total = Stats()
        total.sums = Counter(ranks.sum(self.sums))
        total.gap_max = ranks.max(self.gap_max)
        return total

    def merge(self, other: Stats) -> None:
        self.sums.update(other.sums)
        self.gap_max = max(self.gap_max, other.gap_max)

    def metrics(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        for name in ("loss", "grad_norm"):
            metrics[name] = self.sums[name] / max(self.sums["updates"], 1)
        tokens = self.sums["tokens"] or float("nan")  # a mean over no tokens is not 0
        for name in ("kl", "entropy", "clip_fraction", "masked_fraction", "logp_gap"):
            metrics[name] = self.sums[name] / tokens
        metrics["logp_gap_max"] = self.gap_max
        for name in ("trained", "trained_unique", "encoded", "skipped_updates"):
            metrics[name] = int(self.sums[name])
        return metrics


# ---- the trainer


class Trainer:
    """Updates `model` on scored episodes (their `advantage` set).

    `loss`: the fields of `grpo.LossOptions`, with the defaults there.
    `sft` replaces the policy loss by the negative log-likelihood: advantage 1, no clip, no reference.
    `reference`: a frozen copy of the model at the start, or the model itself where only its adapters are trained.
    `features`: of images that the rollouts have encoded; for a tower that is not trained.
    With several `ranks` every method is collective. Sharded weights are FSDP's business; what every rank holds whole,
    such as adapters, gets the same gradient on all of them, and so the same step.
    """

    on_episodes: Callable[[int], object] = staticmethod(lambda count: None)  # told how many are passed through

    def __init__(
        self,
        model: VLModel,
        optimizer: MasterWeights,
        suppressed: Tensor,  # (V,) bool, as in sampling
        *,
        reference: VLModel | None = None,
        features: dict[str, Tensor] | None = None,
        temperature: float = 1.0,
        micro_tokens: int = 16384,
        max_grad_norm: float = 1.0,
        max_skipped: int = 5,
        sft: bool = False,
        ranks: Ranks = SINGLE,
        **loss: Any,
    ):
        self.model = model
        self.optimizer = optimizer
        self.suppressed = suppressed
        self.reference = reference
        self.features = features
        self.loss = grpo.LossOptions(**loss)
        self.temperature = temperature
        self.micro_tokens = micro_tokens
        self.max_grad_norm = max_grad_norm
        self.max_skipped = max_skipped
        self.sft = sft
        self.ranks = ranks
        self.lockstep = Lockstep(ranks, [model, reference])
        self.dummy = _dummy_episode(token=int((~suppressed).nonzero()[0]))
        self.skipped_in_a_row = 0
        self.longest_pack = 0  # tokens, in the last pass

    @property
    def device(self) -> torch.device:
        return self.suppressed.device

    def step(self, mini_batches: Sequence[Sequence[Episode]], lr: float) -> dict[str, float]:
        """One optimizer update per mini-batch. Returns the step's metrics and counters, over all ranks.

        `mini_batches` are this rank's episodes. Raises UserError when too many updates in a row had to be skipped, or
        when one episode is too long for the memory.
        """
        if self.lockstep.models and not self.lockstep.recorded:
            self._dry_run()
        batches = []
        for episodes in mini_batches:
            batch = LocalBatch.of(episodes, self.ranks)
            if batch.tokens:
                batches.append(batch)

        # Freeze π_old of (3): the policy at this moment, before all updates. For the first update it is π itself.
        local = Stats()
        all_old_logps: list[list[Tensor] | None] = [None]
        for batch in batches[1:]:
            old_logps = None
            while old_logps is None:  # until it fits into the memory of every rank
                try:
                    old_logps = self.old_logps(batch, local)
                except RankOutOfMemory as error:
                    self._use_smaller_micro_batches(error)
            all_old_logps.append(old_logps)

        stats = local.all_reduce(self.ranks)
        for batch, old_logps in zip(batches, all_old_logps):
            self.update(batch, old_logps, lr, stats)
        return stats.metrics()

    def update(self, batch: LocalBatch, old_logps: list[Tensor] | None, lr: float, stats: Stats) -> None:
        """One update: gradient, clipping, step of the optimizer. Skipped on all ranks if a value is not finite."""
        if batch.non_finite:
            self._skip_update(stats)
            return
        local = None
        while local is None:  # until it fits into the memory of every rank
            try:
                local = self.accumulate_gradient(batch, old_logps)
            except RankOutOfMemory as error:
                self._use_smaller_micro_batches(error)
        total = local.all_reduce(self.ranks)
        average_gradients(self.model, self.ranks)
        grad_norm = self._clip_gradient()
        if math.isfinite(grad_norm) and math.isfinite(total.sums["loss"]):
            self.optimizer.step(lr)
            total.add(updates=1, grad_norm=grad_norm)
            stats.merge(total)
            self.skipped_in_a_row = 0
        else:
            self._skip_update(stats)
        self.model.zero_grad(set_to_none=True)

    def accumulate_gradient(self, batch: LocalBatch, old_logps: list[Tensor] | None) -> Stats:
        """Add up the gradient of Σ_it w_it l_it (4) in the parameters. Returns this rank's sums.

        `old_logps` are those of `self.old_logps`; None where π_old is π. Raises RankOutOfMemory.
        """
        micro_batches = self._micro_batches(batch.episodes)
        self.optimizer.expect(len(micro_batches))
        lengths = [sum(episode.loss_mask) for episode in batch.episodes]
        norm, limit = self.loss.loss_norm, self.loss.token_limit
        token_weights = grpo.episode_weights(lengths, norm, batch.trained, batch.tokens, limit)  # w of (4)
        weights = self._per_episode(token_weights)  # (E + 1,)
        advantages = self._per_episode([episode.advantage for episode in batch.episodes])  # (E + 1,)
        features, ref_features = self._image_features(micro_batches, batch, train=True)

        stats = Stats()
        for micro_batch in micro_batches:
            with self.lockstep.guard("micro-batch", indivisible=len(micro_batch.indices) == 1):
                self.forward_backward(micro_batch, features, ref_features, weights, advantages, old_logps, stats)
            self.on_episodes(len(micro_batch.indices))
        if batch.pictures:
            with self.lockstep.guard("vision backward pass"):
                features.backward()
        stats.add(encoded=features.encoded, trained_unique=unique_tokens(batch.episodes))
        return stats

    def forward_backward(
        self,
        micro_batch: MicroBatch,
        features: Features,
        ref_features: Features | None,
        weights: Tensor,
        advantages: Tensor,
        old_logps: list[Tensor] | None,
        stats: Stats,
    ) -> None:
        """Forward pass, loss (1) to (4) and backward pass. `weights` w and `advantages` A are (E + 1,), per episode."""
        packed = micro_batch.pack
        logps, entropy = self.log_probs(self.model, packed, features)  # (R,), (R,)
        if old_logps is None:
            old = logps.detach()  # (R,) so ρ = 1, and its gradient is that of log π
        else:
            old = torch.cat([old_logps[i] for i in micro_batch.indices])  # (R,)
        ref = None
        if self.reference is not None:
            with torch.no_grad(), as_reference(self.reference):
                ref, _ = self.log_probs(self.reference, packed, ref_features)  # (R,)

        importance = None
        if self.sft:
            losses = grpo.likelihood_losses(logps)
        else:
            importance = self.importance(old, packed)  # (R,) or None
            token_advantages = advantages[packed.episode_index]  # (R,)
            losses = grpo.token_losses(
                logps, old, token_advantages, self.loss, ref, importance, packed.episode_index
            )  # (1) to (3)
        loss = (losses.loss * weights[packed.episode_index]).sum()  # () this micro-batch's part of Σ_it w_it l_it
        (loss * self.ranks.size).backward()  # gradients are averaged over the ranks: this makes the mean a sum

        if not micro_batch.empty:
            self._record(stats, packed, loss, losses, entropy, old)
            if importance is not None:
                stats.add(masked_fraction=importance == 0)

    def importance(self, old: Tensor, packed: Pack) -> Tensor | None:
        """(R,) what multiplies the policy term of (1), for sampler and trainer disagree; None: nothing does.

        `old` (R,): log π_old of a pack's trained tokens.
        """
        cap, bound = self.loss.importance_cap, self.loss.importance_bound
        factor = None
        if cap:
            factor = grpo.importance_weights(old, packed.sampled_logps, cap)  # (R,)
        if bound:
            agree = grpo.agreement(old, packed.sampled_logps, packed.episode_index, bound)  # (R,)
            factor = agree if factor is None else factor * agree
        return factor

    @staticmethod
    def _record(stats: Stats, packed: Pack, loss: Tensor, losses: grpo.Losses, entropy: Tensor, old: Tensor) -> None:
        """Add a micro-batch's sums to `stats`."""
        gap = (old - packed.sampled_logps).abs()  # (R,) what trainer and sampler compute differently
        stats.add(loss=loss, kl=losses.kl, entropy=entropy, clip_fraction=losses.clipped, logp_gap=gap)
        stats.add(tokens=len(gap), trained=len(packed.input_ids))
        stats.gap_max = max(stats.gap_max, float(gap.max()))

    def log_probs(self, model: VLModel, packed: Pack, features: Features) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R,) of the trained tokens, and the entropies (R,) of what they were drawn from."""

        def head_fn(hidden: Tensor, head: Tensor):  # (N, d), (V, d)
            rows = hidden[packed.logits_index]  # (R, d)
            return chunked_log_probs(logits, rows, head, packed.targets, self.temperature, self.suppressed)

        return model(
            packed.input_ids,
            packed.position_ids,
            packed.attention_fn,
            features.of(packed),
            packed.image_index,
            head_fn=head_fn,
        )

    # ---- π_old

    @torch.no_grad()
    def old_logps(self, batch: LocalBatch, stats: Stats) -> list[Tensor]:
        """log π_old of every episode's trained tokens, one tensor per episode, the dummy's last.

        By episode, because the update may cut its micro-batches in another way. Raises RankOutOfMemory.
        """
        micro_batches = self._micro_batches(batch.episodes)
        features, _ = self._image_features(micro_batches, batch, train=False)
        stats.add(encoded=features.encoded)
        episodes = [*batch.episodes, self.dummy]
        old_logps = [torch.empty(0, device=self.device) for _ in batch.episodes]  # where nothing is trained
        old_logps.append(torch.zeros(1, device=self.device))  # the dummy's
        for micro_batch in micro_batches:
            with self.lockstep.guard("first pass", indivisible=len(micro_batch.indices) == 1):
                logps, _ = self.log_probs(self.model, micro_batch.pack, features)  # (R,), episode by episode
            lengths = [sum(episodes[i].loss_mask) for i in micro_batch.indices]
            for i, episode_logps in zip(micro_batch.indices, logps.split(lengths)):
                old_logps[i] = episode_logps
            self.on_episodes(len(micro_batch.indices))
        return old_logps

    # ---- parts of a pass

    def _micro_batches(self, episodes: Sequence[Episode]) -> list[MicroBatch]:
        """As many on every rank: a rank that has fewer adds empty ones. Collective."""
        with_dummy = [*episodes, self.dummy]
        dummy_index = len(episodes)
        parts = split_into_micro_batches(episodes, self.micro_tokens)
        count = max(1, int(self.ranks.max(len(parts))))
        parts += [[dummy_index]] * (count - len(parts))
        micro_batches = []
        for indices in parts:
            empty = indices == [dummy_index]
            micro_batches.append(MicroBatch(indices, pack(with_dummy, indices, self.device), empty))
        self.longest_pack = max(len(micro_batch.pack.input_ids) for micro_batch in micro_batches)
        return micro_batches

    def _image_features(
        self, micro_batches: Sequence[MicroBatch], batch: LocalBatch, train: bool
    ) -> tuple[Features, Features | None]:
        """Of this rank's images, the policy's and, to train, the reference's. If any rank has a picture, all encode."""
        images: list[Image] = []
        for micro_batch in micro_batches:
            images += micro_batch.pack.images
        if self.features is not None:  # the reference has the same tower
            known = self._known_features(images)
            return known, known
        # With a frozen embedding only features bring a gradient into the first blocks. There must be some then: whether
        # a block has a backward pass, and so FSDP's collectives, may not depend on the batch.
        always_run = batch.pictures > 0 or not self.model.model.embed_tokens.weight.requires_grad
        ref_features = None
        with self.lockstep.guard("vision pass" if train else "first vision pass"):
            features = ImageFeatures(self.model, images, train, always_run)
            if train and self.reference is not None:
                with as_reference(self.reference):
                    ref_features = ImageFeatures(self.reference, images, False, always_run)
        return features, ref_features

    def _known_features(self, images: Sequence[Image]) -> KnownFeatures:
        """What `features` lacks of some images is encoded, and added to it. If any rank lacks one, all encode."""
        known = self.features
        lacking = {image.key: image for image in images if image.key not in known}
        if self.ranks.max(len(lacking)):
            new = list(lacking.values()) or [empty_picture(self.model.config.vision.processor)]
            with self.lockstep.guard("vision pass"), torch.no_grad():
                features = self.model.encode_images(new)  # (M, f)
            for image, rows in zip(new, features.split([image.tokens for image in new])):
                known[image.key] = rows
        return KnownFeatures(known, len(lacking))

    def _per_episode(self, values: Sequence[float]) -> Tensor:
        """One number for each episode, and 0 for the dummy: (E + 1,)."""
        return torch.tensor([*values, 0.0], device=self.device, dtype=torch.float32)

    def _clip_gradient(self) -> float:
        """Scale the gradient down to the largest norm allowed. Returns its norm before, over all ranks."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):  # sharded gradients
            norm = norm.full_tensor()
        nn.utils.clip_grads_with_norm_(self.model.parameters(), self.max_grad_norm, norm)
        return float(norm)

    # ---- when something goes wrong

    def _skip_update(self, stats: Stats) -> None:
        stats.add(skipped_updates=1)
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.max_skipped:
            raise UserError(
                f"{self.skipped_in_a_row} updates in a row were skipped: a reward, the loss or the gradient was not "
                "finite; lower --lr, check the reward, or raise --max-skipped"
            )

    def _use_smaller_micro_batches(self, error: RankOutOfMemory) -> None:
        """Throw the unfinished pass away and halve the micro-batches. UserError if one episode alone is too long."""
        self.model.zero_grad(set_to_none=True)
        if error.indivisible:
            raise UserError(
                f"{error}, which cannot be cut any smaller: lower --max-tokens, --max-pixels or --mini-batch, or "
                "train on more devices"
            )
        longest = self.ranks.max(self.longest_pack)
        self.micro_tokens = int(min(self.micro_tokens, longest)) // 2
        if self.ranks.main:
            print(f"{error}: continuing with --micro-tokens {self.micro_tokens}", file=sys.stderr)

    def _dry_run(self) -> None:
        """Run every kind of pass once without episodes, so that `lockstep` records its collectives."""
        nothing = LocalBatch([], tokens=1, trained=1, pictures=1, non_finite=0)
        if self.features is not None:
            self._known_features([empty_picture(self.model.config.vision.processor)])
        self.old_logps(nothing, Stats())
        self.accumulate_gradient(nothing, None)
        self.model.zero_grad(set_to_none=True)
