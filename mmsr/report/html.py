"""report.html: a run's files as one self-contained page: a rollout in colour, curves, tables, a browser of rollouts.

    python -m mmsr.report RUN…

`page.html` beside this file is the page without data; its script draws the data that this module embeds. A RUN is a
folder of train.py (metrics.jsonl, rollouts/) or of eval.py (results.json, episodes.jsonl). Curves count every rollout,
from metrics.jsonl. Of the rollouts themselves, as many whole groups are embedded as a browser can show, evenly spread.

At most about twice the embedded bytes are read: a run of the blog's sizes writes 16,384 rollouts a step, and torchrun
kills a run that needs more than 30 seconds for its last report.

A line that is damaged, or that mmsr did not write, is left out, and one message names the first by file and line.

The traps: `json.dumps` leaves `</script>` as it is, so every `<` of the data is written as \\u003c; the page's
content-security policy refuses every other script or style; and the page makes elements and text nodes from data, never
markup.
"""

from __future__ import annotations

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
from mmsr.system.options import Parser
from mmsr.toy.world import SETTINGS

PAGE = Path(__file__).with_name("page.html")
REPORT = "report.html"
MOST_ROLLOUTS = 10_000
MOST_ROLLOUT_BYTES = 24 * 2**20
MOST_PICTURE_BYTES = 8 * 2**20
# The metrics that are drawn as they are.
PLAIN = """
    reward accuracy format tool_failures response_tokens zero_std_groups kl entropy search_ratio search_ratio_image
    search_ratio_text clip_fraction logp_gap logp_gap_max grad_norm loss lr
""".split()
MOST_SHAPES = 7  # in the chart of turn shapes; it has eight colours, and the eighth is for all others
GROUP = re.compile(rb'"group": (\d+),')
MODES = {"eval": "greedy", "eval_sampled": "T = 1"}  # evaluations by their names in metrics.jsonl


def write_report(folder: str | Path) -> Path:
    """Write `folder`/report.html, the whole file or nothing. Raises UserError where the folder holds no run."""
    return _write([Path(folder)], Path(folder) / REPORT, MOST_ROLLOUTS)


def _write(folders: Sequence[Path], out: Path, most_rollouts: int) -> Path:
    share = 1 / len(folders)
    damage = Damage()
    runs = [_run(folder, most_rollouts * share, MOST_ROLLOUT_BYTES * share, damage) for folder in folders]
    paths = [folder.resolve().parts for folder in folders]
    last_names = {path[-1:] for path in paths}
    for run, path in zip(runs, paths):
        run["name"] = "/".join(path[-1:] if len(last_names) == len(paths) else path[-2:])
    data = {"runs": runs, **_pictures(folders, runs)}
    write_whole(out, [_page(data)])
    if damage.places:
        _say_once(f"{out} leaves out {damage}")
    return out


@lru_cache  # a run rewrites its report from time to time
def _say_once(text: str) -> None:
    print(text, file=sys.stderr)


class Damage:
    """The damaged places in the files of a run."""

    def __init__(self):
        self.places: list[tuple[Path, int]] = []  # file and offset of the line; -1: the whole file

    def add(self, file: Path, offset: int = -1, line: bytes = b"?") -> None:
        """Add a file or a line of it; a blank line is not damage."""
        if line.strip():
            self.places.append((file, offset))

    def __str__(self) -> str:
        file, offset = self.places[0]
        name = str(file) if offset < 0 else f"{file}, line {_count_lines(file, offset) + 1}"
        more = len(self.places) - 1
        return f"damaged data: {name}" + (f", and {more} more" if more else "")


def _page(data: dict[str, Any]) -> bytes:
    """The page with `data` in it. Its content-security policy allows only the script and the style of page.html."""
    page = PAGE.read_text(encoding="utf-8")
    style = re.search("<style>(.*)</style>", page, re.DOTALL)[1]
    script = re.search("<script>(.*)</script>", page, re.DOTALL)[1]
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
    """Everything that the page shows of one run, except the pictures."""
    lines = _metrics(folder / "metrics.jsonl", damage)
    steps = {line["step"]: line for line in lines if "reward" in line}
    files = _rollout_files(folder, damage)
    results = _object(folder / "results.json", damage)
    if not (lines or files or results):
        empty = "there is nothing of a run in metrics.jsonl, rollouts/, results.json or episodes.jsonl"
        more = f" (it leaves out {damage})" if damage.places else ""
        raise UserError(f"{folder}: {empty}{more}; name a run's folder")
    all_counts = {step: counts_of_step(line) for step, line in steps.items()}
    recorded = {step: counts for step, counts in all_counts.items() if counts}
    total = sum(_how_many(steps.get(step, {}), file) for step, file in files.items())
    embedded, counted = _rollouts(files, total, most_rollouts, most_bytes, damage)
    config = _object(folder / "config.json", damage)
    return {
        "config": {name: _shown(value) for name, value in config.items()},
        "telling": telling(embedded),
        "columns": _columns(steps, counted | recorded),
        "tables": _evaluations([line for line in lines if "eval" in line], _mix(config)) + _results(results),
        "rollouts": embedded,
        "total": total,
        "guessed": len(embedded) < total and not counted.keys() <= recorded.keys() | {0},
    }


