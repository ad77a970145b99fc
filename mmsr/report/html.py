"""report.html: what a run's files say, as one page that needs nothing else: curves, tables, a browser of rollouts.

    python -m mmsr.report RUN…

`report.html` beside this file is the page without data; its script draws what is embedded here. A RUN is a folder of
train.py (metrics.jsonl, rollouts/) or of eval.py (results.json, episodes.jsonl). Curves count every rollout, by
metrics.jsonl; of the rollouts themselves, whole groups are embedded, evenly spread, as many as a browser can show.

No more than about twice these is read of the rollouts: a run of the blog's sizes leaves 16,384 a step, and torchrun
kills a run that needs more than 30 seconds for its last report.

A line that is damaged, or none of ours, is left out, and one message names the first of them by file and line.

The traps: `json.dumps` leaves `</script>` as it is, so every `<` of the data is written as \\u003c; a script or a style
that is not the page's own is refused by its content-security policy; and the page makes elements and text nodes, never
markup from data.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator, Sequence

from mmsr.system.credentials import hidden
from mmsr.system.errors import UserError
from mmsr.system.files import write_whole

PAGE = Path(__file__).with_name("page.html")
REPORT = "report.html"
MOST_ROLLOUTS = 10_000
MOST_ROLLOUT_BYTES = 24 * 2**20
MOST_PICTURE_BYTES = 8 * 2**20
PLAIN = {"reward", "accuracy", "format", "tool_failures", "response_tokens", "zero_std_groups", "kl", "entropy"}
PLAIN |= {"search_ratio", "search_ratio_image", "search_ratio_text", "clip_fraction", "logp_gap", "logp_gap_max"}
PLAIN |= {"grad_norm", "loss", "lr", "seconds"}
MOST_SHAPES = 7  # in the chart of turn shapes, which has eight colours; the rest are one more
GROUP = re.compile(rb'"group": (\d+),')
MODES = {"eval": "greedy", "eval_sampled": "T = 1"}


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html, whole or not at all. Raises UserError where the folder is none of a run."""
    return _write([Path(folder)], Path(folder) / REPORT, MOST_ROLLOUTS)


def _write(folders: Sequence[Path], out: Path, most_rollouts: int) -> Path:
    share, damage = 1 / len(folders), Damage()
    runs = [_run(folder, most_rollouts * share, MOST_ROLLOUT_BYTES * share, damage) for folder in folders]
    parts = [folder.resolve().parts for folder in folders]
    distinct = len({part[-1:] for part in parts}) == len(parts)
    for run, part in zip(runs, parts):
        run["name"] = "/".join(part[-1:] if distinct else part[-2:])
    data = {"runs": runs, **_pictures(folders, runs)}
    write_whole(out, [_page(data)])
    if damage.places:
        _say_once(f"{out} leaves out {damage}")
    return out


@lru_cache  # a run rewrites its report every now and then
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


class Damage:
    """Where the files of a run are damaged."""

    def __init__(self):
        self.places: list[tuple[Path, int]] = []  # file, and the offset of the line; -1: the whole file

    def add(self, file: Path, offset: int = -1, line: bytes = b"?") -> None:
        """A line that is blank is no damage."""
        if line.strip():
            self.places.append((file, offset))

    def __str__(self) -> str:
        file, offset = self.places[0]
        name = str(file) if offset < 0 else f"{file}, line {_count_lines(file, offset) + 1}"
        more = len(self.places) - 1
        return f"what is damaged: {name}" + (f", and {more} more" if more else "")


def _page(data: dict[str, Any]) -> bytes:
    """The page with `data` in it. Its policy lets the script and style of the file beside this one work, no other."""
    page = PAGE.read_text(encoding="utf-8")
    style, script = (re.search(f"<{tag}>(.*)</{tag}>", page, re.DOTALL)[1] for tag in ("style", "script"))
    page = page.replace("STYLE-HASH", _csp_hash(style)).replace("SCRIPT-HASH", _csp_hash(script))
    head, tail = page.split("DATA-HERE")
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return (head + text + tail).encode("utf-8", "replace")  # JSON may hold lone surrogates, UTF-8 cannot


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- a run


