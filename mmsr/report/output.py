"""The files that a training run writes: metrics.jsonl, rollouts, pictures, report.html, the model."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmsr import evaluate
from mmsr.assemble import Setup
from mmsr.config import CONFIG, Config
from mmsr.episode import Episode
from mmsr.pretrained.save import save_weights
from mmsr.report import alarms
from mmsr.report.album import Album
from mmsr.report.folder import RunFolder
from mmsr.report.html import write_report
from mmsr.report.track import Tracker
from mmsr.system.errors import UserError
from mmsr.system.files import append, object_in, write_whole
from mmsr.system.parallel import Ranks, full_state_dict

MOST_DETAILED = 1024  # rollouts of a step whose lines hold every token: most of such a line, and few are ever looked at


class Output(RunFolder[Config]):
    """The files of a run, each step's written whole or not at all. A folder in use is refused, or resumed.

    Every rank has one and calls it, but the main one alone writes and prints.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.track = Tracker(config.track if ranks.main else "")
        super().__init__(config, ranks)
        self.metrics = self.folder / "metrics.jsonl"
        self.rollouts = self.folder / "rollouts"
        self.album = Album(self.folder / "images")
        self.report_due = 0.0  # by time.perf_counter
        self.report_failed = False

    def check_options(self, used: bool) -> None:
        if used and not self.config.resume:
            raise UserError(f"--out {self.folder} is not empty: name another folder, remove it, or go on with --resume")
        super().check_options(used)

    def check(self, setup: Setup, program: str) -> None:
        """Raises UserError where a resumed run is made of something else than before. `program`: train.py."""
        files = {}
        if self.config.data != "toy":
            files[f"--data {self.config.data}"] = setup.questions
        if self.config.eval_data not in ("", "toy"):
            files[f"--eval-data {self.config.eval_data}"] = setup.eval_questions
        self.check_inputs(setup, files, program)

    def begin(self, done: int) -> None:
        """Make the folder, or take it back to where `done` steps were finished and the evaluation after them was not.

        A step saved but not yet evaluated looks the same, so that evaluation is made in either case.
        """
        if not self.ranks.main:
            return
        self.claim()
        self.track.start(self.folder, dataclasses.asdict(self.config), done)
        if not (self.folder / CONFIG).exists():
            self.config.save(self.folder)
        self.keep_inputs()
        self.rollouts.mkdir(exist_ok=True)
        kept = {f"step-{step:06d}.jsonl" for step in range(1, done + 1)}
        for file in self.rollouts.iterdir():
            if file.name not in kept:
                file.unlink()
        with open(self.metrics, "a+b") as file:
            file.seek(0)
            file.truncate(_kept_bytes(file, done))

    def steps(self) -> list[dict]:
        """The lines of metrics.jsonl about the steps that are done. Other ranks than the main one get none."""
        if not self.ranks.main:
            return []
        return [record for record in _records(self.metrics) if alarms.NEEDED <= record.keys()]

    def line(self, record: dict | None) -> None:
        """Add to metrics.jsonl; of an interrupted evaluation (None) nothing.

        It is on the disk when this returns: a checkpoint must not know of steps that the other files lack.
        """
        if record is None or not self.ranks.main:
            return
        self.check_there()
        record = _finite(record)
        append(self.metrics, [json.dumps(record, allow_nan=False).encode() + b"\n"])
        self.track(record)

    def step(self, step: int, metrics: dict, episodes: Sequence[Episode], pieces: Callable | None) -> None:
        """A step's files. `pieces` as in `Episode.record`, for as many whole groups as `MOST_DETAILED` allows."""
        detailed = max(1, MOST_DETAILED // self.config.group_size)  # groups
        lines = []
        for episode in episodes:
            record = episode.record(pieces if episode.group_id < detailed else None)
            lines.append((episode.group_id, episode.sample, json.dumps(record, ensure_ascii=False) + "\n"))
        lines = sorted(self.ranks.gather(lines))
        pictures = self.ranks.gather(self.album.new(episodes))
        if not self.ranks.main:
            return
        self.check_there()
        self.album.add(pictures)
        self.rollouts.mkdir(exist_ok=True)  # the user may have removed it to make room
        # JSON may hold lone surrogates, which UTF-8 cannot: escaped with a backslash they are JSON again.
        encoded = (line.encode("utf-8", "backslashreplace") for _, _, line in lines)
        write_whole(self.rollouts / f"step-{step:06d}.jsonl", encoded)
        self.line(metrics)

    def warn(self, sentences: Iterable[str]) -> None:
        """One line each on standard error, above the progress bar."""
        if self.ranks.main:
            for sentence in sentences:
                tqdm.write(sentence, file=sys.stderr)

    def report(self, at_once: bool = False) -> None:
        """Rewrite report.html when a hundred times what that takes has gone by, or at once. It never ends a run."""
        if not self.ranks.main:
            return
        start = time.perf_counter()
        if not self.metrics.exists() or start < self.report_due and not at_once:
            return
        try:
            write_report(self.folder)
        except Exception as error:
            if not self.report_failed:
                tqdm.write(f"report.html: {type(error).__name__}: {error}; the run goes on without", file=sys.stderr)
            self.report_failed = True
        end = time.perf_counter()
        self.report_due = end + 100 * (end - start)

    def finish(self, setup: Setup, summary: bool) -> None:
        """The model as it is now, the last report, and a table of the evaluations before and after."""
        weights = full_state_dict(setup.model, setup.ranks, setup.dtype)
        if self.ranks.main:
            self.check_there()
            save_weights(setup.model.config, weights, self.folder / "model", setup.folder)
        self.report(at_once=True)
        if not summary or not self.ranks.main:
            return
        written = "report.html, model/, metrics.jsonl, rollouts/, images/, checkpoints/"
        print(f"\n{self._summary(setup)}\n\n{self.folder}: {written}")

    def _summary(self, setup: Setup) -> str:
        """The table of the first evaluation and the last."""
        evaluations = [record for record in _records(self.metrics) if "eval" in record]
        rows = {}
        for when, evaluation in (("before", evaluations[0]), ("after", evaluations[-1])):
            for mode, by_category in evaluation.items():
                if mode == "eval":
                    rows[f"{when}, greedy"] = by_category
                elif mode == "eval_sampled":
                    rows[f"{when}, T = 1"] = by_category
                elif mode != "step":
                    rows[mode.replace("_", " ")] = by_category
        mix = None
        if self.config.data == "toy" and not self.config.eval_data:
            mix = setup.world.settings.mix
        return evaluate.table(rows, mix)


def _kept_bytes(lines: Iterable[bytes], done: int) -> int:
    """The length of what stays of metrics.jsonl: lines of the first `done` steps, and not of the evaluation after them.

    A damaged line between such lines stays where it is; one at the end was cut short by a crash.
    """
    kept = 0  # bytes up to the end of the last line that stays
    end = 0  # bytes up to the end of the present line
    for line in lines:
        end += len(line)
        record = _record(line)
        if record is None or not line.endswith(b"\n"):
            continue
        is_repeated = record["step"] > done or record["step"] == done and "eval" in record
        if is_repeated:
            break
        kept = end
    return kept


def _records(metrics: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are not damaged."""
    records = map(_record, metrics.read_bytes().splitlines())
    return [record for record in records if record]


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that is damaged."""
    record = object_in(line)
    return record if record is not None and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
