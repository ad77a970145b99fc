"""Kill a training run at random moments, half of them during a save, resume it, and compare with an uninterrupted run.

    python bench/faults.py --kills 50               # a miniature of the toy model, about five minutes
    python bench/faults.py --kills 50 --model DIR   # any toy base model
    python bench/faults.py --kills 50 --options "--lora 4 --merge"    # options of train.py, given to every run
    python bench/faults.py --kills 20 --no-guard    # what happens without the temporary folder and the manifest

A run is killed and resumed until it ends; then the next one starts, until there were `--kills` kills. Every run must
end with the weights, optimizer, metrics and rollouts of the reference, bit for bit (except seconds). Children are forks
of this process, which has imported everything and computed nothing: kill -9 has its full effect, and they start at
once. Saves that are meant to be hit are slowed down, so that kills fall into every part of a save.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from mmsr import assemble
from mmsr.system import checkpoint
from mmsr.toy import base
from mmsr.toy.world import World

STEPS = 5
PAUSE = 0.02  # seconds before each sync, rename and removal of a slowed save: a quarter of a second together


# ---- a run small enough to repeat


def miniature_base(cache: Path, family: str = "qwen2_5") -> Path:
    """A toy base model that has learned nothing, made in seconds, for tests of the program around it.

    `family`: as --toy-model has it.
    """
    os.environ["MMSR_CACHE"] = str(cache)
    gate = base._gate
    base._gate = lambda *_: {}
    try:
        return base.base_model(World(0), base.WarmStart(steps=1, batch=4), family)
    finally:
        base._gate = gate


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    """The command line of a run of seconds."""
    sizes = "--eval-size 2 --questions 4 --mini-batch 4 --group-size 2 --turn-tokens 12"
    given = f"--toy basic --data toy --search toy {sizes} --steps {STEPS} --save-every 1".split()
    return [*given, "--model", str(model), "--out", str(out), *more]


def vary_rewards() -> None:
    """Compute rewards from the sampled ids: an untrained model gets equal rewards, and would learn nothing."""
    honest = assemble.score

    def score(episodes, *rest) -> None:
        honest(episodes, *rest)
        for episode in episodes:
            episode.reward = sum(episode.input_ids) % 7 / 7

    assemble.score = score


def fingerprint(out: Path) -> dict[str, str]:
    """SHA-256 of every file of a run, without seconds and the folder's own name."""
    found = {}
    for file in sorted(p for p in out.rglob("*") if p.is_file()):
        content = file.read_bytes()
        if file.name in (checkpoint.MANIFEST, "report.html"):  # made from the other files, and they contain seconds
            content = b""
        elif file.suffix == ".safetensors":
            content = weights(file)
        elif file.suffix in (".json", ".jsonl"):
            lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
            content = json.dumps([_timeless(json.loads(line)) for line in lines]).encode()
        found[str(file.relative_to(out))] = hashlib.sha256(content).hexdigest()
    return found


def weights(file: Path) -> bytes:
    """All tensors of a safetensors file, by name."""
    tensors = sorted(load_file(file).items())
    return b"".join(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for name, tensor in tensors)


def _timeless(value):
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in ("seconds", "out", "resume")}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


# ---- children


