"""Real weights learn when to search, on flags: `python -m examples.flags`.

A small pretrained language model (SmolLM2, 135 million parameters) gets eyes for 120 flags and is shown how to answer
and how to search. Then it learns by reinforcement what it has to search for: flags that it never saw, and facts that it
does not know. What it knows is its own: no training here states a fact that it did not give by itself before.

Everything is done in stages, in the folder of the seed. A stage that is finished is not done again; one that was
interrupted goes on. The programs are this project's: every command is shown as it can be typed.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from examples.flags import base, questions, report, tower
from examples.flags.countries import FACTS, NAME, Country, countries, split
from examples.flags.knowledge import Known, measure
from examples.flags.pictures import HEIGHT, WIDTH
from mmsr.chat import Chat
from mmsr.config import check_command_line  # noqa: F401  (the oldest Python is refused there)
from mmsr.pretrained.load import load
from mmsr.pretrained.save import save
from mmsr.system.errors import UserError
from mmsr.system.files import write_whole
from mmsr.system.progress import duration, progress, say
from mmsr.tools import search_tools

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SENTENCES = ("The capital of France is Paris.", "<reason>This is the flag of Peru.</reason> <answer>Peru</answer>")

# What training and evaluation have in common: the limits of a rollout, and a small machine.
ROLLOUT = f"""
    --recipe paper --results 2 --max-turns 3 --max-images 1 --max-texts 1
    --min-pixels {HEIGHT * WIDTH} --max-pixels {HEIGHT * WIDTH} --max-tokens 256 --turn-tokens 48
    --dtype bfloat16 --slots 96 --slot-tokens 0 --micro-tokens 8192
"""
IMITATION = """
    --algorithm sft --lora 32 --lr 1e-3 --lr-schedule half-decay --kl 0
    --questions 20 --mini-batch 20 --group-size 1 --eval-size 24 --no-recompute --merge
"""
GRPO = """
    --lr 3e-4 --lr-schedule half-decay --warmup 2 --adam-beta2 0.99 --kl 0 --group-eps 0.05 --zero-std drop
    --questions 12 --mini-batch 12 --group-size 8 --eval-size 24 --no-recompute --merge
