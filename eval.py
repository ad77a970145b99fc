"""Evaluate a model on one or several data sets: `python eval.py --help`. Shared out by `torchrun eval.py …`.

Three modes. `search` leaves it to the model whether to search. `direct` asks it without tools. `rag` is the paper's
baseline of a fixed pipeline, with the same rollout: the image search is forced; then, where the limits allow one, the
words before a text search's query are, and the model goes on with a query of its own; then the words that begin a turn
of answering. What is forced stands in `rag.txt` of the prompt set, a line a turn (`prompts/real/rag.txt` by default).

OUT/episodes.jsonl gets a line a question, appended whole and synced; started again, the same command goes on where that
file ends. OUT/results.json is made of that file alone and holds no times, so equal runs, shared out or not, interrupted
or not, give equal results.
"""

from __future__ import annotations

import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

from tqdm import tqdm

from mmsr import evaluate
from mmsr.assemble import Setup, assemble_evaluation, launch, prompts_folder
from mmsr.chat import PROMPTS
from mmsr.config import EvalConfig
from mmsr.data.judge import Judge
from mmsr.episode import Episode, Example
from mmsr.report import compare
from mmsr.report.album import Album
from mmsr.report.folder import RunFolder
from mmsr.report.html import write_report
from mmsr.rollout import Script
from mmsr.system.errors import UserError
from mmsr.system.files import append, object_in, write_whole
from mmsr.system.interrupt import Interrupts
from mmsr.system.parallel import Ranks
from mmsr.toy.world import World

JUDGE_TOKENS = 1024
SUMMED_UP = ("data", "question", "answers", "answer", "category", "measures", "status", "seconds")  # of a line


def run(config: EvalConfig, ranks: Ranks) -> None:
    with ranks.sync_errors():
        out = Output(config, ranks)
    with out:
        evaluate_all(config, ranks, out)


def evaluate_all(config: EvalConfig, ranks: Ranks, out: Output) -> None:
    """The work of `run`, in a folder that is held against other runs."""
    setup, sets = assemble_evaluation(config, ranks)
    script = rag_script(config, setup.world) if config.mode == "rag" else None
    with ranks.sync_errors():
        done = out.begin(setup, sets)
    done = ranks.all_gather(done)[0]
    todo = {name: [row for row in range(len(part)) if (name, row) not in done] for name, part in sets.items()}
    size = 2 * config.slots * ranks.size  # few enough to lose, many enough to keep the slots full
    chunks = [(name, rows[i : i + size]) for name, rows in todo.items() for i in range(0, len(rows), size)]
    total = math.ceil(sum(map(len, todo.values())) / ranks.size)
    with Interrupts() as stop, tqdm(total=total, unit="question", disable=not ranks.main) as bar:
        for name, rows in chunks:
            setup.begin_step("evaluation")
            episodes = roll_out(name, rows, sets[name], setup, script, stop, bar)
            if episodes is None:
                break
            out.append(*episodes)
    setup.toolbox.drop()  # what still hangs
    if status := int(ranks.max(stop.status)):
        ranks.print("Interrupted; the same command goes on.")
        raise SystemExit(status)
    if ranks.main:  # the others need not wait for a judge
        out.finish(sets)


def roll_out(
    name: str,
    rows: list[int],
    questions: Sequence[Example],
    setup: Setup,
    script: Callable[[Example, int], Script] | None,
    stop: Interrupts,
    bar: tqdm,
) -> tuple[list[dict[str, Any]], list[Episode]] | None:
    """This rank's share of some questions of data set `name`: lines of episodes.jsonl, episodes. None: interrupted."""
    c, begin, seconds = setup.config, time.perf_counter(), {}

    def on_done(episode: Episode) -> None:
        seconds[episode.group_id] = round(time.perf_counter() - begin, 3)
        bar.update()

    episodes = setup.answers(
        [questions[row] for row in rows], (c.seed, "evaluation", name), c.temperature, group_ids=rows,
        direct=c.mode == "direct", scripts=script, on_done=on_done, attempt=stop.breakable,
    )  # fmt: skip
    if episodes is None:
        return None
    allowed, pieces = calls_allowed(setup), setup.chat.pieces if c.log_tokens else None
    lines = [
        {"data": name, "row": e.group_id, **e.record(pieces), "measures": evaluate.more_measures(e, allowed)}
        | {"seconds": seconds[e.group_id]}
        for e in episodes
    ]
    return lines, episodes


def calls_allowed(setup: Setup) -> int:
    """Tool calls that one question may take."""
    limits = sum(tool.limit for tool in setup.toolbox.tools.values())
    return 0 if setup.config.mode == "direct" else min(limits, setup.config.max_turns - 1)


