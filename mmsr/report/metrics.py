"""The line that metrics.jsonl gets for a training step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr import evaluate
from mmsr.assemble import Setup
from mmsr.batch import Batch
from mmsr.config import Config
from mmsr.episode import JUDGED_RIGHT, JUDGED_WRONG, Episode
from mmsr.report import alarms
from mmsr.report.html import shape_name

LOSS = ("loss", "kl", "entropy", "clip_fraction", "logp_gap", "logp_gap_max", "grad_norm", "skipped_updates")


def step_metrics(
    step: int,
    setup: Setup[Config],
    batch: Batch,
    update: Mapping[str, float],
    lr: float,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """A step in numbers. `update` and `seconds`: of the trainer, over all ranks, and of each phase.

    What dynamic sampling has replaced counts too: rewards and searches are those of all questions that were asked.
    """
    episodes, counts = batch.all, batch.counts
    means = evaluate.summary(episodes, setup.ranks)
    n = means.pop("n")  # episodes of all ranks
    sums = setup.ranks.sum(_sums(batch))
    errors: Counter = Counter(_group(sums, "error"))
    metrics: dict[str, Any] = {"step": step, **means}
    metrics["format"] = sums["format"] / n
    metrics["tool_calls"] = sums["tool_calls"]
    metrics["tool_failures"] = errors.total()
    metrics["tool_errors"] = dict(errors.most_common(3))
    metrics["response_tokens"] = sums["response_tokens"] / n
    metrics["zero_std_groups"] = sums["zero_std_groups"]
    metrics |= {key: update[key] for key in LOSS}
    if setup.config.imitates:  # the model did not sample these tokens
        metrics["logp_gap"] = math.nan
        metrics["logp_gap_max"] = math.nan
    metrics["status"] = _group(sums, "status")
    metrics["shapes"] = _group(sums, "shape")
    metrics["by_category"] = _by_category(episodes, setup)
    metrics["lr"] = lr
    metrics["seconds"] = {phase: round(value, 3) for phase, value in seconds.items()}
    tokens: dict[str, float] = {key: counts[key] for key in ("prefilled", "prefilled_unique", "sampled")}
    tokens |= {key: update[key] for key in ("trained", "trained_unique")}
    metrics["tokens"] = tokens
    metrics |= _extras(setup, batch, update, sums)
    encoded = counts["images_encoded"] + update["encoded"]
    metrics["images"] = {"distinct": counts["images_distinct"], "encoded": encoded}
    return metrics


def _extras(
    setup: Setup[Config], batch: Batch, update: Mapping[str, float], sums: Mapping[Any, float]
) -> dict[str, Any]:
    """What not every run has: a judge's verdicts, dynamic sampling, masked rollouts, outgrown slots, and paid calls.

    The judge disagrees where it finds an answer right: it is asked about those that exact match rejects.
    """
    extras: dict[str, Any] = {}
    if setup.judge:
        verdicts = _group(sums, "judged")
        right, wrong = verdicts.get(JUDGED_RIGHT, 0), verdicts.get(JUDGED_WRONG, 0)
        extras["judged"] = verdicts
        extras["judge_disagrees"] = right / (right + wrong) if right + wrong else math.nan
        extras["judge_error"] = next(iter(_group(sums, "judge_error")), "")
    if setup.config.resample:
        extras["resampled"] = {
            "draws": batch.draws,
            "replaced": batch.asked - setup.config.questions,
            "zero_std_first": batch.zero_std_first,
            "short_of_budget": batch.short_of_budget,
        }
    if setup.config.mask_truncated or setup.config.fatal_errors:
        extras["spared"] = sums["spared"]
    if setup.config.importance_bound:
        extras["masked_fraction"] = update["masked_fraction"]
    if batch.counts["parked"]:
        extras["parked"] = batch.counts["parked"]
    if setup.spending:
        extras["spent"] = setup.spending.spent
    return extras


def _sums(batch: Batch) -> dict[Any, float]:
    """What the ranks add up. A key that is a pair belongs to a group of counts: (group, name)."""
    episodes = batch.all
    sums: dict[Any, float] = {
        "format": sum(episode.reward_parts["format"] for episode in episodes),
        "tool_calls": sum(episode.searches() for episode in episodes),
        "response_tokens": sum(sum(episode.loss_mask) for episode in episodes),
        "zero_std_groups": batch.assigned.zero_std_groups,
        "spared": batch.assigned.spared,
    }
    sums |= Counter(("status", episode.status) for episode in episodes)
    sums |= Counter(("shape", _shape(episode)) for episode in episodes)
    sums |= Counter(("judged", episode.judged) for episode in episodes if episode.judged)
    if batch.judge_error:
        sums["judge_error", batch.judge_error] = 1
    for error, count in evaluate.tool_errors(episodes).items():
        sums["error", error] = count
    return sums


def _group(sums: Mapping[Any, float], group: str) -> dict[str, float]:
    """The counts of a group by name."""
    found = {}
    for key, value in sums.items():
        if isinstance(key, tuple) and key[0] == group:
            found[key[1]] = value
    return found


def _shape(episode: Episode) -> str:
    actions = [turn.action for turn in episode.turns if turn.role == "assistant"]
    return shape_name(actions, episode.status)


def _by_category(episodes: Sequence[Episode], setup: Setup) -> dict[str, dict[str, float]]:
    """Each category's number of episodes and search ratio."""
    found = {}
    for category, means in evaluate.by_category(episodes, setup.ranks).items():
        found[category] = {"n": means["n"], "search_ratio": means["search_ratio"]}
    return found


def note_alarms(metrics: dict[str, Any], history: Sequence[dict], setup: Setup[Config]) -> list[str]:
    """Add the words of a step's alarms to its metrics. Returns the sentences that are to be printed.

    `history`: the metrics of the steps before.
    """
    config = setup.config
    can_search = config.max_turns > 1 and any(tool.limit for tool in setup.toolbox.tools.values())
    dtype = str(setup.dtype).removeprefix("torch.")
    found = alarms.alarms([*history, metrics], dtype, can_search and not config.imitates)
    if found:
        metrics["alarms"] = list(found)
    return alarms.to_say(found, history)