def _rollout_files(folder: Path, damage: Damage) -> dict[int, Path]:
    """The files by step; an evaluation's episodes have no step and are under 0."""
    files = {0: folder / "episodes.jsonl"}
    for file in sorted(folder.glob("rollouts/step-*.jsonl")):
        if re.fullmatch("[0-9]+", file.stem[5:]):
            files[int(file.stem[5:])] = file
    return {step: file for step, file in files.items() if _is_there(file, damage)}


def _how_many(line: dict[str, Any], file: Path) -> int:
    """Rollouts of a step, from its line of metrics.jsonl; the file's lines are counted only where that does not say."""
    return sum((line.get("status") or {}).values()) or _count_lines(file)


def counts_of_step(line: dict[str, Any]) -> Counter:
    """The counts of `count_rollout` for a step, from its line of metrics.jsonl; empty if an older version wrote it."""
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
    """Rollouts to embed, of `total`; and for each step how many of these have each turn shape, category and search."""
    kept = []
    counts: dict[int, Counter] = {step: Counter() for step in files}
    for step, offset, lines in _spread(files, total, most, most_bytes):
        for rollout in _records(lines, files[step], offset, _check_rollout, damage):
            count_rollout(counts[step], rollout)
            kept.append({"step": step, "shape": shape(rollout), **rollout})
    return kept, counts


def _check_rollout(rollout: dict[str, Any]) -> None:
    """Use a rollout as the page does. Raises any of several errors where mmsr did not write it."""
    count_rollout(Counter(), rollout)
    if not all(isinstance(name, str) for name in _named([rollout])):
        raise TypeError("the name of a picture must be text")
    if not isinstance(rollout.get("answers"), list | None):
        raise TypeError("answers must be a list")
    for turn in rollout.get("turns", ()):
        _check_turn(turn)


def _check_turn(turn: dict[str, Any]) -> None:
    """As `_check_rollout`."""
    if not isinstance(turn.get("text"), str | None):
        raise TypeError("the text of a turn must be text")
    seen = turn.get("observation") or {}
    pieces = turn.get("pieces")
    for each in (pieces, seen.get("titles"), seen.get("urls"), seen.get("thumbnails")):
        if not isinstance(each, list | None):
            raise TypeError("pieces and results must be lists")
    for piece in pieces or ():
        if not (isinstance(piece, list) and len(piece) == 3 and isinstance(piece[0], str)):
            raise TypeError("a piece must be a list of text, mask and probability")


