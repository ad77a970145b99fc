"""Evaluate a model on one or several data sets: `python eval.py --help`. On several devices: `torchrun eval.py …`.

Three modes. `search` leaves it to the model whether to search. `direct` asks it without tools. `rag` is the paper's
baseline of a fixed pipeline, with the same rollout: an image search is forced; then, where the limits allow a text
search, the words before its query are forced, and the model writes the query; then the words that begin an answer.
`rag.txt` of the prompt set holds what is forced, a line a turn, in which `\\n` is a line break (by default that of
`prompts/real`, or with --grammar hermes of `prompts/hermes`).

OUT/episodes.jsonl gets a line a question, which is on the disk before the next questions are asked. Started again, the
same command continues where that file ends. OUT/results.json is made of that file alone and holds no times, so equal
runs give equal results, on several devices or one, interrupted or not.
"""

from __future__ import annotations

import sys

from mmsr.config import EvalConfig, check_command_line

if __name__ == "__main__":  # torch takes seconds to import: --help and mistakes do not wait for it
    check_command_line(sys.argv[1:], EvalConfig, "eval.py")

import json
import math
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

from mmsr import evaluate
from mmsr.assemble import Setup, launch
from mmsr.chat import PROMPTS, WORDING
from mmsr.data.judge import JUDGE_TOKENS, Judge
from mmsr.episode import Episode, Example
from mmsr.report import compare
from mmsr.report.album import Album
from mmsr.report.folder import RunFolder
from mmsr.report.html import write_report
from mmsr.rollout import Script
from mmsr.setup.policy import open_policy, prompts_folder
from mmsr.setup.preflight import preflight
from mmsr.setup.questions import Questions, open_data_sets, open_world
from mmsr.setup.search import open_search
from mmsr.system.errors import UserError
from mmsr.system.files import append, object_in, write_whole
from mmsr.system.interrupt import Interrupts
from mmsr.system.parallel import Ranks
from mmsr.system.progress import progress, say
from mmsr.toy.world import World

# The keys of a line that results are made of.
SUMMED_UP = ("data", "question", "answers", "answer", "category", "measures", "status", "seconds")


def run(config: EvalConfig, ranks: Ranks) -> None:
    """Ask every question that is not answered yet, then sum up."""
    with ranks.sync_errors():
        output = Output(config, ranks)
    with output:  # its folder is held against other runs
        setup, data_sets = open_setup(config, ranks)
        script = rag_script(config, setup.world) if config.mode == "rag" else None
        with ranks.sync_errors():
            done = output.begin(setup, data_sets)
        done = ranks.all_gather(done)[0]
        missing = {}
        for name, questions in data_sets.items():
            missing[name] = [row for row in range(len(questions)) if (name, row) not in done]
        with Interrupts(ranks.main) as stop:
            ask(missing, data_sets, setup, script, output, stop)
        setup.toolbox.drop()  # what still hangs
        status = int(ranks.max(stop.status))
        if status:
            ranks.print("Interrupted; the same command goes on.")
            raise SystemExit(status)
        if ranks.main:  # the others need not wait for a judge
            output.finish(data_sets)


def open_setup(config: EvalConfig, ranks: Ranks) -> tuple[Setup[EvalConfig], dict[str, Sequence[Example]]]:
    """Open the parts of an evaluation, each from those before it; and its questions by data set. Raises UserError."""
    preflight(config, ranks)
    world = open_world(config)
    data_sets = open_data_sets(config, world, ranks)
    questions = Questions({f"--data {name}": asked for name, asked in data_sets.items()})
    search = open_search(config, world, questions, ranks)
    policy = open_policy(config, search.tools, questions, world, ranks)
    return Setup(config, ranks, world, questions, search, policy), data_sets


def ask(
    rows_by_name: Mapping[str, list[int]],
    data_sets: Mapping[str, Sequence[Example]],
    setup: Setup[EvalConfig],
    script: Callable[[Example, int], Script] | None,
    output: Output,
    stop: Interrupts,
) -> None:
    """Roll out these rows of each data set, a chunk at a time; each chunk's lines are written when it is done."""
    ranks = setup.ranks
    size = 2 * setup.config.slots * ranks.size  # few enough to lose, many enough to keep the slots full
    total = math.ceil(sum(map(len, rows_by_name.values())) / ranks.size)
    with progress("evaluation", total, "question", shown=ranks.main) as bar:
        for name, rows in rows_by_name.items():
            for begin in range(0, len(rows), size):
                setup.begin_step("evaluation")
                found = roll_out(name, rows[begin : begin + size], data_sets[name], setup, script, stop, bar)
                if found is None:
                    return
                lines, episodes = found
                output.append(lines, episodes)


def roll_out(
    name: str,
    rows: list[int],
    questions: Sequence[Example],
    setup: Setup[EvalConfig],
    script: Callable[[Example, int], Script] | None,
    stop: Interrupts,
    bar: Any,  # how many questions are done
) -> tuple[list[dict[str, Any]], list[Episode]] | None:
    """This rank's share of some questions of data set `name`: lines of episodes.jsonl, episodes. None: interrupted."""
    config = setup.config
    start = time.perf_counter()
    seconds: dict[int, float] = {}  # by row

    def on_done(episode: Episode) -> None:
        seconds[episode.group_id] = round(time.perf_counter() - start, 3)
        bar.update()

    episodes = setup.answers(
        [questions[row] for row in rows],
        (config.seed, "evaluation", Path(name).name),  # wherever the file lies
        config.temperature,
        group_ids=rows,
        direct=config.mode == "direct",
        scripts=script,
        on_done=on_done,
        stop=stop,
    )
    if episodes is None:
        return None
    allowed = calls_allowed(setup)
    lines = []
    for episode in episodes:
        line = {"data": name, "row": episode.group_id}
        line |= episode.record(setup.chat.pieces if config.log_tokens else None)
        line["measures"] = evaluate.more_measures(episode, allowed)
        line["seconds"] = seconds[episode.group_id]
        lines.append(line)
    return lines, episodes