def rag_script(config: EvalConfig, world: World | None) -> Callable[[Example, int], Script]:
    """The forced image search, and the openings of the turns that follow, as far as the limits go."""
    if world and config.prompts == "toy":
        return lambda example, sample: Script(world.always_search(example, config.max_texts > 0))
    own, usual = prompts_folder(config) / "rag.txt", PROMPTS / "real" / "rag.txt"
    turns = (own if own.is_file() else usual).read_text(encoding="utf-8").splitlines()
    if len(turns) != 3:
        complaint = "write three: the turn of an image search, the first words of a text search's, and of an answer's"
        raise UserError(f"{own}: {len(turns)} lines; {complaint}")
    image_search, text_search, answer = turns
    searches = config.max_turns - 1
    forced = [image_search] if config.max_images and searches else []
    openings = [text_search] if config.max_texts and searches > len(forced) else []
    script = Script(forced, [*openings, answer])
    return lambda example, sample: script


class Output(RunFolder[EvalConfig]):
    """The files of an evaluation. The main rank alone writes and prints."""

    def __init__(self, config: EvalConfig, ranks: Ranks):
        super().__init__(config, ranks)
        self.episodes, self.album = self.folder / "episodes.jsonl", Album(self.folder / "images")

    def check_options(self, used: bool) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"--out {self.folder} is no folder: name another")
        super().check_options(used)

    def begin(self, setup: Setup, sets: Mapping[str, Sequence[Example]]) -> set[tuple[str, int]]:
        """Make the folder, or cut off what a crash left unfinished in it. Returns the questions that are done.

        Raises UserError where model, data or anything else is not what those that are done were asked with.
        """
        if not self.ranks.main:
            return set()
        self._judge()  # a key or a proxy that is of no use is refused now, and not after the last question
        files = {f"--data {name}": questions for name, questions in sets.items() if name != "toy"}
        self.check_inputs(setup, files, __file__)
        self.claim()
        self.config.save(self.folder)
        self.keep_inputs()
        with open(self.episodes, "a+b") as file:
            file.seek(0)
            whole = 0
            for line in file:
                whole += len(line) if line.endswith(b"\n") else 0
            file.truncate(whole)
        done = {(line["data"], line["row"]) for line in self._lines()}
        if done:
            print(f"{len(done)} questions are done already.")
        return done

    def append(self, lines: list[dict[str, Any]], episodes: Sequence[Episode]) -> None:
        """Add all ranks' lines, in the order of the questions, and their pictures."""
        pictures = self.ranks.gather(self.album.new(episodes))
        order = {name: place for place, name in enumerate(self.config.data)}
        lines = sorted(self.ranks.gather(lines), key=lambda line: (order[line["data"]], line["row"]))
        if self.ranks.main:
            self.check_there()
            self.album.add(pictures)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            append(self.episodes, [text.encode("utf-8", "replace")])  # JSON may hold lone surrogates

    def finish(self, sets: Mapping[str, Sequence[Example]]) -> None:
        """Judge, sum up, write results.json and print."""
        if not self.ranks.main:
            return
        self.check_there()
        lines = [{key: line[key] for key in SUMMED_UP} for line in self._lines()]
        if complete := self._judge():
            judge = Judge(complete, self.config.judge_model, self.folder / "judge.jsonl")
            for line, verdict in zip(lines, judge(lines)):
                line["judged"] = verdict
            if judge.failure:
                print(f"The judge failed, at first with {judge.failure}")
        of = {name: [line for line in lines if line["data"] == name] for name in sets}
        found = {name: evaluate.results(of[name]) for name in sets}
        _replace(self.folder / "results.json", found)
        for name, result in found.items():
            others = compare.published(Path(name).name, getattr(sets[name], "format", ""))
            print(f"\n{compare.report(Path(name).name, self.config.mode, result, others)}")
            waited = sum(line["seconds"] for line in of[name]) / len(of[name])
            print(f"{waited:.2f} s from a batch's start to an answer in it, on average")
        try:
            write_report(self.folder)
        except Exception as error:  # a page is not worth an evaluation
            print(f"report.html: {type(error).__name__}: {error}")
        print(f"\n{self.folder}: results.json, episodes.jsonl, report.html")

    def _judge(self) -> Callable[[list[dict]], str] | None:
        """Asks the judge, where there is one. Raises UserError where that cannot be."""
        if not self.config.judge:
            return None
        from mmsr.net.completions import open_server

        return partial(open_server(self.config.judge, self.config.judge_model).complete, max_tokens=JUDGE_TOKENS)

    def _lines(self) -> Iterable[dict[str, Any]]:
        """Raises UserError for one that is damaged."""
        with open(self.episodes, "rb") as file:
            for number, line in enumerate(file, 1):
                record = _line(line)
                if record is None:
                    advice = "remove it, and the same command asks its question again"
                    raise UserError(f"{self.episodes}: line {number} is damaged ({line[:40]!r}); {advice}")
                yield record


def _line(line: bytes) -> dict[str, Any] | None:
    """A line of episodes.jsonl; None for one that is damaged."""
    record = object_in(line)
    return record if record is not None and record.keys() >= {*SUMMED_UP, "row"} else None


def _replace(path: Path, value: Any) -> None:
    write_whole(path, [json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"])


def main(argv: Sequence[str]) -> None:
    launch(argv, EvalConfig, "eval.py", run)


if __name__ == "__main__":
    main(sys.argv[1:])
