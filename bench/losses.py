"""The losses and dynamic sampling in the full toy world: `python bench/losses.py --jobs 2 --figure docs/losses.svg`.

Every variation starts from the same base model and makes four updates a step, as the paper does (512 questions, 128 an
update): with a single one π_old is π, and nearly all losses have the same gradient. Runs are made like those of
`claims.py` (toy_runs.py). The table goes to standard output and DIR/losses.md, the training curves to --figure.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any, Mapping, Sequence

import numpy as np
from claims import across
from common import table
from toy_runs import Outcome, Variant, fate, main, mean, parser, publish

from mmsr.config import LOSSES

UPDATES = 4  # a step
RESAMPLE = 3  # draws of other questions at most


def variant(loss: str = "grpo", **options: Any) -> Variant:
    return Variant(options={"mini_batch": 32 // UPDATES, "loss": loss, **LOSSES[loss], **options})


DAPO = dict(loss_norm="token", clip_high=0.28, kl=0.0, mask_truncated=True, resample=RESAMPLE)
VARIANTS = {
    "grpo": ("GRPO", variant()),
    "batch": ("GRPO, --advantage batch", variant(advantage="batch")),
    "none-std": ("GRPO, --advantage none-std", variant(advantage="none-std")),
    "dr_grpo": ("Dr. GRPO", variant("dr_grpo")),
    "gspo": ("GSPO", variant("gspo")),
    "gspo-wide": ("GSPO, clipped at .2", variant("gspo", clip_low=0.2, clip_high=0.2)),
    "cispo": ("CISPO", variant("cispo")),
    "resample": ("GRPO, dynamic sampling", variant(resample=RESAMPLE)),
    "dapo": ("DAPO", variant(**DAPO)),
}


def steps(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl about training steps."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def smooth(values: Sequence[float], width: int = 5) -> np.ndarray:
    """(steps,): the mean of each step and of the few before it."""
    return np.array([np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))])


def steps_to_most(rewards: Sequence[float], share: float = 0.9) -> int:
    """The first step, from 1, whose smoothed reward has gained this share of what the run gains; 0: it gains none."""
    curve = smooth(rewards)
    begin, end = curve[0], curve[-1]
    if end <= begin:
        return 0
    return int(np.argmax(curve >= begin + share * (end - begin))) + 1


def zero_std(run: Sequence[Mapping[str, Any]], questions: int = 32) -> tuple[float, float]:
    """Shares of the batch's groups whose rewards are all equal: before dynamic sampling, and after it."""
    after = [line["zero_std_groups"] for line in run]
    before = [line["resampled"]["zero_std_first"] if "resampled" in line else line["zero_std_groups"] for line in run]
    return statistics.mean(before) / questions, statistics.mean(after) / questions


def seconds(run: Sequence[Mapping[str, Any]]) -> float:
    return statistics.median([sum(line["seconds"].values()) for line in run])


def row(name: str, runs: Mapping[int, Outcome], out: Path, seeds: Sequence[int]) -> list[str]:
    """The sampled evaluation after training, then numbers of the training steps; ± standard deviation over seeds."""
    if not runs:
        return [VARIANTS[name][0], *[""] * 8, fate(name, out, seeds)]
    after = [run["after"]["eval_sampled"] for run in runs.values()]
    cells = [across([mean(evaluation, key) for evaluation in after]) for key in ("reward", "accuracy", "calls")]
    trained = [steps(out / f"{name}-{seed}") for seed in runs]
    reached = [steps_to_most([line["reward"] for line in run]) for run in trained]
    lengths = [statistics.mean(line["response_tokens"] for line in run[-10:]) for run in trained]
    clipped = [statistics.mean(line["clip_fraction"] or 0 for line in run) for run in trained]
    equal = np.mean([zero_std(run) for run in trained], 0)
    cells += [" · ".join(str(step or "–") for step in reached), f"{np.mean(lengths):.1f}", f"{np.mean(clipped):.3f}"]
    cells += [f"{equal[0]:.2f} → {equal[1]:.2f}", " · ".join(f"{seconds(run):.1f}" for run in trained)]
    return [VARIANTS[name][0], *cells, " ".join(map(str, runs))]


def draw(names: Sequence[str], options: Any) -> None:
    """Training curves of every variation, means over its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = {"reward": "Reward", "search_ratio": "Share that searched", "zero_std_groups": "Groups of equal rewards"}
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for name in names:
        folders = [options.out / f"{name}-{seed}" for seed in options.seeds]
        runs = [steps(folder) for folder in folders if (folder / "outcome.json").exists()]
        for axis, key in zip(axes, kinds):
            if runs:
                curves = [smooth([line[key] for line in run]) for run in runs]
                axis.plot(np.mean(curves, 0), label=VARIANTS[name][0], linewidth=1)
    for axis, title in zip(axes, kinds.values()):
        axis.set(title=title, xlabel="step")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(options.figure)


def losses() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = options.parse_args()
    outcomes = main({name: VARIANTS[name][1] for name in (VARIANTS if options.child else options.only)}, options)
    rows = [row(name, outcomes[name], options.out, options.seeds) for name in options.only]
    header = ["", "reward", "accuracy", "searches", "steps to 90 %", "tokens", "clipped", "equal groups", "s a step"]
    text = table([*header, "seeds"], rows)
    publish(text, options.out, "losses.md")
    if options.figure:
        draw(options.only, options)


if __name__ == "__main__":
    losses()
