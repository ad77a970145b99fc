"""Many resumable training runs in variations of the toy world, for `claims.py` and `what_breaks.py`.

Every run is a process of one thread with a folder DIR/VARIANT-SEED. Its results are in outcome.json there: a run with
results is not run again, and an interrupted one continues with `--resume`. Variations with equal knowledge share a base
model in MMSR_CACHE, so base models are made before the runs that start from them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping, Sequence

import common  # noqa: F401  finds train.py and the package

import train
from mmsr import evaluate
from mmsr.config import Config
from mmsr.episode import Example
from mmsr.rollout import Script
from mmsr.system.errors import UserError
from mmsr.system.files import write_whole
from mmsr.system.parallel import SINGLE
from mmsr.system.progress import progress, say
from mmsr.toy.base import WarmStart, base_model
from mmsr.toy.world import FULL, Settings, World

Outcome = Mapping[str, Any]
SHAPES = ("answer", "image → answer", "text → answer", "image → text → answer")

DIED = "exit status"  # starts the last line of a failed job's log


@dataclass(frozen=True)
class Variant:
    """One way to train. Variants with the same `base` start from the same base models."""

    settings: Settings = FULL
    options: Mapping[str, Any] = field(default_factory=dict)  # of Config
    patch: Callable[[], None] = lambda: None  # changes the program before training
    patch_base: Callable[[], None] = lambda: None  # changes it before the base model is looked up or made
    base: str = "full"
    recipe: WarmStart = WarmStart()
    forced: bool = False  # evaluate with searches forced too, greedily and after training


# ---- one run


def base_of(variant: Variant, seed: int) -> Path:
    variant.patch_base()
    return base_model(World(seed, variant.settings), variant.recipe)


def run(variant: Variant, seed: int, folder: Path) -> None:
    """Train and evaluate one variant, or continue it, and write its outcome.json."""
    options = {"save_every": 20, **Config.defaults("toy", "full"), **variant.options, "toy": "full", "seed": seed}
    world, start = World(seed, variant.settings), base_of(variant, seed)
    variant.patch()
    config = Config(**options, model=str(start), out=str(folder), resume=folder.exists())
    train.train(config, SINGLE, world)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [record for record in records if "eval" in record]
    last = next(record for record in reversed(records) if "loss" in record)
    found = {"before": evaluations[0], "after": evaluations[-1], "last": last, "shapes": shapes(folder)}
    if variant.forced:
        found["forced"] = forced(config, world, start, folder / "model")
    write_whole(folder / "outcome.json", [json.dumps(found).encode()])


def forced(config: Config, world: World, before: Path, after: Path) -> dict[str, Any]:
    """Evaluations with all searches forced, or without searches, of the model before and after training."""
    wanted = {
        "always, before": (before, 0.0, False),
        "always, after": (after, 0.0, False),
        "always, after, T = 1": (after, 1.0, False),
        "never, before": (before, 0.0, True),
    }

    def always_search(example: Example, sample: int) -> Script:
        return Script(world.always_search(example, config.max_texts > 0))

    found = {}
    for name, (model, temperature, direct) in wanted.items():
        setup = train.open_setup(Config(**{**vars(config), "model": str(model), "kl": 0.0}), SINGLE, world)
        scripts = None if direct else always_search
        seed = (config.seed, "always_search")
        episodes, _ = setup.roll_out(setup.eval_questions, 1, seed, temperature, direct=direct, scripts=scripts)
        setup.score(episodes)
        found[name] = evaluate.by_category(episodes)
    return found


def shapes(folder: Path) -> list[dict[str, float]]:
    """For each step the share of every turn shape; shapes that are not in `SHAPES` count as other."""
    steps = []
    for file in sorted((folder / "rollouts").glob("step-*.jsonl")):
        with open(file, encoding="utf-8", errors="replace") as lines:
            seen = Counter(_shape(json.loads(line)) for line in lines)
        steps.append({shape: seen[shape] / seen.total() for shape in (*SHAPES, "other")})
    return steps


def _shape(line: Mapping[str, Any]) -> str:
    actions = [str(turn["action"]).split("_")[0] for turn in line["turns"] if turn["role"] == "assistant"]
    shape = " → ".join(actions)
    return shape if shape in SHAPES else "other"


# ---- all runs


def main(variants: Mapping[str, Variant], options: argparse.Namespace) -> dict[str, dict[int, Outcome]]:
    """The outcomes of all variants by seed, where runs succeeded; missing runs are started first.

    A process that was started for one run or base model does only that, and ends here.
    """
    if options.child:
        raise SystemExit(_child(variants, *options.child, options.out))
    places = {(name, seed): options.out / f"{name}-{seed}" for name in variants for seed in options.seeds}
    todo = [] if options.table else [key for key, place in places.items() if not (place / "outcome.json").exists()]
    options.out.mkdir(parents=True, exist_ok=True)
    _run_all(variants, todo, options)
    found: dict[str, dict[int, Outcome]] = {name: {} for name in variants}
    for (name, seed), place in places.items():
        if (place / "outcome.json").exists():
            found[name][seed] = json.loads((place / "outcome.json").read_text(encoding="utf-8"))
    return found


def parser(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, of one thread each")
    parser.add_argument("--figure", type=Path, help="draw the curves into this file (.svg, .png)")
    parser.add_argument("--table", action="store_true", help="run nothing: the table of what there is")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser


def _run_all(variants: Mapping[str, Variant], todo: Sequence[tuple[str, int]], options: argparse.Namespace) -> None:
    """All runs, in groups that start from one base model. The next base model is made during a group's runs."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name, seed in todo:
        groups.setdefault((variants[name].base, seed), []).append(name)
    with progress("toy runs", len(todo) + len(groups), "job") as bar, ThreadPoolExecutor(options.jobs) as pool:
        made = {}
        jobs = []

        def run_after_base(group: tuple[str, int], name: str) -> None:
            if made[group].result():
                _start("run", name, group[1], options, bar)

        for here, coming in zip([None, *groups], [*groups, None]):
            if coming:
                made[coming] = pool.submit(_start, "base", groups[coming][0], coming[1], options, bar)
            if here:
                jobs += [pool.submit(run_after_base, here, name) for name in groups[here]]
        for job in jobs:
            job.result()


