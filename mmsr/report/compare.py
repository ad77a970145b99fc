"""A model's results in a table, beside what the paper and its blog report for the same benchmark.

Their numbers are in `published.tsv`, in per cent: accuracy by exact match and by an LLM as judge, and the share of
answers with a search, each row with its source. They are theirs, from their set of questions and their search engine.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

from mmsr.evaluate import aligned

PUBLISHED = Path(__file__).with_name("published.tsv")


def published(name: str, layout: str) -> list[dict[str, str]]:
    """The paper's and the blog's rows for the benchmark that a file's name, or else its layout, tells of."""
    with PUBLISHED.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    named = ("infoseek", "mmsearch", "simplevqa", "livevqa", "civqa", "fvqa")  # mmsearch_r1_infoseek… is InfoSeek
    benchmark = next((benchmark for benchmark in named if benchmark in name.lower()), layout)
    return [row for row in rows if row["benchmark"] == benchmark]


COLUMNS = {
    "exact": "accuracy", "strict": "accuracy_strict", "judge": "accuracy_judge", "searched": "search_ratio",
    "by image": "search_ratio_image", "by text": "search_ratio_text", "calls": "calls_ratio",
}  # fmt: skip


def report(name: str, mode: str, found: Mapping[str, Any], others: Sequence[Mapping[str, str]]) -> str:
    """A text table in per cent: this run, its interval, its categories, and published rows."""
    rows = [[f"{name} ({found['n']})", *COLUMNS], [f"this run, {mode}", *_cells(found)]]
    bounds = {key: "–".join(f"{100 * bound:.1f}" for bound in both) for key, both in found["interval"].items()}
    rows.append(["  95 % interval", *(bounds.get(key, "") for key in COLUMNS.values())])
    if len(found["by_category"]) > 1:
        rows += [[f"  {its} ({of['n']})", *_cells(of)] for its, of in found["by_category"].items()]
    for row in others:
        shown = [row.get(column) or "" for column in COLUMNS]
        rows.append([f"{row['system']} [{row['source']}: {row['set']}]", *shown])
    return "\n".join([aligned(rows), *_remarks(found)])


def _cells(found: Mapping[str, Any]) -> list[str]:
    return ["–" if found[key] is None else f"{100 * found[key]:.1f}" for key in COLUMNS.values()]


def _remarks(found: Mapping[str, Any]) -> Iterable[str]:
    yield (
        f"{found['turns']:.2f} turns, {found['tokens']:.0f} tokens of which {found['tokens_sampled']:.0f} sampled per "
        f"question; {found['tool_failures']:.0f} tool calls failed"
    )
    if found["not_asked"] or found["cut"]:
        unasked, cut = f"{found['not_asked']} questions were not asked", f"{found['cut']} rollouts ran out of tokens"
        yield f"WARNING: {unasked}, as their prompt does not fit --max-tokens, and {cut}: all of them count as wrong"
    if found["search_precision"] is not None or found["search_recall"] is not None:
        shares = [found[f"search_{what}"] for what in ("precision", "recall")]
        precise, complete = ("–" if share is None else f"{100 * share:.1f} %" for share in shares)
        yield f"decision to search: precision {precise}, recall {complete}"
    if found["accuracy_judge"] is not None:
        yield f"the judge agrees with exact match on {100 * found['judge_agreement']:.1f} % of what it judged"
    if found["judge_failures"]:
        yield f"WARNING: the judge gave no verdict on {found['judge_failures']} answers; they are not in its column"
