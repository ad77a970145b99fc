"""Real weights learn when to search, on flags: `python -m examples.flags`.

A small pretrained language model (SmolLM2, 135 million parameters) gets a vision tower that recognises 120 flags, and
is shown how to answer and how to search. Then it learns by reinforcement what it has to search for: flags that it never
saw, and facts that it does not know. What it knows is its own: no conversation that it imitates states an answer that
it did not give before any training.

The stages are in `stages.py`. They work in the folder of the seed. A stage that is finished is not done again.
Training and evaluation that were interrupted go on where they stopped; another stage, which takes some minutes at most,
begins again.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from examples.flags.stages import COMPARED, FULL, MINUTES, QUICK, Experiment
from mmsr.system.errors import UserError, first_line
from mmsr.system.files import Lock, json_file, make_out, write_whole
from mmsr.system.progress import duration, say

PROGRAM = "python -m examples.flags"


def run(experiment: Experiment, minutes: dict[str, float], tell_minutes: bool) -> None:
    """All stages that are not finished, in their order. Raises UserError."""
    folder = experiment.folder
    file = folder / "stages.json"
    state = json_file(file) if file.is_file() else {"finished": [], "seconds": {}}
    experiment.open_folder(state["finished"])
    for place, (name, expected) in enumerate(minutes.items(), 1):
        say(f"\n[{place}/{len(minutes)}] {name}: {experiment.about(name)}")
        if name in state["finished"]:
            say(f"  finished before, in {duration(state['seconds'][name])}")
            continue
        if tell_minutes:
            say(f"  about {duration(60 * expected)} on two cores")
        start = time.perf_counter()
        try:
            getattr(experiment, name)()
            if name != "report":  # made again each time, for other stages may have been added
                state["finished"].append(name)
        finally:  # time that was interrupted counts too
            state["seconds"][name] = state["seconds"].get(name, 0) + time.perf_counter() - start
            write_whole(file, [json.dumps(state, indent=2).encode() + b"\n"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # the next stage may be a program of its own
        say(f"  took {duration(state['seconds'][name])}")
    say(f"\nAll of it: {duration(sum(state['seconds'].values()))}. Written in {folder}:")
    say("  report.md, curve.png    the numbers and the curve")
    say("  grpo/report.html        every rollout of training: open it in a browser")


def check(llama: str) -> None:
    """Make the base model in a folder that is removed again, and compare its logits."""
    with tempfile.TemporaryDirectory() as folder:
        Experiment(Path(folder), 0, llama, FULL).base()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0, help="of the split by country, and of all training")
    parser.add_argument("--out", type=Path, default=Path("runs/flags"), help="the seed has its folder in it")
    parser.add_argument("--llama", default="", help="another Llama-like model: a folder or a hub id")
    parser.add_argument("--compare", action="store_true", help="also without the penalty, and with more imitation")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything, to try the machine")
    parser.add_argument("--check", action="store_true", help="only make the base model, and compare its logits")
    options = parser.parse_args(argv)
    try:
        if options.check:
            check(options.llama)
            return
        if not 0 <= options.seed < 10**12:
            raise UserError(f"--seed {options.seed}: give a number from 0 to 1e+12")
        folder = (options.out / f"seed-{options.seed}{'-quick' * options.quick}").resolve()
        make_out(folder)
        lock = Lock(folder)
        minutes = MINUTES | (COMPARED if options.compare else {})
        minutes["report"] = minutes.pop("report")  # at the end
        total = "" if options.quick else f", about {sum(minutes.values()):.0f} minutes on two cores"
        say(f"{PROGRAM}: {len(minutes)} stages{total}, in {folder}")
        scale = QUICK if options.quick else FULL
        run(Experiment(folder, options.seed, options.llama, scale), minutes, tell_minutes=not options.quick)
        lock.release()
    except (UserError, OSError) as error:
        print(f"{PROGRAM}: {first_line(error)}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on.", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main(sys.argv[1:])
