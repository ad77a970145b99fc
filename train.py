"""Train a vision-language model with GRPO to search when it must: `python train.py --help`.

On several devices: `torchrun --nproc-per-node 8 train.py …`. Every process runs this same loop on its own share of each
step's questions; `ranks` has what they must know of each other.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Sequence

import torch
from tqdm import tqdm

from mmsr import alarms, checkpoint, evaluate, grpo
from mmsr import model as modeling
from mmsr.album import Album
from mmsr.assemble import Setup, assemble, launch, say
from mmsr.config import CONFIG, Config
from mmsr.data import Sampler
from mmsr.episode import TOOL_ERROR, Episode, UserError
from mmsr.files import append, object_in, write_whole
from mmsr.interrupt import Interrupts
from mmsr.parallel import Ranks, gathered
from mmsr.report import shape_name, write_report
from mmsr.runfolder import RunFolder
from mmsr.toy import World
from mmsr.track import Tracker
from mmsr.update import MasterWeights, Trainer, split

MOST_DETAILED = 1024  # rollouts of a step whose lines hold every token: most of such a line, and few are ever looked at


def train(config: Config, ranks: Ranks, world: World | None = None) -> None:
    """`world`: a toy world of one's own instead of the one that `config.toy` names."""
    with ranks.alone():
        out = Output(config, ranks)
    with out:
        run(config, ranks, world, out)


def run(config: Config, ranks: Ranks, world: World | None, out: Output) -> None:
    """The steps of `train`, in a folder that is held against other runs."""
    setup = assemble(config, ranks, world)
    with ranks.alone():
        out.check(setup)
    trainer = make_trainer(setup)
    sampler = Sampler(len(setup.questions), config.seed)
    saved = Checkpoints(setup, trainer, sampler, out)
    done = saved.resume()
    with ranks.alone():
        out.begin(done)
        lines = out.steps()
    lines = ranks.everyone(lines)[0]
    steps = range(done + 1, config.steps + 1)
    bar = tqdm(steps, "train", config.steps, initial=done, unit="step", disable=not ranks.main)
    with Interrupts() as stop, bar:
        for step in bar:
            if step == 1 or config.eval_every and (step - 1) % config.eval_every == 0:
                out.line(evaluation(step - 1, setup, stop))
            clock = Clock()
            with clock("rollout"):
                episodes, counts = roll_out(step, setup, sampler, stop)
            if episodes is None:
                break  # interrupted: the last step is whole, this one is not there
            with clock("reward"), ranks.alone():
                setup.score(episodes)
                zero_std = assign_advantages(episodes, config)
            with clock("update"):
                update = trainer.step(mini_batches(episodes, config), learning_rate(config, step))
            metrics = step_metrics(step, setup, episodes, counts, update, zero_std, clock.seconds)
            said = raise_alarms(metrics, lines, setup)
            out.step(step, metrics, episodes, setup.chat.pieces if config.log_tokens else None)
            warn(ranks, *(f"step {step}: {sentence}" for sentence in said))
            saved.finished(step)
            stop_if_stalled(lines, config)
            out.report()
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", search=f"{metrics['search_ratio']:.2f}")
        else:
            out.line(evaluation(config.steps, setup, stop))
        bar.close()
        if status := int(ranks.max(stop.status)):
            saved.leave()
        out.finish(setup, summary=not status)
    if alarms.never_trained(lines):
        warn(ranks, f"WARNING: no step trained a token: {out.folder / 'model'} has the weights that the run began with")
    if status:
        raise SystemExit(status)


def roll_out(step: int, setup: Setup, sampler: Sampler, stop: Interrupts) -> tuple[list[Episode] | None, Mapping]:
    """This rank's episodes of a step, not scored yet, and all ranks' counts of tokens and images. None: interrupted."""
    c = setup.config
    setup.begin_step(f"step {step}")
    examples = [setup.questions[i] for i in sampler.take(c.questions)]
    with progress("rollouts", c.questions * c.group_size, setup.ranks) as on_done:
        rollouts = setup.roll_out(
            examples, c.group_size, (c.seed, step), c.temperature, stretch=c.mini_batch, scripts=setup.scripts,
            on_done=on_done, attempt=stop.breakable,
        )  # fmt: skip
    return rollouts or (None, {})