def start(argv: list[str], log: Path, slow: bool, guard: bool = True) -> int:
    """Fork a training run; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "ab", buffering=0) as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        vary_rewards()
        if slow:
            _slow_down()
        if not guard:
            _without_guard()
        train.main(argv)
        status = 0
    except SystemExit as leaving:
        status = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _slow_down() -> None:
    def slowed(function):
        def run(*args, **kwargs):
            time.sleep(PAUSE)
            return function(*args, **kwargs)

        return run

    for name in ("_synced", "_sync_folder", "_publish", "_remove"):
        setattr(checkpoint, name, slowed(getattr(checkpoint, name)))


def _without_guard() -> None:
    """Write checkpoints in place and never verify them: a half-written folder then counts as a checkpoint."""

    def every(root: Path) -> list[Path]:
        entries = [p for p in root.iterdir() if not p.name.endswith(".old.tmp")] if root.is_dir() else ()
        return sorted(entries, key=checkpoint._step_of, reverse=True)

    checkpoint._checkpoints = every
    checkpoint._problem = lambda folder, ranks: None
    checkpoint._publish = lambda side, final: side.rename(final)


def ended(pid: int, wait: bool = False) -> int | None:
    """Exit status of a child (−9 after kill -9), None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_somewhere(pid: int, out: Path, rng: random.Random, mid_save: bool, longest: float) -> tuple[int, bool]:
    """Kill a child at a random moment within `longest` seconds, or in the first save after it.

    Returns its exit status, which is 0 if it ended before, and whether a save was in progress.
    """
    moment = time.monotonic() + rng.uniform(0, longest)
    saves = out / "checkpoints"
    extra = rng.uniform(0, 12 * PAUSE)
    while (status := ended(pid)) is None:
        if time.monotonic() >= moment:
            if not mid_save:
                break
            if any(saves.glob("step-*.tmp")):
                time.sleep(extra)
                break
        time.sleep(0.002)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        status = ended(pid, wait=True)
    return status, status == -signal.SIGKILL and any(saves.glob("step-*.tmp"))


# ---- the bench


def campaign(
    model: Path, scratch: Path, kills: int, seed: int, guard: bool = True, options: Sequence[str] = ()
) -> dict:
    """Kill and resume runs until there were `kills` kills and the last run is done. Returns what was counted."""
    rng = random.Random(seed)
    log = scratch / "log.txt"
    began = time.monotonic()
    status = ended(start(arguments(model, scratch / "reference", *options), log, slow=False), wait=True)
    if status:
        raise SystemExit(f"the reference run failed: see {log}")
    longest = time.monotonic() - began
    wanted = fingerprint(scratch / "reference")
    counts = {"kills": 0, "mid_save": 0, "runs": 0, "equal": 0, "different": 0, "stuck": 0}
    while counts["kills"] < kills:
        out = scratch / f"run-{counts['runs']}"
        counts["runs"] += 1
        status = -signal.SIGKILL
        while status == -signal.SIGKILL:
            mid_save = counts["mid_save"] <= counts["kills"] / 2 and counts["kills"] < kills
            pid = start(arguments(model, out, "--resume", *options), log, slow=mid_save, guard=guard)
            if counts["kills"] < kills:
                status, saving = kill_somewhere(pid, out, rng, mid_save, longest)
                counts["kills"] += status == -signal.SIGKILL
                counts["mid_save"] += saving
            else:
                status = ended(pid, wait=True)
        # Killed between the last save and the removal of older ones, a run keeps one more than the reference.
        same = status == 0 and wanted.items() <= fingerprint(out).items()
        counts["equal" if same else "stuck" if status else "different"] += 1
        print(f"{counts['kills']:4d} kills, {counts['mid_save']} mid-save; run {out.name}: exit {status}, equal {same}")
        if same:
            shutil.rmtree(out)
    weights = wanted["model/model.safetensors"]
    return {**counts, "weights_sha256": weights, "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a toy base model; default: a miniature that has learned nothing")
    parser.add_argument("--options", type=str.split, default=[], help="more options of train.py, in one string")
    parser.add_argument("--guard", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    model = args.model
    if model is None:  # in a child: this process must not compute before it forks
        pid = os.fork()
        if not pid:
            miniature_base(scratch / "base")
            os._exit(0)
        ended(pid, wait=True)
        model = next((scratch / "base").glob("toy-base-*"))
    result = campaign(model, scratch, args.kills, args.seed, args.guard, args.options)
    print(json.dumps(result))
    if result["equal"] != result["runs"]:
        raise SystemExit(f"not every run equals the reference: see {scratch}")
    shutil.rmtree(scratch)


if __name__ == "__main__":
    main()
