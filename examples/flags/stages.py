"""The stages of the experiment. The programs are this project's: every command is shown as it can be typed."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from examples.flags import base, exported, report, tower
from examples.flags import questions as files_of
from examples.flags.countries import FACTS, NAME, Country, countries, split
from examples.flags.knowledge import measure
from examples.flags.pictures import HEIGHT, WIDTH
from mmsr.chat import Chat
from mmsr.pretrained.load import load
from mmsr.pretrained.save import save
from mmsr.system.errors import UserError
from mmsr.system.files import code_digest, file_digest, json_file, write_whole
from mmsr.system.number_types import time_ratio
from mmsr.system.progress import progress, say
from mmsr.tools import search_tools

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SENTENCES = ("The capital of France is Paris.", "<reason>This is the flag of Peru.</reason> <answer>Peru</answer>")

# What training and evaluation have in common: the price of a search, the limits of a rollout, and a small machine.
ROLLOUT = f"""
    --recipe paper --penalty 0.2 --penalty-per-call
    --results 2 --max-turns 3 --max-images 1 --max-texts 1
    --min-pixels {HEIGHT * WIDTH} --max-pixels {HEIGHT * WIDTH} --max-tokens 256 --turn-tokens 48
    --slots 96 --slot-tokens 0 --micro-tokens 8192
"""
TRAINING = "--kl 0 --lr-schedule half-decay --no-recompute --eval-size 24 --save-every 10 --merge --resume"
TEMPERATURE = 0.5  # of rollouts; below 1, what memory is sure of wins against "not known to me", and a guess loses
IMITATED, ASKED, GROUP = 20, 12, 8  # conversations of a step of imitation; questions and rollouts each of one of GRPO
IMITATION = f"--algorithm sft --lr 1e-3 --questions {IMITATED} --mini-batch {IMITATED} --group-size 1"
GRPO = f"""
    --lr 1.5e-4 --warmup 2 --adam-beta2 0.99 --group-eps 1 --zero-std drop --temperature {TEMPERATURE}
    --questions {ASKED} --mini-batch {ASKED} --group-size {GROUP}