def make_trainer(setup: Setup) -> Trainer:
    c = setup.config
    reference = setup.reference() if c.kl and c.algorithm == "grpo" else None

    def adam(params) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=c.lr, betas=(0.9, c.adam_beta2), weight_decay=0.0, fused=True)

    return Trainer(
        setup.model, MasterWeights(setup.model, adam), setup.banned, reference=reference, kl=c.kl,
        clip_low=c.clip_low, clip_high=c.clip_high, loss_norm=c.loss_norm, importance_cap=c.importance_cap,
        temperature=c.temperature, micro_tokens=c.micro_tokens, max_grad_norm=c.max_grad_norm,
        max_skipped=c.max_skipped, sft=c.algorithm == "sft", ranks=setup.ranks,
    )  # fmt: skip


def assign_advantages(episodes: Sequence[Episode], config: Config) -> int:
    """Set every episode's `advantage` and whether it is `trained`. Returns how many groups have all rewards equal."""
    sound = [e.status != TOOL_ERROR for e in episodes]
    if config.algorithm == "sft":  # imitate what was right: demonstrations, or the model's own
        for episode, ok in zip(episodes, sound):
            if config.imitates:
                episode.imitate()
            episode.advantage, episode.trained = 1.0, ok and episode.reward_parts["accuracy"] == 1
        return 0
    rewards = torch.tensor([e.reward for e in episodes], dtype=torch.float64)
    group_ids = torch.tensor([e.group_id for e in episodes], dtype=torch.long)
    keep = torch.tensor(sound, dtype=torch.bool)
    advantages, varied = grpo.group_advantages(rewards, group_ids, config.group_eps, keep)
    chosen = varied.tolist() if config.zero_std == "drop" else sound
    for episode, advantage, trained in zip(episodes, advantages.tolist(), chosen):
        episode.advantage, episode.trained = advantage, trained
    return len(group_ids.unique()) - len(group_ids[varied].unique())