"""


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    tower_steps: int = 900
    samples: int = 16  # of each fact, where knowledge is measured
    imitation_steps: int = 60
    grpo_steps: int = 48
    limit: int = 0  # questions of an evaluation; 0: all


QUICK = Scale(tower_steps=4, samples=2, imitation_steps=2, grpo_steps=2, limit=8)


class Experiment:
    """The stages of one seed, in `folder`; each method is one, and its docstring is what is said about it."""

    def __init__(self, folder: Path, seed: int, llama: str, scale: Scale):
        self.folder = folder
        self.seed = seed
        self.llama = llama
        self.scale = scale
        self.everything = countries()
        self.split = split(self.everything, seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def chat(self, model: Path) -> Chat:
        return Chat(model, HERE / "prompts", search_tools(None, 1, 1))

    def base(self) -> None:
        """The base model: SmolLM2 from its package, as a Qwen2.5-VL with an untrained tower."""
        llama, tokenizer = base.open_llama(self.llama)
        vision = tower.sizes(llama.config.hidden_size)
        model = base.from_llama(llama, tokenizer, vision, self.folder / "base", self.seed)
        self.compare(model, llama, tokenizer)

    def compare(self, model, llama, tokenizer) -> None:
        """Say how far the logits of the two are apart. Raises UserError where that is more than rounding."""
        for sentence in SENTENCES:
            ids = tokenizer(sentence).input_ids
            apart = base.difference(model, llama, ids)
            say(f"  logits of {len(ids)} tokens, largest difference from transformers: {apart:.1e}")
            if not apart < 1e-3:
                raise UserError("the base model is not the language model that it was made from")

    def tower(self) -> None:
        """The vision tower learns 120 flags: where a picture stands, the embeddings of the country's name."""
        model = load(self.folder / "base", torch.float32, self.device)
        chat = self.chat(self.folder / "base")
        steps = self.scale.tower_steps
        with progress("tower", steps, "step") as bar:

            def on_step(loss: float) -> None:
                bar.update()
                bar.set_postfix_str(f"loss {loss:.2f}")

            tower.train(model, chat, self.split.known_flags, steps, self.seed, on_step)
        share = tower.recognised(model, chat, self.split.known_flags, seed=10**6 + self.seed)
        say(f"  flags whose features are nearest to their own name, on fresh pictures: {share:.2f}")
        save(model, self.folder / "start", self.folder / "base")

    def knowledge(self) -> None:
        """What the model knows before any training: 573 facts, each asked 16 times in words at T = 1."""
        self.measure(self.folder / "base", self.everything, "known")

    def measure(self, model: Path, about: list[Country], name: str) -> None:
        opened = load(model, torch.bfloat16, self.device)
        samples = self.scale.samples
        with progress("knowledge", len(FACTS) * len(about), "fact") as bar:
            known = measure(opened, self.chat(model), about, samples, self.seed, bar.update)
        questions.write_lines(self.folder / f"{name}.jsonl", map(asdict, known))
        for kind in FACTS:
            shares = [each.sampled for each in known if each.kind == kind]
            say(f"  {kind}: right in {sum(shares) / len(shares):.2f} of the samples")

    def files(self) -> None:
        """The questions, the conversations to imitate, and the web: an index of pictures and pages."""
        data = self.folder / "data"
        if data.exists():
            shutil.rmtree(data)
        questions.write_web(data / "web", self.everything, self.seed)
        known = self.known()
        writer = questions.Questions(data, known, self.split.known_flags, self.seed)
        asked = questions.to_imitate(self.split, known, self.seed)
        rows = writer.rows("imitate", asked)
        questions.write_lines(data / "conversations.jsonl", questions.demonstrations(rows, asked, self.seed))
        questions.write_lines(data / "imitate.jsonl", rows)
        parts = {
            "train": self.split.train + self.split.new_train,
            "test": self.split.test + self.split.new_test,
        }
        for name, about in parts.items():
            rows = questions.shuffled(writer.rows(name, questions.every_question(about)), self.seed)
            questions.write_lines(data / f"{name}.jsonl", rows)
        for name, kinds in (("test-names", (NAME,)), ("test-facts", FACTS)):  # searched for in different ways
            questions.write_lines(data / f"{name}.jsonl", [row for row in rows if row["kind"] in kinds])
        web = data / "web"
        index = ["--images", web / "pictures", "--titles", web / "titles.jsonl", "--pages", web / "pages.jsonl"]
        self.command("search.py", "index", *index, "--out", data / "web.index")

    def imitation(self) -> None:
        """Imitation: how a flag and a fact are recalled or looked up, half and half, in an adapter of rank 32."""
        data = self.folder / "data"
        given = ["--data", data / "imitate.jsonl", "--demonstrations", data / "conversations.jsonl"]
        self.train("imitation", *IMITATION.split(), "--steps", self.scale.imitation_steps, *given)

    def retained(self) -> None:
        """What it knows after the imitation: the facts about the countries that are never asked about in training."""
        self.measure(self.folder / "imitation" / "model", self.split.test + self.split.new_test, "known-after")

    def grpo(self) -> None:
        """Reinforcement learning: when to search. 60 steps of 12 questions with 8 rollouts."""
        given = ["--data", self.folder / "data" / "train.jsonl", "--adapter", self.folder / "imitation" / "adapter"]
        self.train("grpo", *GRPO.split(), "--steps", self.scale.grpo_steps, *given)

    def evaluation(self) -> None:
        """300 questions about 75 countries that training leaves out: before, after, always and never searching."""
        test = self.folder / "data" / "test.jsonl"
        self.evaluate("before", "imitation", test, "--temperature", 1)
        self.evaluate("after", "grpo", test, "--temperature", 1)
        self.evaluate("after-greedy", "grpo", test)
        self.evaluate("never", "imitation", test, "--temperature", 1, "--mode", "direct")
        always = ["--temperature", 1, "--mode", "rag"]
        self.evaluate("always-facts", "imitation", test.with_name("test-facts.jsonl"), *always)
        self.evaluate("always-names", "imitation", test.with_name("test-names.jsonl"), *always, "--max-texts", 0)

    def evaluate(self, name: str, trained: str, data: Path, *how) -> None:
        given = ["--adapter", self.folder / trained / "adapter", "--data", data, "--limit", self.scale.limit]
        self.command("eval.py", *self.rollouts(f"eval-{name}"), *given, *how)

    def report(self) -> None:
        """The numbers and the curve."""
        text = report.write(self.folder, self.known())
        say(text)

    def known(self) -> list[Known]:
        lines = (self.folder / "known.jsonl").read_text(encoding="utf-8").splitlines()
        return [Known(**json.loads(line)) for line in lines]

    # ---- running the programs

    def rollouts(self, name: str) -> list:
        """The options that every run of train.py and eval.py gets, `name` its folder."""
        options = [*ROLLOUT.split(), "--prompts", HERE / "prompts", "--seed", self.seed]
        options += ["--model", self.folder / "start", "--search", f"local:{self.folder / 'data' / 'web.index'}"]
        return [*options, "--search-cache", self.folder / "searches.sqlite", "--out", self.folder / name]

    def train(self, name: str, *options) -> None:
        evaluated = ["--eval-data", self.folder / "data" / "test.jsonl"]
        self.command("train.py", *self.rollouts(name), *options, *evaluated, "--save-every", 10, "--resume")

    def command(self, program: str, *options) -> None:
        """Run one of the programs, and show how to type it. Its failure is this program's, with the same status."""
        words = [program, *map(str, options)]
        say(f"  python {shlex.join(words)}")
        status = subprocess.run([sys.executable, *words], cwd=ROOT).returncode
        if status:
            raise SystemExit(status if status > 0 else 130)


