"""The line that metrics.jsonl gets for a training step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmsr import evaluate
from mmsr.assemble import Setup
from mmsr.config import Config
from mmsr.episode import Episode
from mmsr.report import alarms
from mmsr.report.html import shape_name

LOSS = ("loss", "kl", "entropy", "clip_fraction", "logp_gap", "logp_gap_max", "grad_norm", "skipped_updates")


def step_metrics(
    step: int,
    setup: Setup[Config],
    episodes: Sequence[Episode],
    counts: Mapping[str, float],
    update: Mapping[str, float],
    zero_std_groups: int,
    lr: float,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """A step in numbers. `episodes` and `zero_std_groups` are this rank's; `counts` and `update` are those of all."""
    means = evaluate.summary(episodes, setup.ranks)
    n = means.pop("n")
    sums = setup.ranks.sum(_sums(episodes, zero_std_groups))
    errors: Counter = Counter(_group(sums, "error"))
    loss = {key: update[key] for key in LOSS}
    if setup.config.imitates:  # the model did not sample these tokens
        loss |= {"logp_gap": math.nan, "logp_gap_max": math.nan}
    return {
        "step": step,
        **means,
        "format": sums["format"] / n,
        "tool_calls": sums["tool_calls"],
        "tool_failures": errors.total(),
        "tool_errors": dict(errors.most_common(3)),
        "response_tokens": sums["response_tokens"] / n,
        "zero_std_groups": sums["zero_std_groups"],
        **loss,
        "status": _group(sums, "status"),
        "shapes": _group(sums, "shape"),
        "by_category": _by_category(episodes, setup),
        "lr": lr,
        "seconds": {phase: round(value, 3) for phase, value in seconds.items()},
        "tokens": {
            "prefilled": counts["prefilled"],
            "prefilled_unique": counts["prefilled_unique"],
            "sampled": counts["sampled"],
            "trained": update["trained"],
            "trained_unique": update["trained_unique"],
        },
        **({"spent": setup.spending.spent} if setup.spending else {}),
        "images": {"distinct": counts["images_distinct"], "encoded": counts["images_encoded"] + update["encoded"]},
    }


def _sums(episodes: Sequence[Episode], zero_std_groups: int) -> dict[Any, float]:
    """What the ranks add up. A key that is a pair belongs to a group of counts: (group, name)."""
    sums: dict[Any, float] = {
        "format": sum(episode.reward_parts["format"] for episode in episodes),
        "tool_calls": sum(episode.searches() for episode in episodes),
        "response_tokens": sum(sum(episode.loss_mask) for episode in episodes),
        "zero_std_groups": zero_std_groups,
    }
    sums |= Counter(("status", episode.status) for episode in episodes)
    sums |= Counter(("shape", _shape(episode)) for episode in episodes)
    sums |= {("error", error): count for error, count in evaluate.tool_errors(episodes).items()}
    return sums


def _group(sums: Mapping[Any, float], group: str) -> dict[str, float]:
    return {key[1]: value for key, value in sums.items() if isinstance(key, tuple) and key[0] == group}


def _shape(episode: Episode) -> str:
    actions = [turn.action for turn in episode.turns if turn.role == "assistant"]
    return shape_name(actions, episode.status)


def _by_category(episodes: Sequence[Episode], setup: Setup) -> dict[str, dict[str, float]]:
    found = evaluate.by_category(episodes, setup.ranks)
    return {name: {"n": of["n"], "search_ratio": of["search_ratio"]} for name, of in found.items()}


def note_alarms(metrics: dict[str, Any], history: list[dict], setup: Setup[Config]) -> list[str]:
    """Add a step's metrics to the `history` of the steps before, with the words of its alarms.

    Returns the sentences that are to be printed.
    """
    config = setup.config
    can_search = config.max_turns > 1 and any(tool.limit for tool in setup.toolbox.tools.values())
    dtype = str(setup.dtype).removeprefix("torch.")
    found = alarms.alarms([*history, metrics], dtype, can_search and not config.imitates)
    if found:
        metrics["alarms"] = list(found)
    sentences = alarms.to_say(found, history)
    history.append(metrics)
    return sentences