def mini_batches(episodes: Sequence[Episode], config: Config) -> list[list[Episode]]:
    """This rank's episodes of each of a step's updates, those that take part in it."""
    trained = [episode for episode in episodes if episode.trained]
    return split(trained, config.questions // config.mini_batch, config.questions)


def learning_rate(config: Config, step: int) -> float:
    """The rate of a step counted from 1: linear warm-up, then the schedule: constant, or down to a tenth."""
    share = max(0.0, (step - config.warmup - 1) / max(config.steps - config.warmup - 1, 1))
    decay = {
        "constant": 1.0,
        "half-decay": 1 - 0.9 * max(0.0, 2 * share - 1),
        "sigmoid": 0.1 + 0.9 * float(torch.sigmoid(torch.tensor(6 - 12 * share))),
    }[config.lr_schedule]
    return config.lr * decay * min(1.0, step / max(config.warmup, 1))


def step_metrics(
    step: int, setup: Setup, episodes: Sequence[Episode], counts: Mapping, update: dict, zero_std: int, seconds: dict
) -> dict:
    """One line of metrics.jsonl. `episodes` and `zero_std` are this rank's, the other numbers those of all."""
    c, ranks = setup.config, setup.ranks
    means = evaluate.summary(episodes, ranks)
    n = means.pop("n")
    sums = {
        "format": sum(e.reward_parts["format"] for e in episodes),
        "tool_calls": sum(e.searches() for e in episodes),
        "response_tokens": sum(sum(e.loss_mask) for e in episodes),
        "zero_std_groups": zero_std,
    }
    sums = ranks.sum(sums)
    errors = Counter(ranks.sum(evaluate.tool_errors(episodes)))
    loss = ("loss", "kl", "entropy", "clip_fraction", "logp_gap", "logp_gap_max", "grad_norm", "skipped_updates")
    unknown = {"logp_gap": math.nan, "logp_gap_max": math.nan} if c.imitates else {}  # nobody sampled these tokens
    return {
        "step": step,
        **means,
        "format": sums["format"] / n,
        "tool_calls": sums["tool_calls"],
        "tool_failures": errors.total(),
        "tool_errors": dict(errors.most_common(3)),
        "response_tokens": sums["response_tokens"] / n,
        "zero_std_groups": sums["zero_std_groups"],
        **{key: update[key] for key in loss} | unknown,
        "status": ranks.sum(dict(Counter(e.status for e in episodes))),
        "shapes": ranks.sum(dict(Counter(_shape(e) for e in episodes))),
        "by_category": {
            category: {key: found[key] for key in ("n", "search_ratio")}
            for category, found in evaluate.by_category(episodes, ranks).items()
        },
        "lr": learning_rate(c, step),
        "seconds": {key: round(value, 3) for key, value in seconds.items()},
        "tokens": {
            **{key: counts[key] for key in ("prefilled", "prefilled_unique", "sampled")},
            **{key: update[key] for key in ("trained", "trained_unique")},
        },
        **({"spent": setup.spending.spent} if setup.spending else {}),
        "images": {"distinct": counts["images_distinct"], "encoded": counts["images_encoded"] + update["encoded"]},
    }


def raise_alarms(metrics: dict, lines: list[dict], setup: Setup) -> list[str]:
    """Add a step's metrics to the `lines` of those before, with the words of its alarms. Returns what is to be said."""
    c = setup.config
    offered = c.max_turns > 1 and any(tool.limit for tool in setup.toolbox.tools.values())
    found = alarms.alarms([*lines, metrics], str(setup.dtype).removeprefix("torch."), offered and not c.imitates)
    if found:
        metrics["alarms"] = list(found)
    said = alarms.to_say(found, lines)
    lines.append(metrics)
    return said


def stop_if_stalled(lines: Sequence[dict], config: Config) -> None:
    """Raises UserError after too many steps that trained nothing: the weights will not change any more."""
    if (n := alarms.stalled(lines)) >= config.max_skipped:
        why = alarms.untrained(lines[-1])
        raise UserError(f"{n} steps in a row trained nothing; in the last, {why}; mend that, or raise --max-skipped")


def warn(ranks: Ranks, *sentences: str) -> None:
    """One line each on standard error, once, above the progress bar."""
    for sentence in sentences if ranks.main else ():
        tqdm.write(sentence, file=sys.stderr)


def _shape(episode: Episode) -> str:
    return shape_name([turn.action for turn in episode.turns if turn.role == "assistant"], episode.status)


def evaluation(step: int, setup: Setup, stop: Interrupts) -> dict | None:
    """One line of metrics.jsonl: the policy greedy and sampled, all ranks' episodes together. None: interrupted.

    Before training the two fixed policies too, where the toy world has them.
    """
    c = setup.config
    setup.begin_step(f"evaluation {step}")
    modes: dict[str, tuple] = {"eval": (0.0, None, False), "eval_sampled": (1.0, None, False)}
    if step == 0 and c.data == "toy":
        modes["always_search"] = (1.0, lambda example, _: setup.world.always_search(example, c.max_texts > 0), False)
        modes["never_search"] = (1.0, None, True)
    line: dict[str, Any] = {"step": step}
    for name, (temperature, scripts, direct) in modes.items():
        with progress(name.replace("_", " "), len(setup.eval_questions), setup.ranks) as on_done:
            episodes = setup.answers(
                setup.eval_questions, (c.seed, name), temperature, direct=direct, scripts=scripts,
                on_done=on_done, attempt=stop.breakable,
            )  # fmt: skip
        if episodes is None:
            return None
        line[name] = evaluate.by_category(episodes, setup.ranks)
    return line


class Checkpoints:
    """When a run saves what: every --save-every steps, after the last, and when it is interrupted."""

    def __init__(self, setup: Setup, trainer: Trainer, sampler: Sampler, out: Output):
        self.setup, self.config, self.sampler, self.optimizer = setup, setup.config, sampler, trainer.optimizer
        self.out = out
        self.root = Path(self.config.out) / "checkpoints"
        self.done = self.saved = 0  # the last step that is finished; that is saved
        self.cursor = 0  # of the sampler when that step was finished
        self.ranks = ranks = setup.ranks
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
        self.versions = dict(torch=torch.__version__, device=device, dtype=str(setup.dtype), processes=ranks.size)

    def resume(self) -> int:
        """Take up the newest sound checkpoint if that is asked for. Returns the number of finished steps."""
        if not self.config.resume:
            return 0
        state = checkpoint.resume(self.root, self.setup.model, self.optimizer, self.ranks)
        if state is None:
            say(self.ranks, f"--resume: no checkpoint in {self.root}: starting afresh.")
            return 0
        self.done = self.saved = state["step"]
        self.cursor = self.sampler.cursor = state["cursor"]
        say(self.ranks, f"Resumed after step {self.done}.")
        changed = {key: old for key, old in state["versions"].items() if self.versions.get(key) != old}
        if changed:
            listed = ", ".join(f"{key} {old}, now {self.versions.get(key)}" for key, old in changed.items())
            say(self.ranks, f"Saved with {listed}: weights and data order are exact, what is sampled may differ.")
        return self.done

    def finished(self, step: int) -> None:
        self.done, self.cursor = step, self.sampler.cursor
        if step == self.config.steps or self.config.save_every and step % self.config.save_every == 0:
            self.save()

    def save(self) -> None:
        self.out.check_there()
        if self.saved == self.done:
            return
        config = dataclasses.asdict(self.config)
        state = {"step": self.done, "cursor": self.cursor, "config": config, "versions": self.versions}
        checkpoint.save(self.root, self.done, self.setup.model, self.optimizer, state, self.config.keep, self.ranks)
        self.saved = self.done

    def leave(self) -> None:
        """Give up what has not begun, save and say so, before the program ends early."""
        self.setup.drop()
        self.save()
        kept = f"finished steps: {self.done}, saved in {self.root}" if self.done else "no step was finished"
        say(self.ranks, f"Interrupted; {kept}. Go on with --resume.")


class Output(RunFolder[Config]):
    """The files of a run, each step's written whole or not at all. A folder in use is refused, or resumed.

    Every rank has one and calls it, but the main one alone writes and prints.
    """

    def __init__(self, config: Config, ranks: Ranks):
        self.track = Tracker(config.track if ranks.main else "")
        super().__init__(config, ranks)
        self.metrics, self.rollouts = self.folder / "metrics.jsonl", self.folder / "rollouts"
        self.album = Album(self.folder / "images")
        self.report_due, self.report_failed = 0.0, False

    def check_options(self, used: bool) -> None:
        if used and not self.config.resume:
            raise UserError(f"--out {self.folder} is not empty: name another folder, remove it, or go on with --resume")
        super().check_options(used)

    def check(self, setup: Setup) -> None:
        """Raises UserError where a run that goes on is made of something else than before."""
        c = self.config
        asked = {f"--data {c.data}": setup.questions, f"--eval-data {c.eval_data}": setup.eval_questions}
        files = {name: questions for name, questions in asked.items() if name.split(" ", 1)[1] not in ("", "toy")}
        self.check_inputs(setup, files, __file__)

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
        """The lines of metrics.jsonl about the steps that are done; nothing but on the main rank."""
        if not self.ranks.main:
            return []
        records = map(_record, self.metrics.read_bytes().splitlines())
        return [record for record in records if record and alarms.NEEDED <= record.keys()]

    def line(self, record: dict | None) -> None:
        """Add to metrics.jsonl; of an interrupted evaluation (None) nothing.

        Onto the disk: a checkpoint, which is, must not know of steps that the other files lack.
        """
        if record is None or not self.ranks.main:
            return
        self.check_there()
        record = _finite(record)
        append(self.metrics, [json.dumps(record, allow_nan=False).encode() + b"\n"])
        self.track(record)

    def step(self, step: int, metrics: dict, episodes: Sequence[Episode], pieces: Callable | None) -> None:
        """A step's files. `pieces` as in `Episode.record`, for as many whole groups as `MOST_DETAILED` allows."""
        detailed = max(1, MOST_DETAILED // self.config.group_size)
        records = ((e, e.record(pieces if e.group_id < detailed else None)) for e in episodes)
        lines = [(e.group_id, e.sample, json.dumps(record, ensure_ascii=False) + "\n") for e, record in records]
        lines = sorted(self.ranks.gather(lines))
        pictures = self.ranks.gather(self.album.new(episodes))
        if not self.ranks.main:
            return
        self.check_there()
        self.album.add(pictures)
        self.rollouts.mkdir(exist_ok=True)  # somebody may have made room
        # JSON may hold lone surrogates, which UTF-8 cannot: escaped with a backslash they are JSON again.
        encoded = (line.encode("utf-8", "backslashreplace") for _, _, line in lines)
        write_whole(self.rollouts / f"step-{step:06d}.jsonl", encoded)
        self.line(metrics)

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
        weights = gathered(setup.model, setup.ranks, setup.dtype)
        if self.ranks.main:
            self.check_there()
            modeling.save_weights(setup.model.config, weights, self.folder / "model", setup.folder)
        self.report(at_once=True)
        if not summary or not self.ranks.main:
            return
        records = map(_record, self.metrics.read_bytes().splitlines())
        evaluations = [record for record in records if record and "eval" in record]
        names = {"eval": "{}, greedy", "eval_sampled": "{}, T = 1"}
        rows = {
            names.get(mode, mode.replace("_", " ")).format(when): row
            for when, found in (("before", evaluations[0]), ("after", evaluations[-1]))
            for mode, row in found.items()
            if mode != "step"
        }
        mix = setup.world.settings.mix if setup.config.data == "toy" and not setup.config.eval_data else None
        written = "report.html, model/, metrics.jsonl, rollouts/, images/, checkpoints/"
        print(f"\n{evaluate.table(rows, mix)}\n\n{self.folder}: {written}")


def _kept_bytes(lines: Iterable[bytes], done: int) -> int:
    """The length of what stays of metrics.jsonl: lines of the first `done` steps, and not of the evaluation after them.

    A damaged line between such lines stays where it is; one at the end was cut short by a crash.
    """
    kept = end = 0
    for line in lines:
        end += len(line)
        record = _record(line)
        if record is None or not line.endswith(b"\n"):
            continue
        if record["step"] > done or record["step"] == done and "eval" in record:
            break
        kept = end
    return kept


def _record(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that is damaged."""
    record = object_in(line)
    return record if record is not None and isinstance(record.get("step"), int) else None


def _finite(value):
    """`value` with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Clock:
    """Seconds by phase."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


@contextmanager
def progress(name: str, total: int, ranks: Ranks):
    """A progress bar that is gone when its work is done; yields what to call per episode finished on this rank.

    The main rank shows its own share of `total`.
    """
    total, hidden = math.ceil(total / ranks.size), None if ranks.main else True
    with tqdm(total=total, desc=name, unit="rollout", leave=False, position=1, disable=hidden) as bar:
        yield lambda episode: bar.update()


def main(argv: Sequence[str]) -> None:
    launch(argv, Config, "train.py", train)


if __name__ == "__main__":
    main(sys.argv[1:])
