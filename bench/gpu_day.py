"""One command for the first day with a GPU: every equality and every figure that needs one, in parts.

    python bench/gpu_day.py --part 1                      # equalities, the machine, 3B
    python bench/gpu_day.py --part 2                      # 7B, beside transformers
    python bench/gpu_day.py --part 3 --seconds 170        # Qwen3-VL-2B, where there is time left
    python bench/gpu_day.py --part 1 --device cpu --tiny  # a rehearsal: its figures mean nothing

A part ends within six minutes by its own clock. A row for which too little time is left is not started, and says so.
Rows run in a child process (`gpu_rows.py`): one that hangs is killed, one that crashes does not affect the others, and
the next row gets a fresh child. After each row a JSON file and a Markdown table are written whole, named by commit and
card, so all results are on the disk if the machine is taken away. Later parts add to the files of part 1.

Only the standard library is imported here: the child imports torch, and this process never touches the GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mmsr.system.files import write_whole  # noqa: E402

SECONDS = 350.0  # of a part, of the 360 that it may take
START = 25.0  # seconds that a child needs until it takes its first row
START_LIMIT = 90.0  # after which it is killed
LORA = 64  # rank of the adapters of rows by LoRA
PACKAGES = ("torch", "transformers", "triton", "flash-attn", "numpy")
FORMATS = {
    "tok/s": ",.0f", "TFLOP/s": ",.0f", "TB/s": ".2f", "s": ".1f", "GiB": ".1f", "B": ".2f", "%": ".0f", "nats": ".1e",
    "graphs": ".0f", "passed": ".0f", "": ".1e",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the plan: a method of `gpu_rows.Bench` and its arguments.

    `needs`: seconds; with fewer left it is not begun. `limit`: seconds after which it is given up and its child killed.
    """

    name: str
    work: str
    needs: float
    limit: float
    options: dict[str, Any] = field(default_factory=dict)


LIMITS = (Row("copy bandwidth", "bandwidth", 3, 30), Row("matrix peak", "matrix", 3, 30))


def rows_of(shape: str, slow: float) -> dict[str, Row]:
    """The rows of a shape, by a short name. `slow`: how often its rows' seconds are those of 3B."""

    def row(name: str, work: str, needs: float, limit: float, **options: Any) -> Row:
        return Row(f"{shape}: {name}", work, needs * slow, limit * slow, dict(shape=shape) | options)

    return {
        "shared": row("decode, 16 × 8", "decode", 10, 45, sequences=8, capture=True),
        "shared eager": row("decode, 16 × 8, not captured", "decode", 15, 45, sequences=8, capture=False),
        "apart": row("decode, 128 × 1", "decode", 12, 45, sequences=1, capture=True),
        "apart eager": row("decode, 128 × 1, not captured", "decode", 15, 45, sequences=1, capture=False),
        "step": row("whole step", "step", 35, 100),
        "gap": row("gap between sampler and trainer", "gap", 8, 40),
        "lora step": row("whole step by LoRA, with KL", "step", 35, 100, rank=LORA),
        "lora gap": row("gap between sampler and trainer, LoRA", "gap", 8, 40, rank=LORA),
        "lora shared": row("decode, 16 × 8, LoRA", "decode", 10, 45, sequences=8, capture=True, rank=LORA),
        "recomputed": row("training, blocks recomputed", "train", 15, 60, recompute=True),
        "kept": row("training, blocks kept", "train", 15, 60, recompute=False),
        "bare": row("training, recomputed, no optimizer", "train", 12, 50, recompute=True, optimizer=False),
        "memory": row("bytes a parameter", "memory", 6, 30),
        "their decode": row("decode, transformers, 128 × 1", "their_decode", 25, 70, static=False),
        "their training": row("training, transformers", "their_training", 15, 60),
        "compiled": row("decode, transformers, 128 × 1, compiled", "their_decode", 50, 100, static=True),
    }


def chosen(shape: str, slow: float, names: Iterable[str]) -> tuple[Row, ...]:
    rows = rows_of(shape, slow)
    return tuple(rows[name] for name in names)


