"""The numbers of a seed: what each way of answering reaches, and whether searching follows prior knowledge.

Everything is about the countries that training leaves out. `prior` is the share of right answers that the untrained
language model gave to a fact (`knowledge.py`). Ranges are 95 % of a bootstrap over countries, for the questions about
one country are not independent.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from examples.flags.countries import FACTS
from examples.flags.knowledge import Known
from examples.flags.questions import KNOWN_FROM, Row, read_rows

CATEGORIES = ("familiar", "known_new_fact", "unfamiliar", "unfamiliar_fact")
WAYS = {  # by the names of the evaluations
    "before": "after imitation",
    "never-before": "— never searching",
    "always-before": "— always searching",
    "after": "**after GRPO**",
    "never-after": "— never searching",
    "always-after": "— always searching",
    "greedy": "— greedy",
    "unpenalised": "GRPO without the penalty",
    "informed": "imitation of right decisions",
}
BINS = (0.0, 1 / 16, 0.25, 0.5, 0.75, 1.01)  # of prior knowledge, the lower end included
DRAWS = 1000


def write(folder: Path, known: Sequence[Known], known_after: Sequence[Known]) -> str:
    """Write report.md and curve.png. Returns the text. Raises UserError where a file of an evaluation is missing."""
    asked = {row["id"]: row for row in read_rows(folder / "data" / "test.jsonl")}
    answered = {}
    for way in WAYS:
        lines = []
        for file in sorted(folder.glob(f"eval-{way}*/episodes.jsonl")):  # always: names and facts
            if file.parent.name in (f"eval-{way}", f"eval-{way}-names", f"eval-{way}-facts"):
                lines += read_rows(file)
        if lines:  # the comparisons are not always there
            answered[way] = [{**line, **asked[line["id"]]} for line in lines]
    pieces = [table(answered), familiarity(answered, known), by_kind(answered, known), kept(known, known_after)]
    text = "\n\n".join(pieces) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")
    draw(answered, known, folder / "curve.png")
    return text


def table(answered: dict[str, list[Row]]) -> str:
    """Accuracy, reward and searches a question; accuracy, image and text searches by category."""
    heads = ["", "accuracy", "reward", "searches"]
    heads += [f"{name}: acc · img · text" for name in CATEGORIES]
    rows = [heads, ["---"] * len(heads)]
    for way, lines in answered.items():
        searches = mean(lines, "search_ratio_image") + mean(lines, "search_ratio_text")
        low, high = interval(lines, lambda some: mean(some, "accuracy"))
        row = [WAYS[way], f"{mean(lines, 'accuracy'):.3f} ({low:.2f} to {high:.2f})"]
        row += [f"{mean(lines, 'reward'):.3f}", f"{searches:.2f}"]
        for category in CATEGORIES:
            some = [line for line in lines if line["category"] == category]
            numbers = [mean(some, key) for key in ("accuracy", "search_ratio_image", "search_ratio_text")]
            row.append(" · ".join(map(number, numbers)))
        rows.append(row)
    return markdown(rows)


def mean(lines: Sequence[Row], measure: str) -> float:
    """NaN of nothing."""
    return sum(line["measures"][measure] for line in lines) / len(lines) if lines else math.nan


def number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def interval(lines: Sequence[Row], measure: Callable[[Sequence[Row]], float]) -> tuple[float, float]:
    """The middle 95 % of a measure when countries are drawn with replacement."""
    by_country: dict[str, list[Row]] = defaultdict(list)
    for line in lines:
        by_country[line["country"]].append(line)
    groups = list(by_country.values())
    generator = np.random.default_rng(0)
    measured = []
    for _ in range(DRAWS):
        drawn: list[Row] = []
        for place in generator.integers(0, len(groups), len(groups)):
            drawn += groups[place]
        measured.append(measure(drawn))
    low, high = np.nanquantile(measured, [0.025, 0.975])
    return float(low), float(high)


# ---- searching against prior knowledge


def familiarity(answered: dict[str, list[Row]], known: Sequence[Known]) -> str:
    """Text searches by prior knowledge, and their rank correlation, before and after: over all facts, and within kinds.

    A model that searches for capitals and never for continents has a correlation over all facts and none within kinds.
    """
    names = ["0", "below 1/4", "below 1/2", "below 3/4", "to 1"]
    heads = ["text searches, by prior knowledge", *names, "rank correlation", "within kinds", "of all, by `prompted`"]
    rows = [heads, ["---"] * len(heads)]
    for way in ("before", "after"):
        lines = with_prior(answered[way], known)
        row = [WAYS[way]]
        for share, count in by_bin(lines):
            row.append(f"{number(share)} of {count}")
        for correlation in (over_all, within_kinds):
            low, high = interval(lines, correlation)
            row.append(f"{number(correlation(lines))} ({number(low)} to {number(high)})")
        row.append(number(over_all(lines, "prompted")))
        rows.append(row)
    return markdown(rows)


def by_kind(answered: dict[str, list[Row]], known: Sequence[Known]) -> str:
    """Text searches for each kind of fact, where the untrained model knew it and where not."""
    rows = [["text searches, not known · known", *FACTS], ["---"] * (1 + len(FACTS))]
    for way in ("before", "after"):
        lines = with_prior(answered[way], known)
        row = [WAYS[way]]
        for kind in FACTS:
            some = [line for line in lines if line["kind"] == kind]
            is_known = [line for line in some if line["sampled"] >= KNOWN_FROM]
            is_not = [line for line in some if line["sampled"] < KNOWN_FROM]
            row.append(" · ".join(number(mean(part, "search_ratio_text")) for part in (is_not, is_known)))
        rows.append(row)
    return markdown(rows)


def with_prior(lines: Sequence[Row], known: Sequence[Known]) -> list[Row]:
    """The lines about facts, each with what was known of it."""
    by_fact = {(each.country, each.kind): each for each in known}
    found = []
    for line in lines:
        prior = by_fact.get((line["country"], line["kind"]))
        if prior:
            found.append({**line, "sampled": prior.sampled, "prompted": prior.prompted})
    return found


def by_bin(lines: Sequence[Row]) -> list[tuple[float, int]]:
    """The share of text searches, and the number of questions, in each bin of prior knowledge."""
    found = []
    for low, high in zip(BINS, BINS[1:]):
        inside = [line for line in lines if low <= line["sampled"] < high]
        found.append((mean(inside, "search_ratio_text"), len(inside)))
    return found


def over_all(lines: Sequence[Row], prior: str = "sampled") -> float:
    """The rank correlation between prior knowledge and text searches."""
    searched = [line["measures"]["search_ratio_text"] for line in lines]
    return rank_correlation([line[prior] for line in lines], searched)


def within_kinds(lines: Sequence[Row]) -> float:
    """The mean of `over_all` over the kinds of facts."""
    found = []
    for kind in FACTS:
        found.append(over_all([line for line in lines if line["kind"] == kind]))
    defined = [value for value in found if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, equal values with the mean of their ranks. NaN where all are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return math.nan
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def ranks(values: Sequence[float]) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)  # the rank of each distinct value's last occurrence
    return (last - (counts - 1) / 2)[place]


def kept(known: Sequence[Known], known_after: Sequence[Known]) -> str:
    """Whether imitation cost knowledge: right answers before and after it, among those that are no refusal."""
    about = {each.country for each in known_after}
    rows = [["right when asked in words", *FACTS], ["---"] * (1 + len(FACTS))]
    for name, measured in (("untrained", known), ("after imitation, unless it refuses", known_after)):
        row = [name]
        for kind in FACTS:
            some = [each for each in measured if each.kind == kind and each.country in about]
            given = sum(1 - each.refused for each in some)
            row.append(number(sum(each.sampled for each in some) / given if given else math.nan))
        rows.append(row)
    return markdown(rows)


def draw(answered: dict[str, list[Row]], known: Sequence[Known], file: Path) -> None:
    """The shares of `familiarity` as a curve."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    middles = [(low + min(high, 1)) / 2 for low, high in zip(BINS, BINS[1:])]
    for way, colour in (("before", "#9a9a9a"), ("after", "#1f77b4")):
        shares = [share for share, _ in by_bin(with_prior(answered[way], known))]
        axes.plot(middles, shares, marker="o", color=colour, label=WAYS[way].strip("*"))
    axes.set_xlabel("right answers of the untrained model, share of its samples")
    axes.set_ylabel("share of text searches")
    axes.set_ylim(0, 1)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