def _run(folder: Path, most_rollouts: float, most_bytes: float, damage: Damage) -> dict[str, Any]:
    """Everything that the page shows of one run, but the pictures."""
    lines = _metrics(folder / "metrics.jsonl", damage)
    steps = {line["step"]: line for line in lines if "reward" in line}
    files = _rollout_files(folder, damage)
    results = _object(folder / "results.json", damage)
    if not (lines or files or results):
        empty = "there is nothing of a run in metrics.jsonl, rollouts/, results.json or episodes.jsonl"
        more = f" (it leaves out {damage})" if damage.places else ""
        raise UserError(f"{folder}: {empty}{more}; name a run's folder")
    told = {step: counts for step, line in steps.items() if (counts := counts_of_step(line))}
    total = sum(_how_many(steps.get(step, {}), file) for step, file in files.items())
    kept, seen = _rollouts(files, total, most_rollouts, most_bytes, damage)
    return {
        "config": {name: _shown(value) for name, value in _object(folder / "config.json", damage).items()},
        "columns": _columns(steps, seen | told),
        "tables": _evaluations([line for line in lines if "eval" in line]) + _results(results),
        "rollouts": kept,
        "total": total,
        "guessed": len(kept) < total and not seen.keys() <= told.keys() | {0},
    }


def _rollout_files(folder: Path, damage: Damage) -> dict[int, Path]:
    """By step; an evaluation's episodes are of no step and stand under 0."""
    files = {0: folder / "episodes.jsonl"}
    for file in sorted(folder.glob("rollouts/step-*.jsonl")):
        if re.fullmatch("[0-9]+", file.stem[5:]):
            files[int(file.stem[5:])] = file
    return {step: file for step, file in files.items() if _is_there(file, damage)}


def _how_many(line: dict[str, Any], file: Path) -> int:
    """Rollouts of a step, from its line of metrics.jsonl; a file is read for it only where that says nothing."""
    return sum((line.get("status") or {}).values()) or _count_lines(file)


def counts_of_step(line: dict[str, Any]) -> Counter:
    """What `count_rollout` finds in a step, from its line of metrics.jsonl; empty if an older version wrote that."""
    counts: Counter = Counter()
    for name, n in (line.get("shapes") or {}).items():
        counts["n"] += n
        counts["shape", name] = n
    for category, found in (line.get("by_category") or {}).items():
        counts["n of", category] = found["n"]
        counts["search", category] = found["n"] * found["search_ratio"]
    return counts


def _rollouts(
    files: dict[int, Path], total: int, most: float, most_bytes: float, damage: Damage
) -> tuple[list, dict[int, Counter]]:
    """Rollouts to embed, of `total`; per step, how many of them have each turn shape, category and search in it."""
    kept, counts = [], {step: Counter() for step in files}
    for step, offset, lines in _spread(files, total, most, most_bytes):
        for line in lines:
            rollout = _sound(line, _check_rollout)
            if rollout is None:
                damage.add(files[step], offset, line)
            else:
                count_rollout(counts[step], rollout)
                kept.append({"step": step, "shape": shape(rollout), **rollout})
            offset += len(line)
    return kept, counts


def _check_rollout(rollout: dict[str, Any]) -> None:
    """Make of it all that the page makes of it. Raises whatever comes of a line that is none of ours."""
    count_rollout(Counter(), rollout)
    if not all(isinstance(name, str) for name in _named([rollout])):
        raise TypeError("a picture is named by text")
    if not isinstance(rollout.get("answers"), list | None) or not all(map(_can_be_shown, rollout.get("turns", ()))):
        raise TypeError("the page cannot show it")


def _can_be_shown(turn: dict[str, Any]) -> bool:
    seen, pieces = turn.get("observation") or {}, turn.get("pieces")
    lists = [pieces, *(seen.get(name) for name in ("titles", "urls", "thumbnails"))]
    if not isinstance(turn.get("text"), str | None) or not all(isinstance(each, list | None) for each in lists):
        return False
    return all(isinstance(piece, list) and len(piece) == 3 and isinstance(piece[0], str) for piece in pieces or ())


def _spread(
    files: dict[int, Path], total: int, most: float, most_bytes: float
) -> Iterator[tuple[int, int, list[bytes]]]:
    """(step, offset, lines) of whole groups: all if they fit, else as many as do, evenly spread over all files' bytes.

    What was taken so far is a share of what may be taken, and the next group is looked for at that share of the bytes.
    So about twice the bytes that are taken are read, however many there are.
    """
    sizes = {step: file.stat().st_size for step, file in files.items()}
    size, begin, rollouts, taken = sum(sizes.values()), 0, 0, 0
    fits = total <= most and size <= most_bytes
    if not most:
        return
    for step, file in files.items():
        with open(file, "rb") as data:
            groups = _Groups(data)
            while True:
                if not fits:
                    groups.skip_to(int(size * max(rollouts / most, taken / most_bytes)) - begin)
                offset, lines = groups.take()
                rollouts, taken = rollouts + len(lines), taken + sum(map(len, lines))
                if not fits and (rollouts > most or taken > most_bytes):
                    return
                if not lines:
                    break
                yield step, offset, lines
        begin += sizes[step]


