"""Which concepts a data set begins with, which questions it ends with, and how it is written down.

The ratio of questions that need a search to those that do not is kept even where there is too little of one kind:
trained on another ratio, a model learns to search always, or never. No concept, picture or near-duplicate of a picture
comes to stand in two splits.
"""

from __future__ import annotations

import html
import json
import re
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mmsr.construct.dedup import near_duplicates, normal, short_id
from mmsr.construct.questions import PROMPTS, Shelf
from mmsr.system.errors import UserError
from mmsr.system.files import beside, write_whole
from mmsr.system.images import decode, jpeg

FAMILIAR, UNFAMILIAR = "familiar", "unfamiliar"
LONGEST = 80  # characters of a concept
FREE, REQUIRED = "search_free", "search_required"  # FVQA's categories
SCHEMA = pa.schema(
    {
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "images": pa.list_(pa.struct({"bytes": pa.binary(), "path": pa.string()})),
        "reward_model": pa.struct(
            {"candidate_answers": pa.string(), "ground_truth": pa.string(), "style": pa.string()}
        ),
        "data_source": pa.string(), "image_urls": pa.null(), "data_id": pa.string(), "category": pa.string(),
        **dict.fromkeys(("concept", "section", "group", "need", "tries", "evidence"), pa.string()),
        **dict.fromkeys(("page_url", "page_title", "page_sha256", "image_url", "licence"), pa.string()),
    }
)  # fmt: skip