# What matters most comes first: the clock may stop before the last.
ORDER_3B = [
    *("shared", "shared eager", "step", "gap", "lora step", "lora gap", "lora shared"),
    *("recomputed", "kept", "apart", "apart eager", "memory"),
]
ORDER_7B = [
    *(
        "shared",
        "shared eager",
        "apart",
        "apart eager",
        "gap",
        "step",
        "lora step",
        "lora shared",
        "recomputed",
        "kept",
    ),
    *("bare", "memory", "their decode", "their training", "compiled"),
]
ORDER_Q3 = ("shared", "step", "gap", "shared eager", "recomputed", "memory")
PARTS = {
    1: LIMITS + chosen("3B", 1, ORDER_3B),
    2: LIMITS + chosen("7B", 1.5, ORDER_7B),
    3: LIMITS + chosen("Q3-2B", 1, ORDER_Q3),
}


class Clock:
    """Counts a part's seconds down."""

    def __init__(self, seconds: float):
        self.begin, self.end = time.monotonic(), time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    @property
    def spent(self) -> float:
        return time.monotonic() - self.begin


def missed(reason: str) -> dict[str, Any]:
    """A row without figures, and why."""
    return {"figures": [], "reason": reason}


# ---- children


class Died(Exception):
    """A child's process ended."""


class Child:
    """A process that is given a row a line and answers with a line of JSON. What it prints besides goes to `log`."""

    def __init__(self, command: Sequence[str], log: Path):
        with log.open("ab") as file:
            pipe = subprocess.PIPE
            # A group of its own, so that what it has started dies with it; not a session, which would outlive ours.
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=file, cwd=ROOT, process_group=0)
        self.unread = b""

    def ask(self, row: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Its answer. Raises TimeoutError after `seconds`, Died where the process ends."""
        try:
            self.process.stdin.write(json.dumps(row).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            raise Died(self.end()) from None
        return self.read_answer(seconds)

    def read_answer(self, seconds: float) -> dict[str, Any]:
        pipe, end = self.process.stdout.fileno(), time.monotonic() + seconds
        while b"\n" not in self.unread:
            if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError
            found = os.read(pipe, 2**16)
            if not found:
                raise Died(self.end())
            self.unread += found
        line, _, self.unread = self.unread.partition(b"\n")
        return json.loads(line)

    def end(self) -> str:
        """How the process ended, in words; it is killed if it has not."""
        kill(self.process)
        status = self.process.returncode
        if status is None or status >= 0:
            return f"exit status {status}"
        return signal.Signals(-status).name


def kill(process: subprocess.Popen) -> None:
    """End a process and what it has started. One that the driver holds on to is not waited for."""
    try:
        process.wait(0.5)  # an end of its own tells more
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    try:
        process.wait(3)
    except subprocess.TimeoutExpired:
        pass


def measure(rows: Sequence[Row], command: Sequence[str], clock: Clock, log: Path) -> Iterator[tuple[Row, dict]]:
    """(row, its figures or the reason why there are none, seconds) one after another, each row lost alone."""
    child, failed_starts, limits = None, 0, {}
    try:
        for row in rows:
            begin = time.monotonic()
            needs = row.needs + (START if child is None else 0)
            if failed_starts == 2:
                found = missed("twice a process for the rows did not start: see the log")
            elif clock.left < needs:
                found = missed(f"{max(0, clock.left):.0f} s left, {needs:.0f} s needed")
            else:
                if child is None:
                    child, found = start_child(command, log, clock)
                    failed_starts = 0 if child else failed_starts + 1
                if child is not None:
                    found = answer(child, {"row": row.name, "limits": limits, **asdict(row)}, row.limit, clock)
            limits.update(limits_in(row, found))
            if child is not None and found.get("over"):
                child.end()
                child = None
            yield row, {"row": row.name, **found, "seconds": time.monotonic() - begin}
    finally:
        if child is not None:
            child.end()


def start_child(command: Sequence[str], log: Path, clock: Clock) -> tuple[Child | None, dict]:
    """A child that is ready for a row, or none and the reason."""
    child = Child(command, log)
    try:
        return child, child.read_answer(min(START_LIMIT, clock.left))
    except TimeoutError:
        reason = "its process did not start in time"
    except (Died, ValueError) as end:
        reason = f"its process did not start: {end}"
    child.end()
    return None, missed(reason)


def answer(child: Child, row: dict[str, Any], limit: float, clock: Clock) -> dict[str, Any]:
    """A child's answer, or the reason why there is none; `over` where the child is of no more use."""
    seconds = min(limit, clock.left)
    try:
        return child.ask(row, seconds)
    except TimeoutError:
        return missed(f"killed after {seconds:.0f} s") | {"over": True}
    except (Died, ValueError) as end:
        return missed(f"its process ended: {end}") | {"over": True}


def limits_in(row: Row, found: dict[str, Any]) -> dict[str, float]:
    """What the machine can do, where this row has measured it: bytes/s, FLOP/s."""
    values = [figure["value"] for figure in found["figures"]]
    return {row.work: values[0] * 1e12} if row.work in ("bandwidth", "matrix") and values else {}


# ---- equalities


OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
BEGUN = re.compile(r"^(\S+::.*?) *\Z", re.MULTILINE)
SAID = re.compile(r"^largest difference, (.*): (\S+)$", re.MULTILINE)


def equalities(file: str, which: Sequence[str], seconds: float, log: Path) -> dict[str, Any]:
    """The tests of one file in a process of their own: how many passed, the names of those that did not."""
    command = [sys.executable, "-m", "pytest", file, *which, "-v", "--tb=short", "-rP", "--color=no"]
    command += ["-o", "addopts=", "-o", "console_output_style=classic", "-p", "no:cacheprovider"]
    begin, place = time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, cwd=ROOT, process_group=0)
        try:
            process.wait(seconds)
            end = ""
        except subprocess.TimeoutExpired:
            end = f"killed after {seconds:.0f} s"
        finally:
            kill(process)
    if not end and process.returncode not in (0, 1):
        end = f"pytest ended with status {process.returncode}"
    text = log.read_bytes()[place:].decode(errors="replace")
    return {**tests_in(text, end), "seconds": time.monotonic() - begin}