class _Groups:
    """The lines of a file of rollouts by groups, which stand there one after another."""

    def __init__(self, data: BinaryIO):
        self.data, self.next = data, data.readline()

    def take(self) -> tuple[int, list[bytes]]:
        """Where the next group begins, and its lines; none at the end of the file."""
        offset, lines, group = self.data.tell() - len(self.next), [], _group(self.next)
        while self.next and _group(self.next) == group:
            lines.append(self.next)
            self.next = self.data.readline()
        return offset, lines

    def skip_to(self, offset: int) -> None:
        """Pass over what begins before this byte, and over the rest of the group in which it lies."""
        if offset <= self.data.tell() - len(self.next):
            return
        self.data.seek(offset)
        self.data.readline()  # the rest of a line
        self.next = self.data.readline()
        self.take()


def _group(line: bytes) -> bytes | None:
    """The number of a line's group, without parsing it: within a string of JSON the quotes would have backslashes."""
    found = GROUP.search(line)
    return found[1] if found else None


def count_rollout(counts: Counter, rollout: dict[str, Any]) -> None:
    category = rollout.get("category") or "all"
    counts["n"] += 1
    counts["shape", shape(rollout)] += 1
    counts["n of", category] += 1
    counts["search", category] += any(
        turn.get("role") == "tool" and (turn.get("observation") or {}).get("source") != "limit"
        for turn in rollout.get("turns", ())
    )


def shape(rollout: dict[str, Any]) -> str:
    turns = [turn for turn in rollout.get("turns", ()) if turn.get("role") == "assistant"]
    return shape_name([turn.get("action") for turn in turns], rollout.get("status"))


def shape_name(actions: Iterable[str | None], status: str | None) -> str:
    """The model's actions in order, as in "image → answer", and the status where no answer ended it."""
    names = [action or "?" for action in actions] + ([] if status == "answered" else [f"({status})"])
    return " → ".join(name.removesuffix("_search") for name in names)


def _columns(steps: dict[int, dict], counts: dict[int, Counter]) -> dict[str, list]:
    """What the curves draw, a list per quantity along the steps. None where a step does not have it."""
    counts = {step: seen for step, seen in counts.items() if step}
    rows, labels = [], _shape_labels(counts)
    for step in sorted(steps.keys() | counts.keys()):
        row: dict[str, Any] = {"step": step}
        seen = counts.get(step, Counter())
        for name, value in steps.get(step, {}).items():
            if name in PLAIN:
                row |= {f"{name}/{phase}": x for phase, x in value.items()} if name == "seconds" else {name: value}
        for kind, name in (key for key in seen if isinstance(key, tuple)):
            if kind == "shape":
                row[labels[name]] = row.get(labels[name], 0) + seen[kind, name] / seen["n"]
            elif kind == "search":
                row[f"search/{name}"] = seen[kind, name] / seen["n of", name]
        rows.append(row)
    names = dict.fromkeys([*labels.values(), *(name for row in rows for name in row)])
    return {name: [_rounded(row.get(name, 0 if name.startswith("shape/") else None)) for row in rows] for name in names}


def _shape_labels(counts: dict[int, Counter]) -> dict[str, str]:
    """The column of each turn shape, the commonest first; rare ones share the last."""
    found = Counter()
    for seen in counts.values():
        found.update({key[1]: n for key, n in seen.items() if key[0] == "shape"})
    names = [name for name, _ in found.most_common()]
    return {name: f"shape/{name if i < MOST_SHAPES else 'others'}" for i, name in enumerate(names)}


def _rounded(value: Any) -> Any:
    """Raises TypeError for what is no number."""
    if not isinstance(value, int | float | None):
        raise TypeError("a curve is drawn of numbers")
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _evaluations(lines: list[dict]) -> list[dict]:
    """Rows of the table: the first and the last evaluation, every mode they have."""
    picked = [("before", lines[0]), ("after", lines[-1])] if len(lines) > 1 else [("before", line) for line in lines]
    return [
        {
            "name": f"{when}, {MODES.get(mode, mode.replace('_', ' '))}",
            "step": line.get("step"),
            "by": _by_category(found),
        }
        for mode in dict.fromkeys(mode for _, line in picked for mode in line if mode != "step")
        for when, line in picked
        if isinstance(found := line.get(mode), dict)
    ]


def _results(results: dict[str, Any]) -> list[dict]:
    return [
        {"name": name + _unanswered(found), "step": None, "by": _by_category(found.get("by_category")), "all": found}
        for name, found in results.items()
        if isinstance(found, dict)
    ]