# In their order, with minutes on two cores (AMD EPYC).
STAGES = {
    "base": 0.5,
    "tower": 2,
    "knowledge": 4,
    "files": 0.3,
    "imitation": 9,
    "retained": 2,
    "grpo": 45,
    "evaluation": 8,
    "report": 0.1,
}


def run(experiment: Experiment) -> None:
    """All stages that are not finished."""
    folder = experiment.folder
    folder.mkdir(parents=True, exist_ok=True)
    times = folder / "seconds.json"
    done = json.loads(times.read_text()) if times.is_file() else {}
    for number, (name, minutes) in enumerate(STAGES.items(), 1):
        stage: Callable[[], None] = getattr(experiment, name)
        say(f"\n[{number}/{len(STAGES)}] {stage.__doc__}")
        if name in done and name != "report":
            say(f"  done before, in {duration(done[name])}")
            continue
        say(f"  takes about {duration(60 * minutes)} on two cores")
        start = time.perf_counter()
        stage()
        done[name] = done.get(name, 0) + round(time.perf_counter() - start)
        write_whole(times, [json.dumps(done, indent=2).encode() + b"\n"])
        say(f"  took {duration(done[name])}")
    say(f"\nAll of it: {duration(sum(done.values()))}. Written in {folder}:")
    say("  report.md, curve.png    the numbers and the curve")
    say("  grpo/report.html        every rollout of training: open it in a browser")


def main(argv: list[str]) -> None:
    total = duration(60 * sum(STAGES.values()))
    parser = argparse.ArgumentParser(prog="python -m examples.flags", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split by country, and of all training")
    parser.add_argument("--out", type=Path, default=Path("runs/flags"), help="the seed has its folder in it")
    parser.add_argument("--llama", default="", help="another Llama-like model: a folder or a hub id")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try the machine")
    parser.add_argument("--check", action="store_true", help="only make the base model, and compare its logits")
    options = parser.parse_args(argv)
    folder = (options.out / f"seed-{options.seed}{'-quick' * options.quick}").resolve()
    experiment = Experiment(folder, options.seed, options.llama, QUICK if options.quick else Scale())
    try:
        if options.check:
            experiment.base()
            return
        say(f"python -m examples.flags: {len(STAGES)} stages, {total} hours on two cores, in {folder}")
        run(experiment)
    except UserError as error:
        print(f"python -m examples.flags: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
