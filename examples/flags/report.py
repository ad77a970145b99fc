"""The numbers of a seed: what each way of answering reaches, and whether searching follows prior knowledge.

Everything is about the 75 countries of which training asked nothing. `prior` is the share of right answers that the
untrained language model gave to a fact, of 16 at T = 1 (`knowledge.py`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from examples.flags.knowledge import Known

CATEGORIES = ("known", "new_fact", "new_flag", "new_both")
WAYS = {
    "before": "before, T = 1",
    "always": "always, T = 1",
    "never": "never, T = 1",
    "after": "**after, T = 1**",
    "after-greedy": "after, greedy",
}
PARTS = {"always": ("always-facts", "always-names")}  # of a way with more than one evaluation
BINS = (0.0, 1 / 16, 0.25, 0.5, 0.75, 1.01)  # of prior knowledge, the lower end included


def write(folder: Path, known: Sequence[Known]) -> str:
    """Write report.md and curve.png. Returns the text."""
    asked = read_lines(folder / "data" / "test.jsonl")
    answered = {}
    for way in WAYS:
        answered[way] = []
        for part in PARTS.get(way, (way,)):
            answered[way] += read_lines(folder / f"eval-{part}" / "episodes.jsonl")
    prior = {(each.country, each.kind): each.sampled for each in known}
    text = "\n".join([table(answered), "", *familiarity(asked, answered, prior), ""])
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw(asked, answered, prior, folder / "curve.png")
    return text


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def table(answered: dict[str, list[dict]]) -> str:
    """Accuracy, reward and searches a question; accuracy, image and text searches by category."""
    heads = ["", "accuracy", "reward", "searches"]
    heads += [f"{name}: acc · img · text" for name in CATEGORIES]
    rows = [heads, ["---"] * len(heads)]
    for way, name in WAYS.items():
        lines = answered[way]
        searches = mean(lines, "search_ratio_image") + mean(lines, "search_ratio_text")
        row = [name, f"{mean(lines, 'accuracy'):.3f}", f"{mean(lines, 'reward'):.3f}", f"{searches:.2f}"]
        for category in CATEGORIES:
            some = [line for line in lines if line["category"] == category]
            numbers = [mean(some, key) for key in ("accuracy", "search_ratio_image", "search_ratio_text")]
            row.append(" · ".join(f"{number:.2f}" for number in numbers))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean(lines: Sequence[dict], measure: str) -> float:
    return sum(line["measures"][measure] for line in lines) / max(len(lines), 1)


# ---- searching against prior knowledge


def facts(asked: Sequence[dict], lines: Sequence[dict], prior: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of every question about a fact: prior knowledge of it, and whether words were searched for. (F,) each."""
    known, searched = [], []
    for line in lines:
        question = asked[line["row"]]
        if (question["country"], question["kind"]) in prior:
            known.append(prior[question["country"], question["kind"]])
            searched.append(line["measures"]["search_ratio_text"])
    return np.array(known), np.array(searched)


def familiarity(asked: Sequence[dict], answered: dict[str, list[dict]], prior: dict) -> list[str]:
    """Text searches by prior knowledge, and their rank correlation, before and after."""
    lines = ["| text searches by prior knowledge | 0 | to .25 | to .5 | to .75 | to 1 | rank correlation |"]
    lines.append("|---" * 7 + "|")
    for way in ("before", "after"):
        known, searched = facts(asked, answered[way], prior)
        cells = [f"{share:.2f} ({count})" for share, count in by_bin(known, searched)]
        lines.append(f"| {way} | {' | '.join(cells)} | {rank_correlation(known, searched):.2f} |")
    return lines


def by_bin(known: np.ndarray, searched: np.ndarray) -> list[tuple[float, int]]:
    """The share of searches, and the number of questions, in each bin of prior knowledge."""
    found = []
    for low, high in zip(BINS, BINS[1:]):
        inside = (known >= low) & (known < high)
        found.append((float(searched[inside].mean()) if inside.any() else float("nan"), int(inside.sum())))
    return found


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: the correlation of ranks, equal values with the mean of their ranks. NaN where all are equal."""
    if min(np.ptp(a), np.ptp(b)) == 0:
        return float("nan")
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the rank of each distinct value's last occurrence
    return (last - (counts - 1) / 2)[place]


def draw(asked: Sequence[dict], answered: dict[str, list[dict]], prior: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    middles = [(low + min(high, 1)) / 2 for low, high in zip(BINS, BINS[1:])]
    for way, colour in (("before", "#9a9a9a"), ("after", "#1f77b4")):
        known, searched = facts(asked, answered[way], prior)
        shares = [share for share, _ in by_bin(known, searched)]
        axes.plot(middles, shares, marker="o", color=colour, label=way)
    axes.set_xlabel("right answers of the untrained model, share of 16")
    axes.set_ylabel("share that searches words")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