"""


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    tower_steps: int = 900
    samples: int = 16  # of each fact, where knowledge is measured
    imitation_steps: int = 60
    grpo_steps: int = 64
    limit: int = 0  # questions of an evaluation; 0: all


FULL = Scale()
QUICK = Scale(tower_steps=4, samples=2, imitation_steps=2, grpo_steps=2, limit=8)

# The stages in their order, with minutes on two cores of an AMD EPYC with AVX512-BF16.
MINUTES = {
    "base": 0.5,
    "tower": 2.2,
    "knowledge": 3.5,
    "files": 0.2,
    "imitation": 8.8,
    "retained": 1.4,
    "grpo": 45,
    "evaluation": 10,
    "exported": 0.4,
    "report": 0.1,
}
COMPARED: dict[str, float] = {"unpenalised": 50, "informed": 14}


class Experiment:
    """The stages of one seed, in `folder`; the methods that `MINUTES` and `COMPARED` name. They raise UserError."""

    def __init__(self, folder: Path, seed: int, llama: str, scale: Scale):
        self.folder = folder
        self.data = folder / "data"
        self.seed = seed
        self.llama = llama
        self.scale = scale
        self.split = split(countries(), seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = ""  # of training and evaluation; `open_folder` sets it

    def about(self, stage: str) -> str:
        """What a stage does, in a line."""
        scale, parts = self.scale, self.split
        return {
            "base": "SmolLM2 becomes a Qwen2.5-VL with an untrained vision tower",
            "tower": f"the tower learns {len(parts.seen)} flags in {scale.tower_steps} steps",
            "knowledge": f"what the model knows before any training, each fact asked {scale.samples} times at T = 1",
            "files": "questions, conversations to imitate, and the web: an index of pictures and pages",
            "imitation": f"how to recall and how to look up, by chance, in {scale.imitation_steps} steps",
            "retained": "what it knows after the imitation, about countries that training leaves out",
            "grpo": f"when to search: {scale.grpo_steps} steps of {ASKED} questions, {GROUP} rollouts each",
            "evaluation": f"{len(parts.test)} countries that training leaves out: on demand, always, never",
            "exported": "transformers opens the trained model: its first turns for ten questions beside ours",
            "unpenalised": "to compare: the same GRPO, but a search costs nothing",
            "informed": "to compare: imitation of right decisions, about twice as many questions as GRPO asks",
            "report": "the numbers and the curve",
        }[stage]

    def open_folder(self, finished: Sequence[str]) -> None:
        """Write what the stages depend on, or compare it where some of them are finished.

        Raises UserError where those are of other options or another version of the program.
        """
        file = self.folder / "settings.json"
        made_by = {path.name: code_digest(path) for path in sorted(HERE.glob("*.py")) if path.name != "report.py"}
        made_by |= {path.name: path.read_text("utf-8") for path in sorted(HERE.glob("prompts/*.txt"))}
        made_by["facts.jsonl"] = file_digest(HERE / "data" / "facts.jsonl")
        settings = {"llama": self.llama, **asdict(self.scale), "made_by": made_by}
        before = json_file(file) if finished else {}
        self.dtype = before.pop("dtype", "")
        if not self.dtype:
            is_faster = time_ratio(torch.bfloat16, self.device) < 1
            self.dtype = "bfloat16" if is_faster else "float32"
        if finished and before != settings:
            raise UserError(f"{self.folder} has stages of other options or another version: give another --out")
        write_whole(file, [json.dumps({**settings, "dtype": self.dtype}, indent=2).encode() + b"\n"])

    def chat(self, model: Path) -> Chat:
        return Chat(model, HERE / "prompts", search_tools(None, 1, 1))

    # ---- model

    def base(self) -> None:
        llama, tokenizer = base.open_llama(self.llama)
        vision = tower.sizes(llama.config.hidden_size)
        model = base.from_llama(llama, tokenizer, vision, self.folder / "base", self.seed)
        self.chat(self.folder / "base")  # refuses a tokenizer that cannot be used
        for sentence in SENTENCES:
            ids = tokenizer(sentence).input_ids
            apart = base.difference(model, llama, ids)
            say(f"  logits of {len(ids)} tokens, largest difference from transformers: {apart:.1e}")
            if not apart < 1e-3:
                raise UserError("the base model is another function than the language model that it was made from")

    def tower(self) -> None:
        model = load(self.folder / "base", torch.float32, self.device)
        chat = self.chat(self.folder / "base")
        with progress("tower", self.scale.tower_steps, "step") as bar:

            def on_step(loss: float) -> None:
                bar.update()
                bar.set_postfix_str(f"loss {loss:.2f}")

            tower.train(model, chat, self.split.seen, self.scale.tower_steps, self.seed, on_step)
        share = tower.recognised(model, chat, self.split.seen, seed=10**6 + self.seed)
        say(f"  fresh pictures whose features are nearest to their own name: {share:.2f}")
        save(model, self.folder / "start", self.folder / "base")

    def knowledge(self) -> None:
        self.measure(self.folder / "base", countries(), "known")

    def retained(self) -> None:
        self.measure(self.folder / "imitation" / "model", self.split.test, "known-after")

    def measure(self, folder: Path, about: list[Country], name: str) -> None:
        model = load(folder, getattr(torch, self.dtype), self.device)
        with progress("knowledge", len(FACTS) * len(about), "fact") as bar:
            known = measure(model, self.chat(folder), about, self.scale.samples, self.seed, bar.update)
        files_of.write_known(self.folder / f"{name}.jsonl", known)
        for kind in FACTS:
            shares = [each.sampled for each in known if each.kind == kind]
            say(f"  {kind}: right in {sum(shares) / len(shares):.2f} of the samples")

    # ---- data

    def files(self) -> None:
        if self.data.exists():
            shutil.rmtree(self.data)
        web = self.data / "web"
        files_of.write_web(web, countries(), self.seed)
        index = ["--images", web / "pictures", "--titles", web / "titles.jsonl", "--pages", web / "pages.jsonl"]
        self.command("search.py", "index", *index, "--out", self.data / "web.index")

        writer = self.writer()
        known = files_of.read_known(self.folder / "known.jsonl")
        asked = files_of.to_imitate(self.split, known, self.seed)
        teacher = files_of.Teacher(known, self.seed)
        self.write_imitation("imitate", *teacher.by_chance(writer.rows("imitate", asked), asked))
        train = writer.rows("train", files_of.every_question(self.split.train))
        files_of.write_rows(self.data / "train.jsonl", files_of.shuffled(train, self.seed))
        test = files_of.shuffled(writer.rows("test", files_of.every_question(self.split.test)), self.seed)
        files_of.write_rows(self.data / "test.jsonl", test)
        for name, kinds in (("test-names", (NAME,)), ("test-facts", FACTS)):  # always searching differs
            files_of.write_rows(self.data / f"{name}.jsonl", [row for row in test if row["kind"] in kinds])
        share = sum(row["found"] for row in test) / len(test)
        say(f"  image searches of the evaluation whose first result is right: {share:.2f}")

    def writer(self) -> files_of.Questions:
        known = files_of.read_known(self.folder / "known.jsonl")
        return files_of.Questions(self.data, known, self.split.seen, self.seed)

    def write_imitation(self, name: str, rows: list[files_of.Row], told: list[files_of.Row]) -> None:
        files_of.write_rows(self.data / f"{name}.jsonl", rows)
        files_of.write_rows(self.data / f"{name}-told.jsonl", told)

    # ---- training

    def imitation(self) -> None:
        self.imitate("imitation", "imitate", self.scale.imitation_steps, "--lora", 32)

    def informed(self) -> None:
        count = 2 * ASKED * self.scale.grpo_steps
        asked = files_of.repeated(self.split.train, count, self.seed)
        rows = self.writer().rows("informed", asked)
        known = files_of.read_known(self.folder / "known.jsonl")
        self.write_imitation("informed", *files_of.Teacher(known, self.seed).by_knowledge(rows, asked))
        self.imitate("informed", "informed", count // IMITATED, "--adapter", self.adapter("imitation"))
        self.evaluate("informed", "informed")

    def imitate(self, name: str, data: str, steps: int, *options) -> None:
        given = ["--data", self.data / f"{data}.jsonl", "--demonstrations", self.data / f"{data}-told.jsonl"]
        self.train(name, steps, *IMITATION.split(), *given, *options)

    def grpo(self) -> None:
        self.reinforce("grpo")

    def unpenalised(self) -> None:
        self.reinforce("unpenalised", "--penalty", 0)
        self.evaluate("unpenalised", "unpenalised")

    def reinforce(self, name: str, *options) -> None:
        given = ["--data", self.data / "train.jsonl", "--adapter", self.adapter("imitation")]
        self.train(name, self.scale.grpo_steps, *GRPO.split(), *given, *options)

    def adapter(self, trained: str) -> Path:
        return self.folder / trained / "adapter"

    # ---- evaluation

    def evaluation(self) -> None:
        for trained, name in (("imitation", "before"), ("grpo", "after")):
            always = ["--mode", "rag"]
            self.evaluate(name, trained)
            self.evaluate(f"never-{name}", trained, "--mode", "direct")
            self.evaluate(f"always-{name}-facts", trained, *always, data="test-facts")
            self.evaluate(f"always-{name}-names", trained, *always, "--max-texts", 0, data="test-names")
        self.evaluate("greedy", "grpo", temperature=0)

    def evaluate(self, name: str, trained: str, *options, data: str = "test", temperature: float = TEMPERATURE) -> None:
        given = ["--adapter", self.adapter(trained), "--data", self.data / f"{data}.jsonl"]
        given += ["--temperature", temperature, "--limit", self.scale.limit]
        self.command("eval.py", *self.rollouts(f"eval-{name}"), *given, *options)

    def exported(self) -> None:
        folder = self.folder / "grpo" / "model"
        rows = files_of.read_rows(self.data / "test.jsonl")[:10]
        turns = exported.first_turns(folder, self.chat(folder), rows, self.data)
        for our_turn, their_turn in turns:
            if our_turn != their_turn:
                say(f"  ours: {our_turn}\n  theirs: {their_turn}")
        equal = sum(a == b for a, b in turns)
        say(f"  {equal} of {len(turns)} turns are equal")

    def report(self) -> None:
        say(report.write(self.folder))

    # ---- running the programs

    def rollouts(self, name: str) -> list:
        """The options that every run of train.py and eval.py gets; `name`: of its folder."""
        options = [*ROLLOUT.split(), "--prompts", HERE / "prompts", "--seed", self.seed]
        options += ["--dtype", self.dtype, "--model", self.folder / "start"]
        options += ["--search", f"local:{self.data / 'web.index'}"]
        return [*options, "--search-cache", self.folder / "searches.sqlite", "--out", self.folder / name]

    def train(self, name: str, steps: int, *options) -> None:
        self.command("train.py", *self.rollouts(name), *TRAINING.split(), "--steps", steps, *options)

    def command(self, program: str, *options) -> None:
        """Run one of the programs, and show how to type it. Its failure is this program's, with the same status.

        Ctrl-C reaches it too, and it saves; so it is waited for. SIGTERM is passed on. After either no stage follows,
        also where the program had just finished. Raises KeyboardInterrupt, or SystemExit(143) after SIGTERM.
        """
        words = [program, *map(str, options)]
        say(f"  python {shlex.join(words)}")
        interrupted: BaseException | None = None
        with subprocess.Popen([sys.executable, *words], cwd=ROOT) as child:

            def pass_on(*_) -> None:
                nonlocal interrupted
                interrupted = SystemExit(143)
                child.terminate()

            signal.signal(signal.SIGTERM, pass_on)
            while True:
                try:
                    status = child.wait()
                    break
                except KeyboardInterrupt as error:
                    interrupted = error
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if interrupted:
            raise interrupted
        if status < 0:
            say(f"{program} was killed by signal {-status}" + (": out of memory?" if status == -9 else ""))
        if status:
            raise SystemExit(status if status > 0 else 128 - status)