def tests_in(text: str, end: str) -> dict[str, Any]:
    """Figures from pytest's own words. `end`: why it stopped before its time, or nothing."""
    outcomes = {name.rpartition("::")[2]: outcome for name, outcome in OUTCOME.findall(text)}
    counts = Counter(outcomes.values())
    told = [f"{name} {outcome.lower()}" for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    begun = BEGUN.findall(text) if end else []
    told += [f"{end}{' in ' + begun[-1].rpartition('::')[2] if begun else ''}"] if end else []
    if not outcomes:
        return missed(end or "no test ran: see the log")
    counted = ", ".join(f"{n} {outcome.lower()}" for outcome, n in counts.items() if outcome != "PASSED")
    figures = [{"value": counts["PASSED"], "unit": "passed", "remark": "; ".join(filter(None, [counted, *told]))}]
    figures += [{"value": float(value), "unit": "", "what": what} for what, value in dict(SAID.findall(text)).items()]
    return {"figures": figures, "reason": None}


def files_with_equalities(rehearsal: bool) -> list[str]:
    if rehearsal:
        return ["tests/test_devices.py"]
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in file.read_text()]
    return sorted(str(file.relative_to(ROOT)) for file in files)


# ---- what is kept


class Record:
    """All rows of one commit on one card, in a JSON file and a Markdown table that are written whole after each row."""

    def __init__(self, folder: Path, about: dict[str, str]):
        folder.mkdir(parents=True, exist_ok=True)
        commit, changed, _ = about["commit"].partition("-dirty")
        named = re.sub(r"[^A-Za-z0-9]+", "-", f"{commit[:12]}{changed} {about['card']}")
        self.json, self.markdown = folder / f"{named}.json", folder / f"{named}.md"
        self.value = {"about": about, "parts": {}}
        if self.json.exists():
            try:
                self.value["parts"] = json.loads(self.json.read_text())["parts"]
            except (ValueError, KeyError, TypeError):
                self.json.replace(self.json.with_suffix(".damaged"))

    def add(self, part: int, row: dict[str, Any], spent: float) -> None:
        """A row takes the place of an earlier one of its name, but for a measured one where it has no figure."""
        here = self.value["parts"].setdefault(str(part), {"rows": []})
        here["spent"] = round(spent, 1)
        names = [old["row"] for old in here["rows"]]
        if row["row"] not in names:
            here["rows"].append(row)
        elif row["figures"] or not here["rows"][names.index(row["row"])]["figures"]:
            here["rows"][names.index(row["row"])] = row
        write_whole(self.json, [json.dumps(self.value, indent=1, ensure_ascii=False).encode() + b"\n"])
        write_whole(self.markdown, [self.table().encode()])

    def table(self) -> str:
        lines = [f"{name}: {value}  " for name, value in self.value["about"].items()]
        for part, held in sorted(self.value["parts"].items()):
            lines += ["", f"Part {part}, {held['spent']:.0f} s:", ""]
            lines += ["| row | figure | predicted | of the limit | remark | s |", "|---|---|---|---|---|---|"]
            lines += [f"| {' | '.join(cells)} |" for row in held["rows"] for cells in cells_of(row)]
        return "\n".join(lines) + "\n"