def telling(rollouts: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The rollout with which the page opens, as its index and the reason in words. None where there are no rollouts.

    Best is one whose search paid: its answer is right, its reward the highest of its group, and an attempt with fewer
    searches is wrong. Its tokens are in the file. Of the last step that has such rollouts it is one with most searches,
    the first of these. Where no rollout is all of this, the demands are dropped, the last one first.
    """
    if not rollouts:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for rollout in rollouts:
        groups.setdefault(_question(rollout), []).append(rollout)

    def demands(rollout: dict[str, Any]) -> tuple[bool, bool, bool, bool]:
        logged = any(turn.get("pieces") for turn in rollout.get("turns", ()))
        paid = _search_paid(rollout, groups[_question(rollout)])
        return _is_right(rollout), searches(rollout) > 0, paid, logged

    def rank(index: int) -> tuple:
        rollout = rollouts[index]
        return *demands(rollout), rollout["step"], searches(rollout)

    index = max(range(len(rollouts)), key=rank)
    chosen = rollouts[index]
    right, searched, paid, _ = demands(chosen)
    return {"index": index, "why": _why(right, searched, paid, chosen["step"])}


def _search_paid(rollout: dict[str, Any], group: Sequence[dict[str, Any]]) -> bool:
    """Whether a rollout is right, none of its group has a higher reward, and one with fewer searches is wrong."""
    if not _is_right(rollout) or _reward(rollout) < max(map(_reward, group)):
        return False
    return any(not _is_right(other) and searches(other) < searches(rollout) for other in group)


def _why(right: bool, searched: bool, paid: bool, step: int) -> str:
    """The sentence that says by which rule a rollout was chosen."""
    what = "a right answer" if right else "an attempt, as no answer is right,"
    after = " after a search" if searched else ""
    where = " that paid: no reward of its group is higher, and an attempt with fewer searches is wrong" if paid else ""
    last = "; from the last step with one" if step else ""
    return f"Chosen by rule: {what}{after}{where}{last}."


def _question(rollout: dict[str, Any]) -> str:
    """Identifies a group: the attempts at one question of a step, or of a data set that is evaluated."""
    return str([rollout["step"], rollout.get("data"), rollout.get("group")])


def _reward(rollout: dict[str, Any]) -> float:
    """A rollout's reward; 0 where the file has no number."""
    reward = rollout.get("reward")
    return reward if isinstance(reward, int | float) else 0.0


def _is_right(rollout: dict[str, Any]) -> bool:
    parts = rollout.get("reward_parts")
    return isinstance(parts, dict) and parts.get("accuracy") == 1


def _spread(
    files: dict[int, Path], total: int, most: float, most_bytes: float
) -> Iterator[tuple[int, int, list[bytes]]]:
    """(step, offset, lines) of whole groups: all if they fit, otherwise groups that are evenly spread over all bytes.

    After a share of the allowed rollouts or bytes is taken, the next group is taken from the same share of the files'
    bytes. So about twice the taken bytes are read, however large the files are.
    """
    sizes = {step: file.stat().st_size for step, file in files.items()}
    size = sum(sizes.values())
    fits = total <= most and size <= most_bytes
    begin = 0  # of the current file, in the bytes of all files
    rollouts = 0  # taken so far
    taken = 0  # bytes of these
    if not most:
        return
    for step, file in files.items():
        with open(file, "rb") as data:
            groups = _Groups(data)
            while True:
                if not fits:
                    share = max(rollouts / most, taken / most_bytes)
                    groups.skip_to(int(size * share) - begin)
                offset, lines = groups.take()
                rollouts += len(lines)
                taken += sum(map(len, lines))
                if not fits and (rollouts > most or taken > most_bytes):
                    return
                if not lines:
                    break
                yield step, offset, lines
        begin += sizes[step]


class _Groups:
    """The lines of a file of rollouts, group by group. The lines of a group follow one another in the file."""

    def __init__(self, data: BinaryIO):
        self.data = data
        self.next = data.readline()

    def take(self) -> tuple[int, list[bytes]]:
        """The offset of the next group, and its lines; no lines at the end of the file."""
        offset = self.data.tell() - len(self.next)
        lines: list[bytes] = []
        group = _group(self.next)
        while self.next and _group(self.next) == group:
            lines.append(self.next)
            self.next = self.data.readline()
        return offset, lines

    def skip_to(self, offset: int) -> None:
        """Skip all groups that begin before this byte."""
        if offset <= self.data.tell() - len(self.next):
            return
        self.data.seek(offset)
        self.data.readline()  # the rest of a line
        self.next = self.data.readline()
        self.take()


def _group(line: bytes) -> bytes | None:
    """The number of a line's group, without parsing it: inside a JSON string the quotes would have backslashes."""
    found = GROUP.search(line)
    return found[1] if found else None


def count_rollout(counts: Counter, rollout: dict[str, Any]) -> None:
    """Add a rollout to the counts of turn shapes, and of rollouts and searching rollouts by category."""
    category = rollout.get("category") or "all"
    counts["n"] += 1
    counts["shape", shape(rollout)] += 1
    counts["n of", category] += 1
    counts["search", category] += searches(rollout) > 0


def searches(rollout: dict[str, Any]) -> int:
    """How many searches were made. One over its limit is refused and does not count."""
    calls = [turn for turn in rollout.get("turns", ()) if turn.get("role") == "tool" and turn.get("is_search", True)]
    return sum((call.get("observation") or {}).get("source") != "limit" for call in calls)


def shape(rollout: dict[str, Any]) -> str:
    turns = [turn for turn in rollout.get("turns", ()) if turn.get("role") == "assistant"]
    return shape_name([turn.get("action") for turn in turns], rollout.get("status"))


def shape_name(actions: Iterable[str | None], status: str | None) -> str:
    """The model's actions in order, as in "image → answer", then the status of a rollout without an answer."""
    names = [action or "?" for action in actions]
    if status != "answered":
        names.append(f"({status})")
    return " → ".join(name.removesuffix("_search") for name in names)


def _columns(steps: dict[int, dict], counts: dict[int, Counter]) -> dict[str, list]:
    """The data of the curves: for each quantity a list with a value for each step, or None."""
    counts = {step: seen for step, seen in counts.items() if step}
    labels = _shape_labels(counts)
    rows = []
    names = dict.fromkeys(labels.values())  # a set that keeps the order
    for step in sorted(steps.keys() | counts.keys()):
        row = _column_values(steps.get(step, {}), counts.get(step, Counter()), labels)
        rows.append({"step": step} | row)
        names.update(dict.fromkeys(rows[-1]))
    columns = {}
    for name in names:
        missing = 0 if name.startswith("shape/") else None
        columns[name] = [_rounded(row.get(name, missing)) for row in rows]
    return columns


def _column_values(line: dict[str, Any], seen: Counter, labels: dict[str, str]) -> dict[str, Any]:
    """The values of one step, from its line of metrics.jsonl and the counts of its rollouts."""
    row: dict[str, Any] = {}
    for name, value in line.items():
        if name == "seconds":
            for phase, seconds in value.items():
                row[f"seconds/{phase}"] = seconds
        elif name in PLAIN:
            row[name] = value
    for key in seen:
        if not isinstance(key, tuple):
            continue
        kind, name = key
        if kind == "shape":
            row[labels[name]] = row.get(labels[name], 0) + seen[key] / seen["n"]
        elif kind == "search":
            row[f"search/{name}"] = seen[key] / seen["n of", name]
    return row


def _shape_labels(counts: dict[int, Counter]) -> dict[str, str]:
    """The column of each turn shape, the most frequent first; rare shapes share the last."""
    found: Counter = Counter()
    for seen in counts.values():
        found.update({key[1]: n for key, n in seen.items() if key[0] == "shape"})
    names = [name for name, _ in found.most_common()]
    return {name: f"shape/{name}" if i < MOST_SHAPES else "shape/others" for i, name in enumerate(names)}


def _rounded(value: Any) -> Any:
    """A number of five digits for a curve. Raises TypeError where it is not a number."""
    if not isinstance(value, int | float | None):
        raise TypeError("a curve needs numbers")
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _mix(config: dict[str, Any]) -> dict[str, float]:
    """How a training run weights the categories in its means: as in training, in the toy world. Empty: by questions."""
    in_toy_world = config.get("data") == "toy" and not config.get("eval_data")
    toy = str(config.get("toy"))
    return SETTINGS[toy].mix if in_toy_world and toy in SETTINGS else {}


def _evaluations(lines: list[dict], mix: dict[str, float]) -> list[dict]:
    """Rows of the table: the first and the last evaluation, in each of their modes."""
    picked = [("before", line) for line in lines[:1]]
    if len(lines) > 1:
        picked.append(("after", lines[-1]))
    modes = [mode for _, line in picked for mode in line if mode != "step"]
    rows = []
    for mode in dict.fromkeys(modes):  # each once, in order
        for when, line in picked:
            found = line.get(mode)
            if isinstance(found, dict):
                by_category = _by_category(found)
                name = f"{when}, {mode_name(mode)}"
                rows.append({"name": name, "step": line.get("step"), "by": by_category, "mix": mix})
    return rows


def mode_name(mode: str) -> str:
    """What people call a kind of evaluation."""
    return MODES.get(mode, mode.replace("_", " "))


def _results(results: dict[str, Any]) -> list[dict]:
    """Rows of the table from results.json."""
    rows = []
    for name, found in results.items():
        if isinstance(found, dict):
            by_category = _by_category(found.get("by_category"))
            rows.append({"name": name + _unanswered(found), "step": None, "by": by_category, "all": found})
    return rows


def _by_category(found: Any) -> dict[str, Any]:
    """The entries that are not damaged."""
    if not isinstance(found, dict):
        return {}
    return {name: part for name, part in found.items() if isinstance(part, dict)}


def _unanswered(found: dict[str, Any]) -> str:
    """The questions that an evaluation counts as wrong although the model did not answer them wrongly."""
    missed = found.get("not_asked") or 0
    cut = found.get("cut") or 0
    return f" ({missed} not asked, {cut} cut: counted as wrong)" if missed or cut else ""


# ---- pictures


def _pictures(folders: Sequence[Path], runs: list[dict]) -> dict[str, Any]:
    """Data URLs of the pictures that embedded rollouts name, by digest, while there is room."""
    wanted = [(name, folder) for folder, run in zip(folders, runs) for name in _named(_as_shown(run))]
    found: dict[str, str] = {}
    room = MOST_PICTURE_BYTES
    missing = 0
    for name, folder in dict.fromkeys(wanted):  # each once, in order
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


def _as_shown(run: dict[str, Any]) -> list[dict]:
    """A run's rollouts as a reader meets them: the one with which the page opens, then the last step first."""
    rollouts = run["rollouts"]
    opening = [rollouts[run["telling"]["index"]]] if rollouts else []
    return opening + sorted(rollouts, key=lambda rollout: -rollout["step"])


def _named(rollouts: list[dict]) -> Iterator[str]:
    """The names of all pictures: first those of the questions, then the thumbnails."""
    for rollout in rollouts:
        yield str(rollout.get("image"))
    for rollout in rollouts:
        for turn in rollout.get("turns", ()):
            yield from filter(None, (turn.get("observation") or {}).get("thumbnails", ()))


# ---- files that a run may still be writing


def _is_there(file: Path, damage: Damage) -> bool:
    """Whether a file can be read. A folder or a dangling link in its place, or an unreadable file, is damage."""
    if file.is_file() and os.access(file, os.R_OK):
        return True
    if file.exists() or file.is_symlink():
        damage.add(file)
    return False


def _metrics(file: Path, damage: Damage) -> list[dict[str, Any]]:
    """The records of metrics.jsonl."""
    with open(file, "rb") if _is_there(file, damage) else nullcontext(()) as lines:
        return list(_records(lines, file, 0, _check_metrics, damage))


def _check_metrics(line: dict[str, Any]) -> None:
    """As `_check_rollout`."""
    if not isinstance(line["step"], int):
        raise TypeError("a step must be a whole number")
    counts = counts_of_step(line)
    _columns({line["step"]: line}, {line["step"]: counts} if counts else {})
    sum((line.get("status") or {}).values())


def _records(
    lines: Iterable[bytes], file: Path, offset: int, check: Callable[[dict[str, Any]], Any], damage: Damage
) -> Iterator[dict[str, Any]]:
    """The objects of a file's lines, the first of which is at `offset`. Lines without a sound one are damage."""
    for line in lines:
        record = _sound(line, check)
        if record is None:
            damage.add(file, offset, line)
        else:
            yield record
        offset += len(line)


def _sound(line: bytes, check: Callable[[dict[str, Any]], Any]) -> dict[str, Any] | None:
    """The object of a line; None where it is cut short, is not an object, or fails `check`."""
    record = _parsed(line)
    if record is None:
        return None
    try:
        check(record)
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError):
        return None
    return record