def calls_allowed(setup: Setup[EvalConfig]) -> int:
    """Tool calls that one question may take."""
    if setup.config.mode == "direct":
        return 0
    limits = sum(tool.limit for tool in setup.toolbox.tools.values() if tool.is_search)
    return min(limits, setup.config.max_turns - 1)


def rag_script(config: EvalConfig, world: World | None) -> Callable[[Example, int], Script]:
    """The forced image search, and the openings of the turns that follow, as far as the limits go."""
    if world and config.prompts == "toy":
        return lambda example, sample: Script(world.always_search(example, config.max_texts > 0))
    own = prompts_folder(config.prompts) / "rag.txt"
    usual = PROMPTS / WORDING[config.grammar] / "rag.txt"
    lines = (own if own.is_file() else usual).read_text(encoding="utf-8").splitlines()
    turns = [line.replace("\\n", "\n") for line in lines]
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
        self.episodes = self.folder / "episodes.jsonl"
        self.album = Album(self.folder / "images")

    def begin(self, setup: Setup, data_sets: Mapping[str, Sequence[Example]]) -> set[tuple[str, int]]:
        """Make the folder, or cut off what a crash left unfinished in it. Returns the questions that are done.

        Raises UserError where model, data or another input is not that of the questions that are done.
        """
        if not self.ranks.main:
            return set()
        files = {f"--data {name}": questions for name, questions in data_sets.items() if name != "toy"}
        self.check_inputs(setup, files, __file__)
        self.claim()
        self.config.save(self.folder)
        self.keep_inputs()
        self._cut_unfinished_line()
        done = {(line["data"], line["row"]) for line in self._lines()}
        if done:
            say(f"{len(done)} questions are done already.")
        return done

    def _cut_unfinished_line(self) -> None:
        """A crash may have cut the last line short."""
        with open(self.episodes, "a+b") as file:
            file.seek(0)
            whole = 0  # bytes of whole lines
            for line in file:
                if line.endswith(b"\n"):
                    whole += len(line)
            file.truncate(whole)

    def append(self, lines: list[dict[str, Any]], episodes: Sequence[Episode]) -> None:
        """Add all ranks' lines, in the order of the questions, and their pictures."""
        pictures = self.ranks.gather(self.album.new(episodes))
        order = {name: place for place, name in enumerate(self.config.data)}
        lines = self.ranks.gather(lines)
        lines.sort(key=lambda line: (order[line["data"]], line["row"]))
        if self.ranks.main:
            self.check_there()
            self.album.add(pictures)
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            append(self.episodes, [text.encode("utf-8", "replace")])  # JSON may hold lone surrogates

    def finish(self, data_sets: Mapping[str, Sequence[Example]]) -> None:
        """Judge, sum up, write results.json and print. For the main rank."""
        self.check_there()
        lines = self._judged_lines()
        lines_of: dict[str, list] = {name: [] for name in data_sets}
        for line in lines:
            if line["data"] in lines_of:
                lines_of[line["data"]].append(line)
        results = {name: evaluate.results(lines_of[name]) for name in data_sets}
        text = json.dumps(results, indent=2, ensure_ascii=False)
        write_whole(self.folder / "results.json", [text.encode() + b"\n"])
        for name, result in results.items():
            others = compare.published(Path(name).name, getattr(data_sets[name], "format", ""))
            print(f"\n{compare.report(Path(name).name, self.config.mode, result, others)}")
            if name == "toy":
                print("Here every category has the same weight; train.py weights them as in training.")
            seconds = [line["seconds"] for line in lines_of[name]]
            print(f"{sum(seconds) / len(seconds):.2f} s from a batch's start to an answer in it, on average")
        try:
            write_report(self.folder)
        except Exception as error:  # a page is not worth an evaluation
            print(f"report.html: {type(error).__name__}: {error}")
        print(f"\nWritten in {self.folder}:")
        print("  report.html  the numbers and every rollout: open it in a browser")
        print("  results.json, episodes.jsonl: see docs/files.md")
        print(f"Next: python -m mmsr.report {self.folder} RUN … (several runs in one report)")

    def _judged_lines(self) -> list[dict[str, Any]]:
        """What is summed up of every line, with the judge's verdict where there is a judge."""
        lines = []
        for line in self._lines():
            lines.append({key: line[key] for key in SUMMED_UP})
        complete = self._judge()
        if complete:
            judge = Judge(complete, self.config.judge_model, self.folder / "judge.jsonl")
            for line, verdict in zip(lines, judge(lines)):
                line["judged"] = verdict
            if judge.failure:
                print(f"The judge failed, at first with {judge.failure}")
        return lines

    def _judge(self) -> Callable[[list[dict]], str] | None:
        """The function that asks the judge, or None without a judge. Raises UserError where it cannot be asked."""
        if not self.config.judge:
            return None
        from mmsr.net.completions import judge_variable, open_server

        server = open_server(self.config.judge, self.config.judge_model, judge_variable())
        return partial(server.complete, max_tokens=JUDGE_TOKENS)

    def _lines(self) -> Iterable[dict[str, Any]]:
        """The lines of episodes.jsonl. Raises UserError for one that is damaged."""
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
    if record is None or not record.keys() >= {*SUMMED_UP, "row"}:
        return None
    return record


def main(argv: Sequence[str]) -> None:
    launch(argv, EvalConfig, "eval.py", run)


if __name__ == "__main__":
    main(sys.argv[1:])