def cells_of(row: dict[str, Any]) -> Iterator[list[str]]:
    """The lines of a row in the table: one for each of its figures, or one with the reason why it has none."""
    seconds = f"{row['seconds']:.0f}"
    if not row["figures"]:
        yield [row["row"], "not measured", "", "", _plain(row["reason"]), seconds]
    for number, figure in enumerate(row["figures"]):
        name = ", ".join(filter(None, (row["row"], figure.get("what"))))
        values = [_number(figure.get(key), figure["unit"]) for key in ("value", "predicted")]
        share = figure.get("share")
        remark, time_taken = _plain(figure.get("remark", "")), seconds if not number else ""
        yield [name, values[0] or "–", values[1], "" if share is None else f"{share:.0%}", remark, time_taken]


def _number(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:{FORMATS.get(unit, '.3g')}} {unit}".rstrip()


def _plain(text: str) -> str:
    return text.replace("|", "¦").replace("\n", " ")


def about(device: str, tiny: bool, commit: str) -> dict[str, str]:
    """Commit, card, driver and versions; a thing that cannot be found out is "unknown"."""
    asked = "--query-gpu=name,driver_version,memory.total"
    card = output("nvidia-smi", asked, "--format=csv,noheader").splitlines() if device != "cpu" else []
    name, driver, memory = [*(card[0] if card else "").split(", "), "", "", ""][:3]
    if device == "cpu":
        name = platform.machine()
    return {
        "commit": commit or output("git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or "unknown",
        "card": f"{name or 'unknown'}{', tiny' if tiny else ''}",
        "driver": f"{driver or 'unknown'}{', ' + memory if memory else ''}",
        "versions": ", ".join([f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in PACKAGES)]),
    }


def output(*command: str) -> str:
    """What a program prints; nothing where it is missing, fails or does not answer."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, choices=PARTS, required=True)
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-day", help="folder of the files")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal: tiny shapes and sizes")
    parser.add_argument("--no-equalities", action="store_true", help="leave out the tests, which part 1 begins with")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="that the part may take")
    parser.add_argument("--commit", default="", help="where git cannot tell it")
    options = parser.parse_args(argv)
    clock, part = Clock(options.seconds), options.part
    record = Record(options.out, about(options.device, options.tiny, options.commit))
    log = options.out / f"part-{part}.log"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended

    def tell(row: dict[str, Any]) -> None:
        record.add(part, row, clock.spent)
        print("\n".join(" | ".join(cells) for cells in cells_of(row)), flush=True)

    which = ["-k", "cpu"] if options.device == "cpu" else ["-m", "gpu"]
    files = files_with_equalities(options.device == "cpu") if part == 1 and not options.no_equalities else []
    for file in files:
        tell({"row": f"equalities, {file}", **equalities(file, which, max(1, min(90, clock.left)), log)})
    command = [sys.executable, str(ROOT / "bench/gpu_rows.py"), "--device", options.device]
    for _, found in measure(PARTS[part], [*command, *["--tiny"] * options.tiny], clock, log):
        tell(found)
    print("\n" + record.table())


if __name__ == "__main__":
    main()