def _parsed(data: bytes) -> dict[str, Any] | None:
    """The JSON object; None where there is none. JSON has no infinity: such a number becomes None."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")  # some editors write it first
    try:
        record = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _finite(text: str) -> float | None:
    number = float(text)
    return number if math.isfinite(number) else None


def _object(file: Path, damage: Damage) -> dict[str, Any]:
    """The object of a whole file; empty where the file is missing or damaged."""
    if not _is_there(file, damage):
        return {}
    found = _parsed(file.read_bytes())
    if found is None:
        damage.add(file)
    return found or {}


def _shown(value: Any) -> Any:
    """An option's value without passwords, which the addresses of older runs may hold."""
    if isinstance(value, list):
        return [_shown(part) for part in value]
    return hidden(value) if isinstance(value, str) else value


def _count_lines(file: Path, before: float = math.inf) -> int:
    """How many lines end in a file, or in its first `before` bytes."""
    count = 0
    at = 0
    with open(file, "rb") as data:
        while block := data.read(int(min(2**20, before - at))):
            count += block.count(b"\n")
            at += len(block)
    return count


def main(argv: Sequence[str]) -> None:
    parser = Parser("python -m mmsr.report", description="Write report.html for a run, or for several.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run of train.py or eval.py")
    parser.add_argument("--out", type=Path, help=f"the file; otherwise RUN/{REPORT}, or ./{REPORT} for several runs")
    parser.add_argument("--rollouts", type=int, default=MOST_ROLLOUTS, help=f"embed at most so many ({MOST_ROLLOUTS})")
    given = parser.parse_args(argv)
    folder = given.runs[0] if len(given.runs) == 1 else Path()
    out = given.out or folder / REPORT
    try:
        if given.rollouts < 0:
            raise UserError(f"--rollouts {given.rollouts}: give a number from 0")
        print(_write(given.runs, out, given.rollouts))
    except (UserError, OSError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        raise SystemExit(2) from None
