"""The files that a training run writes: metrics.jsonl, rollouts, pictures, report.html, the model."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmsr import evaluate, lora
from mmsr.assemble import Setup
from mmsr.config import CONFIG, Config, Options
from mmsr.episode import Episode
from mmsr.pretrained.adapter import base_digest, base_name, write_adapter
from mmsr.pretrained.save import save_weights
from mmsr.report import alarms
from mmsr.report.album import Album
from mmsr.report.console import Console, evaluation_mix
from mmsr.report.folder import RunFolder
from mmsr.report.html import MODES, mode_name, write_report
from mmsr.report.track import Tracker
from mmsr.system.errors import UserError
from mmsr.system.files import append, object_in, write_whole
from mmsr.system.options import kebab
from mmsr.system.parallel import Ranks, full_state_dict
from mmsr.system.progress import say
from mmsr.toy.world import SETTINGS, World

# Options by which a model is evaluated as it was trained.
KEPT = (
    "toy", "prompts", "grammar", "thinking", "tools", "reward", "penalty", "penalty_per_call", "match", "shapes",
    "max_turns", "max_images", "max_texts", "max_tokens", "turn_tokens", "min_pixels", "max_pixels",
)  # fmt: skip
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
        self.console: Console | None = None  # from `check` on
        self.report_due = 0.0  # by time.perf_counter
        self.report_failed = False
        self.base_digest = ""  # of the weights beside which adapters are trained; from `check` on, on the main rank

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
        if self.config.trains_adapters and self.ranks.main:
            self.base_digest = base_digest(setup.folder)  # now: the folder may be gone when the run ends
        self.console = Console(setup)

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
        if self.console and done < self.config.steps:
            say(self.console.heading(done))

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
        if self.console:
            say(self.console.step(metrics))

    def evaluated(self, step: int, mode: str, by_category: Mapping[str, evaluate.Numbers], seconds: float) -> None:
        """Print a finished part of an evaluation; `mode` and `by_category` as metrics.jsonl has them."""
        if self.ranks.main:
            say(self.console.evaluation(step, mode, by_category, seconds))

    def warn(self, sentences: Iterable[str]) -> None:
        """One line each on standard error, above the progress bar."""
        if self.ranks.main:
            for sentence in sentences:
                say(sentence, sys.stderr)

    def report(self, at_once: bool = False) -> None:
        """Rewrite report.html when a hundred times what that takes has gone by, or at once. It never ends a run."""
        if not self.ranks.main:
            return
        start = time.perf_counter()
        if not self.metrics.exists() or not self.metrics.stat().st_size:
            return  # nothing has been measured yet
        if start < self.report_due and not at_once:
            return
        try:
            write_report(self.folder)
        except Exception as error:
            if not self.report_failed:
                say(f"report.html: {type(error).__name__}: {error}; the run goes on without", sys.stderr)
            self.report_failed = True
        end = time.perf_counter()
        self.report_due = end + 100 * (end - start)

    def finish(self, setup: Setup, summary: bool) -> None:
        """The model as it is now, the last report, and a table of the evaluations before and after."""
        written = [self.folder / name for name in results(self.config)]
        self.ranks.print(f"Writing {', '.join(map(str, written))} and report.html.")
        if self.config.trains_adapters:
            self._save_adapter(setup)
        if "model" in results(self.config):
            weights = full_state_dict(setup.model, setup.ranks, setup.dtype)
            if self.ranks.main:
                self.check_there()
                whole = lora.merge(weights, setup.model)
                save_weights(setup.model.config, whole, self.folder / "model", setup.folder)
        self.report(at_once=True)
        if not summary or not self.ranks.main:
            return
        say(f"\n{self._summary(setup)}\n\n{self._next(setup)}")

    def _save_adapter(self, setup: Setup) -> None:
        """The adapter as it is now, in PEFT's form."""
        if self.ranks.main:
            self.check_there()
            base = base_name(self.config.model, setup.folder)
            write_adapter(self.folder / "adapter", lora.adapted(setup.model), base, self.base_digest)

    def _summary(self, setup: Setup) -> str:
        """The table of the first evaluation and the last."""
        evaluations = [record for record in _records(self.metrics) if "eval" in record]
        first, last = evaluations[0], evaluations[-1]
        rows = {}
        for mode, name in MODES.items():
            rows[f"before, {name}"] = first[mode]
            rows[f"after, {name}"] = last[mode]
        for mode, by_category in first.items():
            if mode != "step" and mode not in MODES:
                rows[mode_name(mode)] = by_category
        return evaluate.table(rows, evaluation_mix(setup))

    def _next(self, setup: Setup) -> str:
        """Where everything is, and what to type next."""
        lines = [
            f"Written in {self.folder}:",
            "  report.html  curves, evaluations, rollouts: open it in a browser",
            *[f"  {name + '/':12} {RESULTS[name]}" for name in results(self.config)],
            "  metrics.jsonl, rollouts/, images/, checkpoints/: see docs/files.md",
        ]
        if made_from_options(setup.world, self.config):
            lines.append(f"Next: {evaluation_command(self.config)}")
        return "\n".join(lines)


RESULTS = {
    "adapter": "the trained adapter, for eval.py and PEFT",
    "model": "the trained model, for eval.py and transformers",
}


def results(config: Config) -> list[str]:
    """The folders in --out with what was learnt: the adapter, the whole model, or both."""
    if not config.trains_adapters:
        return ["model"]
    return ["adapter", "model"] if config.merge else ["adapter"]


def made_from_options(world: World | None, config: Config) -> bool:
    """Whether eval.py makes the world of a run again from its options. It cannot make one that a program has made."""
    return world is None or (type(world) is World and world.settings == SETTINGS[config.toy])


def evaluation_command(config: Config) -> str:
    """What evaluates the model of a run: in its toy world, or on a file and with a search engine still to be named."""
    usual = {field.name: field.default for field in dataclasses.fields(Options)}
    usual |= Options.defaults(config.recipe, config.toy)
    line = ["python", "eval.py"]
    if "model" in results(config):
        line += ["--model", str(Path(config.out) / "model")]
    else:
        line += ["--model", config.model] if config.model else []
        line += ["--adapter", str(Path(config.out) / "adapter")]
    if config.data == "toy":
        line += ["--data", "toy"]
        names = (*KEPT, "toy_model", "seed", "search")
    else:
        line += ["--data", "FILE", "--search", "SEARCH"]
        names = KEPT
    if config.recipe != ("toy" if config.data == "toy" else "blog"):
        line += ["--recipe", config.recipe]
    for name in names:
        value = getattr(config, name)
        if value == usual[name]:
            continue
        if isinstance(value, bool):
            line.append(f"--{kebab(name)}" if value else f"--no-{kebab(name)}")
        else:
            line += [f"--{kebab(name)}", str(value)]
    line += ["--out", f"{Path(config.out)}-eval"]  # of its own: evaluations of several runs come one after another
    return shlex.join(line)


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