def draw_concepts(metadata: Any, counts: Any, n: int, familiar: float, unfamiliar: float, seed: int) -> list[dict]:
    """`n` concepts, half from the head of the distribution and half from its tail, by a hash of the seed.

    `familiar` and `unfamiliar` are the counts from and up to which a concept belongs to them, or quantiles (at most 1)
    of all counts. Entries that are written alike but for case, blanks and punctuation are one. Without `counts` there
    is one section, "". Raises UserError.
    """
    best = _distinct_entries(metadata, counts)
    if counts is None:
        sections = {"": list(best)}
    else:
        seen = [count for count, _ in best.values() if count > 0]
        if not seen:
            raise UserError("--counts: no entry of --metadata has a count; give the two files of one release")
        low, high = (float(np.quantile(seen, limit)) if limit <= 1 else limit for limit in (unfamiliar, familiar))
        if low >= high:
            raise UserError(f"--unfamiliar reaches up to {low:g} and --familiar begins at {high:g}: leave room between")
        sections = {
            FAMILIAR: [key for key, (count, _) in best.items() if count >= high],
            UNFAMILIAR: [key for key, (count, _) in best.items() if 0 < count <= low],
        }
    return [
        {"id": short_id(key), "concept": best[key][1], "count": best[key][0], "section": section}
        for section, keys in sections.items()
        for key in sorted(keys, key=lambda key: short_id(str(seed), key))[: n // len(sections)]
    ]


def _distinct_entries(metadata: Any, counts: Any) -> dict[str, tuple[float, str]]:
    """Count and spelling by normal form, of the spelling with most."""
    if not isinstance(metadata, list) or not all(isinstance(entry, str) for entry in metadata):
        raise UserError("--metadata: not a JSON list of texts; give MetaCLIP's metadata.json")
    numbers = counts.values() if isinstance(counts, dict) else [0 if counts is None else "none"]
    if not all(type(number) in (int, float) for number in numbers):
        raise UserError("--counts: not a JSON object of numbers; give MetaCLIP's entry_counts_400m.json")
    best: dict[str, tuple[float, str]] = {}
    for entry in metadata:
        if (key := normal(entry)) and len(entry) <= LONGEST:
            best[key] = max(best.get(key, (-1, "")), ((counts or {}).get(entry, 0), entry))
    return best


def category(question: dict) -> str:
    return FREE if question["need"] == "free" else REQUIRED


def families(questions: Sequence[dict]) -> list[int]:
    """A number for each question, the same for those that share a concept, a picture or a near-duplicate of it."""
    parent = list(range(len(questions)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    first: dict[tuple[str, str], int] = {}
    for place, question in enumerate(questions):
        for kind, value in (("concept", normal(question["concept"])), ("picture", question["picture"])):
            if value:
                parent[root(place)] = root(first.setdefault((kind, value), place))
    for earlier, later in near_duplicates([question["hash"] for question in questions]):
        parent[root(later)] = root(earlier)
    return [root(place) for place in range(len(questions))]


def part(questions: Sequence[dict], share: float, seed: int) -> dict[str, list[dict]]:
    """Whole families, about `share` of each kind of question, go to the test split and the others to training."""
    members: dict[int, list[dict]] = defaultdict(list)
    for family, question in zip(families(questions), questions):
        members[family].append(question)
    splits: dict[str, list[dict]] = {"train": [], "test": []}
    seen, tested = Counter(), Counter()
    for family in sorted(members.values(), key=lambda family: short_id(str(seed), family[0]["id"])):
        kind = category(family[0])
        seen[kind] += len(family)
        test = tested[kind] + len(family) / 2 <= share * seen[kind]
        tested[kind] += len(family) * test
        splits["test" if test else "train"] += family
    return splits


def balanced(questions: Sequence[dict], n: int, seed: int) -> list[dict]:
    """`n` questions, one from each pair of group and section in turn as long as it has any."""
    cells: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for question in sorted(questions, key=lambda question: short_id(str(seed), question["id"]), reverse=True):
        cells[question["group"], question["section"]].append(question)
    chosen: list[dict] = []
    while len(chosen) < n:
        chosen += [cells[cell].pop() for cell in sorted(cells) if cells[cell]][: n - len(chosen)]
    return chosen


def choose(questions: Sequence[dict], sizes: dict[str, int], required: float, seed: int) -> dict[str, list[dict]]:
    """Splits of the sizes asked for, `required` of each needing a search; where there is too little, smaller ones.

    The ratio is kept, for it is what keeps a model from searching always. Raises UserError where nothing is left.
    """
    pools = part(questions, sizes["test"] / max(sum(sizes.values()), 1), seed)
    have = {split: Counter(map(category, pool)) for split, pool in pools.items()}
    wish = {s: {REQUIRED: round(n * required), FREE: n - round(n * required)} for s, n in sizes.items()}
    scale = min([1.0, *(have[s][kind] / n for s, kinds in wish.items() for kind, n in kinds.items() if n)])
    if not scale:
        raise UserError(
            f"of {len(questions)} questions {dict(have['train'])} could go to training and {dict(have['test'])} to "
            f"testing: not one of each kind that is asked for; give more --concepts, or another --required or --test"
        )
    chosen = {}
    for split, kinds in wish.items():
        of = {kind: [q for q in pools[split] if category(q) == kind] for kind in kinds}
        drawn = [q for kind, n in kinds.items() for q in balanced(of[kind], int(n * scale), seed)]
        chosen[split] = sorted(drawn, key=lambda question: short_id(str(seed), "order", question["id"]))
    return chosen


def write_parquet(path: Path, questions: Iterable[dict], shelf: Shelf) -> None:
    """FVQA's columns and our own, read by formats.py; whole or not at all."""
    questions = iter(questions)
    with beside(path) as side, pq.ParquetWriter(side, SCHEMA) as writer:
        while rows := [_row(question, shelf) for question in islice(questions, 64)]:
            writer.write_table(pa.Table.from_pylist(rows, SCHEMA))


def _row(question: dict, shelf: Shelf) -> dict:
    page, aliases = question["page"], json.dumps(question["aliases"], ensure_ascii=False)
    return {
        "prompt": [{"content": question["question"], "role": "user"}],
        "images": [{"bytes": shelf.read(question["picture"]), "path": question["picture"]}],
        "reward_model": {"candidate_answers": aliases, "ground_truth": question["answer"], "style": "rule"},
        "data_source": question.get("source", "mmsr/construct"), "image_urls": None, "data_id": question["id"],
        "category": category(question) if question.get("need") else "", "need": question.get("need", ""),
        "tries": json.dumps(question.get("tries")),
        **{key: question[key] for key in ("concept", "section", "group", "evidence", "licence")},
        **{f"page_{key}": page[key] for key in ("url", "title", "sha256")}, "image_url": question["address"],
    }  # fmt: skip


def write_card(folder: Path, splits: dict[str, list[dict]], report: dict, cost: dict, shelf: Shelf) -> None:
    """card.json, card.md and a few small pictures."""
    counted = {
        split: {"questions": len(chosen), "concepts": len({q["concept"] for q in chosen if q["concept"]})}
        | {name: dict(sorted(Counter(map(of, chosen)).items())) for name, of in COUNTED.items()}
        for split, chosen in splits.items()
    }
    card = {"splits": counted, "stages": report, "cost": cost}
    write_whole(folder / "card.json", [json.dumps(card, indent=2, ensure_ascii=False).encode()])
    samples = folder / "samples"
    samples.mkdir(exist_ok=True)
    shown = []
    for question in splits["train"][:12]:
        small = jpeg(decode(shelf.read(question["picture"])), 224, 32 * 1024)
        write_whole(samples / f"{question['picture']}.jpg", [small])
        asked, answer, about = (plain(question[key]) for key in ("question", "answer", "concept"))
        shown.append(f"| ![](samples/{question['picture']}.jpg) | {asked} | {answer} | {about} | {question['need']} |")
    stages = [
        f"| {name} | {done['items']} | {done['records']} | "
        f"{'; '.join(f'{plain(reason)} {n}' for reason, n in done['reasons'].items())} | "
        f"{'; '.join(f'{kind} {n}' for kind, n in done['postponed'].items())} |"
        for name, done in report.items()
    ]
    sizes = [f"- **{split}**: {json.dumps(about, ensure_ascii=False)}" for split, about in counted.items()]
    text = (PROMPTS / "card.md").read_text(encoding="utf-8")
    fields = {"splits": sizes, "stages": stages, "cost": [json.dumps(cost)], "samples": shown}
    filled = re.sub(r"\{(\w+)\}", lambda place: "\n".join(fields[place[1]]), text)
    write_whole(folder / "card.md", [filled.encode()])


COUNTED = {
    "category": category,
    "need": lambda question: question["need"],
    "group": lambda question: question["group"],
    "section": lambda question: question["section"],
}


def plain(text: str) -> str:
    """A stranger's text in a Markdown table."""
    return html.escape(" ".join(text.split())).replace("|", "&#124;").replace("[", "&#91;")
