"""One optimizer update: micro-batches, one global denominator, image features computed once.

The gradient of an update is a sum over its trained tokens, so it does not depend on how they are cut into
micro-batches. The distinct images of an update go through the vision tower once: their features are detached leaves
that every micro-batch reads and adds gradient to, and one backward pass through the tower follows the last micro-batch.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Callable, Sequence

import torch
from torch import Tensor, nn

from . import grpo
from .episode import Episode
from .model import Qwen2_5_VL, log_probs
from .pack import Pack, cut, pack, unique_tokens


class ImageFeatures:
    """Features of the distinct images of some packs, (M, d), each image encoded once."""

    def __init__(self, model: Qwen2_5_VL, images: Sequence, train: bool):
        distinct = {image.key: image for image in images}
        train = train and any(p.requires_grad for p in model.visual.parameters())
        self.start, total = {}, 0
        for key, image in distinct.items():
            self.start[key] = total
            total += image.tokens
        self.encoded = len(distinct)
        with torch.set_grad_enabled(train):
            self.output = model.encode_images(list(distinct.values())) if distinct else None
        self.leaf = self.output.detach().requires_grad_(train) if distinct else None

    def of(self, batch: Pack) -> Tensor | None:
        """The rows that `batch.image_index` wants, (M, d)."""
        if not batch.images:
            return None
        index = [torch.arange(self.start[i.key], self.start[i.key] + i.tokens) for i in batch.images]
        return self.leaf[torch.cat(index).to(self.leaf.device)]

    def backward(self) -> None:
        """Send the summed gradients of all micro-batches through the vision tower."""
        if self.output is not None and self.leaf.grad is not None:
            self.output.backward(self.leaf.grad)


class MasterWeights:
    """An optimizer over fp32 copies of half-precision parameters: at rates near 1e-6 a bf16 weight never moves.

    In fp32 the parameters are their own masters. Costs 4 bytes per parameter otherwise.
    """

    def __init__(self, model: nn.Module, make: Callable[[list[Tensor]], torch.optim.Optimizer]):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.params]
        self.optimizer = make(self.masters)

    def step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for param, master in zip(self.params, self.masters):
            if master is not param:
                master.grad = None if param.grad is None else param.grad.float()
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters):
                if master is not param:
                    param.copy_(master)
                    master.grad = None


class Stats:
    """Sums over the updates and trained tokens of a step, divided when it is over."""

    def __init__(self):
        self.sums: Counter = Counter()
        self.gap_max = 0.0

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self.sums[name] += float(value.detach().sum() if isinstance(value, Tensor) else value)

    def metrics(self) -> dict[str, float]:
        per_update = {k: self.sums[k] / max(self.sums["updates"], 1) for k in ("loss", "grad_norm")}
        n = self.sums["tokens"] or float("nan")  # a mean over nothing is no number, and not 0
        per_token = {k: self.sums[k] / n for k in ("kl", "entropy", "clip_fraction", "logp_gap")}
        counts = {k: int(self.sums[k]) for k in ("trained", "trained_unique", "encoded", "skipped_updates")}
        return {**per_update, **per_token, "logp_gap_max": self.gap_max, **counts}


class Trainer:
    """Updates `model` on scored episodes (their `advantage` set).

    `sft` replaces the policy loss by the negative log-likelihood: advantage 1, no clip, no reference.
    """

    def __init__(
        self,
        model: Qwen2_5_VL,
        optimizer: MasterWeights,
        banned: Tensor,  # (V,) bool, as in sampling
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
        sft: bool = False,
    ):
        self.model, self.optimizer, self.banned, self.reference = model, optimizer, banned, reference
        self.kl, self.clip_low, self.clip_high, self.loss_norm = kl, clip_low, clip_high, loss_norm
        self.importance_cap, self.temperature, self.sft = importance_cap, temperature, sft
        self.micro_tokens, self.max_grad_norm = micro_tokens, max_grad_norm
        self.device = banned.device

    def step(self, mini_batches: Sequence[Sequence[Episode]], lr: float) -> dict[str, float]:
        """One optimizer update per mini-batch, over the episodes in it; returns the step's metrics and counters.

        With several mini-batches π_old is frozen first, by a pass over all of them; with one it is π itself.
        """
        stats = Stats()
        mini_batches = [batch for batch in mini_batches if any(any(e.loss_mask) for e in batch)]
        old = [self._old_logps(batch) for batch in mini_batches] if len(mini_batches) > 1 else [None]
        for batch, old_logps in zip(mini_batches, old):
            self._update(batch, old_logps, lr, stats)
        return stats.metrics()

    def _update(self, episodes: Sequence[Episode], old_logps, lr: float, stats: Stats) -> None:
        indices = cut(episodes, self.micro_tokens)
        packs = [pack(episodes, part, self.device) for part in indices]
        images = [image for p in packs for image in p.images]
        weights, advantages = self._per_episode(episodes)
        features = ImageFeatures(self.model, images, train=True)
        reference = ImageFeatures(self.reference, images, train=False) if self.reference else None
        for number, batch in enumerate(packs):
            logps, entropy = self.log_probs(self.model, batch, features)
            old = logps.detach() if old_logps is None else old_logps[number]
            ref = None
            if reference:
                with torch.no_grad():
                    ref, _ = self.log_probs(self.reference, batch, reference)
            losses = self._losses(logps, old, ref, advantages[batch.episode_index], batch.sampled_logps)
            loss = (losses.loss * weights[batch.episode_index]).sum()
            loss.backward()
            gap = (old - batch.sampled_logps).abs()
            stats.add(loss=loss, kl=losses.kl, entropy=entropy, clip_fraction=losses.clipped, logp_gap=gap)
            stats.add(tokens=len(gap))
            stats.gap_max = max(stats.gap_max, float(gap.max()))
        features.backward()
        norm = self._apply(lr)
        stats.add(updates=1, grad_norm=norm, skipped_updates=not math.isfinite(norm), encoded=features.encoded)
        stats.add(trained=sum(len(p.input_ids) for p in packs), trained_unique=unique_tokens(episodes))

    def _per_episode(self, episodes: Sequence[Episode]) -> tuple[Tensor, Tensor]:
        lengths = [sum(e.loss_mask) for e in episodes]
        rows = [i for i, n in enumerate(lengths) if n]
        weights = torch.zeros(len(episodes), device=self.device)
        share = grpo.episode_weights([lengths[i] for i in rows], self.loss_norm)
        weights[rows] = torch.tensor(share, device=self.device)
        advantages = torch.tensor([e.advantage for e in episodes], device=self.device, dtype=torch.float32)
        return weights, advantages

    def _losses(self, logps, old, ref, advantages, sampled) -> grpo.Losses:
        if self.sft:
            nothing = torch.zeros_like(logps.detach())
            return grpo.Losses(-logps, nothing, nothing.bool())
        importance = (old - sampled).exp().clamp(max=self.importance_cap) if self.importance_cap else None
        return grpo.token_losses(logps, old, advantages, self.clip_low, self.clip_high, ref, self.kl, importance)

    def log_probs(self, model: Qwen2_5_VL, batch: Pack, features: ImageFeatures) -> tuple[Tensor, Tensor]:
        """Log-probabilities (R,) of the trained tokens, and the entropies (R,) of what they were drawn from."""

        def read(hidden: Tensor, head: Tensor):
            return log_probs(hidden[batch.rows], head, batch.targets, self.temperature, self.banned)

        return model(
            batch.input_ids, batch.position_ids, batch.attend, features.of(batch), batch.image_index, read=read
        )

    @torch.no_grad()
    def _old_logps(self, episodes: Sequence[Episode]) -> list[Tensor]:
        packs = [pack(episodes, part, self.device) for part in cut(episodes, self.micro_tokens)]
        features = ImageFeatures(self.model, [image for p in packs for image in p.images], train=False)
        return [self.log_probs(self.model, p, features)[0] for p in packs]

    def _apply(self, lr: float) -> float:
        """Clip, step, clear. A gradient that is not finite changes nothing. Returns the norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm))
        if math.isfinite(norm):
            self.optimizer.step(lr)
        self.model.zero_grad(set_to_none=True)
        return norm


def split(episodes: Sequence[Episode], parts: int) -> list[list[Episode]]:
    """Deal whole groups, in order of group id, into `parts` mini-batches."""
    groups = sorted({e.group_id for e in episodes})
    size = math.ceil(len(groups) / parts) if groups else 1
    place = {group: i // size for i, group in enumerate(groups)}
    return [[e for e in episodes if place[e.group_id] == part] for part in range(parts)]