def _start(kind: str, name: str, seed: int, options: argparse.Namespace, bar: Any) -> bool:
    """Run one job in a process, with its output in DIR/VARIANT-SEED.log. Returns whether it succeeded."""
    log = options.out / f"{name}-{seed}.log"
    command = [sys.executable, sys.argv[0], "--child", kind, name, str(seed), "--out", str(options.out)]
    with open(log, "a", encoding="utf-8") as file:
        ended = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=file, stderr=file)
        if ended.returncode:
            file.write(f"\n{DIED} {ended.returncode}\n")
    if ended.returncode:
        say(f"{kind} of {name}, seed {seed}: exit status {ended.returncode}; see {log}")
    bar.update()
    return ended.returncode == 0


def _child(variants: Mapping[str, Variant], kind: str, name: str, seed: str, out: Path) -> int:
    variant = variants[name]
    try:
        if kind == "base":
            base_of(variant, int(seed))
        else:
            run(variant, int(seed), out / f"{name}-{seed}")
    except UserError as error:
        print(error)
        return 2
    return 0


def last_words(log: Path) -> str:
    """The last line that a failed job printed; "" for jobs that did not fail or have not started."""
    lines = log.read_text(encoding="utf-8").split("\n") if log.exists() else []
    lines = [line for line in lines if line.strip()]
    return lines[-2].strip() if lines and lines[-1].startswith(DIED) else ""


def fate(name: str, out: Path, seeds: Sequence[int]) -> str:
    """Why no run of a variation has results: what the first that died said, or that none has run yet."""
    words = next(filter(None, [last_words(out / f"{name}-{seed}.log") for seed in seeds]), "")
    return f"died: {words[-100:]}" if words else "not yet run"


def publish(text: str, out: Path, file: str) -> None:
    """Write a table to a file in `out`, and print it."""
    (out / file).write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\n{out}: {file}")


# ---- numbers


def mean(evaluation: Mapping[str, Mapping[str, float]], key: str, categories: Sequence[str] = ()) -> float:
    """Mean of a number over categories (default: all with a weight), by the weights of the world."""
    names = categories or [name for name, weight in FULL.mix.items() if weight]
    share = {name: FULL.mix[name] for name in names}
    return sum(_number(evaluation[name], key) * weight for name, weight in share.items()) / sum(share.values())


def _number(row: Mapping[str, float], key: str) -> float:
    """`calls`: searches per question, at most one by image and one by text."""
    return row["search_ratio_image"] + row["search_ratio_text"] if key == "calls" else row[key]