def _by_category(found: Any) -> dict[str, Any]:
    """Without what is damaged."""
    return {name: part for name, part in found.items() if isinstance(part, dict)} if isinstance(found, dict) else {}


def _unanswered(found: dict[str, Any]) -> str:
    """What is in the accuracy of an evaluation without having been a wrong answer."""
    missed, cut = found.get("not_asked"), found.get("cut")
    return f" ({missed or 0} not asked, {cut or 0} cut: counted as wrong)" if missed or cut else ""


# ---- pictures


def _pictures(folders: Sequence[Path], runs: list[dict]) -> dict[str, Any]:
    """Data URLs of the pictures that embedded rollouts name, by digest, while there is room."""
    found, room, missing = {}, MOST_PICTURE_BYTES, 0
    for name, folder in dict.fromkeys((n, f) for f, run in zip(folders, runs) for n in _named(run["rollouts"])):
        file = folder / "images" / f"{name}.jpg"
        if name in found or not re.fullmatch("[0-9a-f]{16}", name):
            continue
        data = file.read_bytes() if file.is_file() else b""
        if not data or len(data) > room:
            missing += 1
            continue
        room -= len(data)
        found[name] = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    return {"pictures": found, "pictures_missing": missing}


def _named(rollouts: list[dict]) -> Iterator[str]:
    for rollout in rollouts:
        yield str(rollout.get("image"))
    for turn in (turn for rollout in rollouts for turn in rollout.get("turns", ())):
        yield from filter(None, (turn.get("observation") or {}).get("thumbnails", ()))


# ---- files that a run may be writing


def _is_there(file: Path, damage: Damage) -> bool:
    """Whether it can be read; a folder or a link to nothing in its place, or a file that may not be, is damage."""
    if file.is_file() and os.access(file, os.R_OK):
        return True
    if file.exists() or file.is_symlink():
        damage.add(file)
    return False


def _metrics(file: Path, damage: Damage) -> list[dict[str, Any]]:
    """The sound lines of metrics.jsonl."""
    lines, offset = [], 0
    with open(file, "rb") if _is_there(file, damage) else nullcontext(()) as data:
        for line in data:
            record = _sound(line, _check_metrics)
            if record is None:
                damage.add(file, offset, line)
            else:
                lines.append(record)
            offset += len(line)
    return lines


def _check_metrics(line: dict[str, Any]) -> None:
    """As `_check_rollout`."""
    if not isinstance(line["step"], int):
        raise TypeError("a step is a whole number")
    counts = counts_of_step(line)
    _columns({line["step"]: line}, {line["step"]: counts} if counts else {})
    sum((line.get("status") or {}).values())


def _sound(line: bytes, check: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
    """The object of a line; None where it is cut short, no object, or nothing that `check` can make something of."""
    for record in _parsed([line]):
        try:
            check(record)
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
            return None
        return record
    return None


def _parsed(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The objects of these lines, without those that are none. JSON has no infinity: such a number becomes null."""
    for line in lines:
        try:
            text = line.decode("utf-8", "replace").removeprefix("\ufeff")  # which some editors put first
            record = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _object(file: Path, damage: Damage) -> dict[str, Any]:
    """The object of a whole file; empty where that is missing, or damaged."""
    if not _is_there(file, damage):
        return {}
    for found in _parsed([file.read_bytes()]):
        return found
    damage.add(file)
    return {}


def _shown(value: Any) -> Any:
    """An option's value; older runs' addresses may hold a password."""
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return hidden(value) if isinstance(value, str) else value


def _count_lines(file: Path, before: float = math.inf) -> int:
    """How many lines end in a file, or in its first bytes."""
    count, at = 0, 0
    with open(file, "rb") as data:
        while block := data.read(int(min(2**20, before - at))):
            count += block.count(b"\n")
            at += len(block)
    return count


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m mmsr.report", description="Write report.html for a run, or for several."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of train.py or eval.py")
    parser.add_argument("--out", type=Path, help=f"the file; otherwise RUN/{REPORT}, or ./{REPORT} for several runs")
    parser.add_argument("--rollouts", type=int, default=MOST_ROLLOUTS, help=f"embed at most so many ({MOST_ROLLOUTS})")
    given = parser.parse_args(argv)
    out = given.out or (given.runs[0] / REPORT if len(given.runs) == 1 else Path(REPORT))
    try:
        if given.rollouts < 0:
            raise UserError(f"--rollouts {given.rollouts}: give a number from 0")
        print(_write(given.runs, out, given.rollouts))
    except (UserError, OSError) as error:
        print(f"mmsr.report: {error}", file=sys.stderr)
        raise SystemExit(2) from None
