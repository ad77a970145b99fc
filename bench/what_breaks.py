"""The effect of wrong details, in the full toy world: `python bench/what_breaks.py --only raw no-ban`.

Most errors are made here, by patching the program, and are not options of it. Runs are made like those of `claims.py`
(toy_runs.py): with the same --out, the sound run is shared. The table goes to standard output and DIR/breaks.md, the
training curves to --figure; the row of a run that died has the last line of its log.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Mapping, Sequence

import numpy as np
import torch
from claims import SEARCH_FREE, across
from claims import VARIANTS as SOUND
from common import table
from toy_runs import Outcome, Variant, fate, main, mean, parser, publish

from mmsr import pack
from mmsr.chat import Chat
from mmsr.system.files import cache_folder
from mmsr.toy import base
from mmsr.toy.world import FULL
from mmsr.update import Trainer

UNKNOWN = ("unfamiliar", "unfamiliar_fact", "held_out", "unknown_two_hop")


def train_tool_tokens() -> None:
    """The results of searches are trained as if the model had written them."""
    plain = Trainer.step

    def train_turn(self, episode, turn):
        for t in range(turn.start, turn.end):  # except control tokens, which have no probability
            episode.loss_mask[t] = int(not self.suppressed[episode.input_ids[t]])

    def step(self, mini_batches, lr):
        for batch in mini_batches:
            for episode in batch:
                for turn in episode.turns:
                    if turn.role == "tool":
                        train_turn(self, episode, turn)
        return plain(self, mini_batches, lr)

    Trainer.step = step


def mean_per_micro_batch() -> None:
    """Every micro-batch has the same weight, whether it has few tokens or many."""
    plain_micro_batches = Trainer._micro_batches
    plain_forward_backward = Trainer.forward_backward

    def _micro_batches(self, episodes):
        found = plain_micro_batches(self, episodes)
        self.count = len(found)
        return found

    def forward_backward(self, micro_batch, features, ref_features, weights, *rest):
        even = torch.full_like(weights, 1 / (self.count * len(micro_batch.pack.targets)))
        return plain_forward_backward(self, micro_batch, features, ref_features, even, *rest)

    Trainer._micro_batches = _micro_batches
    Trainer.forward_backward = forward_backward


def linear_positions() -> None:
    """The update gives tool images the positions of text; the sampler gives them the right positions."""
    plain = pack.mrope_positions
    pack.mrope_positions = lambda length, images: plain(length, images[:1])


def ban_nothing() -> None:
    """The model may say <|image_pad|> and the other control tokens."""
    plain = Chat.suppressed_tokens
    Chat.suppressed_tokens = lambda self, vocab_size: torch.zeros_like(plain(self, vocab_size))


def opaque_reasons() -> None:
    """An answer from memory does not start with the recalled facts. These base models have their own cache folder."""
    os.environ["MMSR_CACHE"] = str(cache_folder() / "opaque")
    base.recalled = lambda concept, question: (
        f"<reason> this is it . </reason> <answer> {concept.answer(question)} </answer>"
    )


TOKEN = dict(loss_norm="token", micro_tokens=2048)
PICTURES = dict(settings=replace(FULL, thumbnails=True), options=dict(max_tokens=256), base="thumbnails")
BROKEN = {
    "full": ("nothing (ε = .05)", SOUND["full"]),
    "eps-1e-6": ("ε of the group = 1e-6, the official code's", Variant(options=dict(group_eps=1e-6))),
    "raw": ("advantage without the deviation", Variant(options=dict(advantage="none-std"))),
    "no-penalty": ("no search penalty", SOUND["no-penalty"]),
    "tool-tokens": ("tool tokens trained", Variant(patch=train_tool_tokens)),
    "no-ban": ("no ban on control tokens", Variant(patch=ban_nothing)),
    "token": ("nothing, token mean over the update", Variant(options=TOKEN)),
    "micro-mean": ("token mean per micro-batch", Variant(options=TOKEN, patch=mean_per_micro_batch)),
    "opaque": ("opaque reasons in the warm start", Variant(patch_base=opaque_reasons, base="opaque")),
    "thumbnails": ("nothing, thumbnails in the results", Variant(**PICTURES)),
    "linear": ("thumbnails at text positions in the update", Variant(**PICTURES, patch=linear_positions)),
}


def row(name: str, runs: Mapping[int, Outcome], out: Path, seeds: Sequence[int]) -> list[str]:
    """The error, and the sampled evaluation after training: mean ± standard deviation over the finished seeds."""
    if not runs:
        return [BROKEN[name][0], *[""] * 5, fate(name, out, seeds)]
    found = [run["after"]["eval_sampled"] for run in runs.values()]
    cells = []
    for key in ("reward", "accuracy"):
        cells.append(across([mean(evaluation, key) for evaluation in found]))
    for categories in (SEARCH_FREE, UNKNOWN):
        cells.append(across([mean(evaluation, "search_ratio", categories) for evaluation in found]))
    gap = max(run["last"]["logp_gap_max"] or 0 for run in runs.values())
    return [BROKEN[name][0], *cells, f"{gap:.1e}", f"seeds {' '.join(map(str, runs))}"]


def draw(names: Sequence[str], options) -> None:
    """Training curves of every variation, means over its seeds and ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 5), layout="constrained")
    for name in names:
        files = [options.out / f"{name}-{seed}" / "metrics.jsonl" for seed in options.seeds]
        runs = [curve for curve in map(steps, files) if curve is not None]
        if runs:
            shortest = min(map(len, runs))
            whole = np.mean([run[:shortest] for run in runs], 0)
            smooth = [whole[max(0, i - 9) : i + 1].mean(0) for i in range(shortest)]
            for axis, values in zip(axes, zip(*smooth)):
                sound = BROKEN[name][0].startswith("nothing")
                axis.plot(range(1, shortest + 1), values, "-" if sound else "--", label=BROKEN[name][0])
    axes[0].set(title="Accuracy of the rollouts", xlabel="step")
    axes[1].set(title="Share that searched", xlabel="step")
    axes[2].set(title="Largest gap of sampler and trainer", xlabel="step", yscale="log")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(options.figure)


def steps(file: Path) -> np.ndarray | None:
    """(steps, 3): accuracy, search ratio and largest gap of a run's training steps; None if it has no steps."""
    if not file.exists():
        return None
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    found = [[x["accuracy"], x["search_ratio"], max(x["logp_gap_max"] or 0, 1e-8)] for x in lines if "loss" in x]
    return np.array(found) if found else None


def breaks() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=BROKEN, default=list(BROKEN))
    options = options.parse_args()
    outcomes = main({name: BROKEN[name][1] for name in (BROKEN if options.child else options.only)}, options)
    rows = [row(name, outcomes[name], options.out, options.seeds) for name in options.only]
    header = ["what is wrong", "reward", "accuracy", "searched: known", "unknown", "largest gap, last step", ""]
    text = table(header, rows)
    publish(text, options.out, "breaks.md")
    if options.figure:
        draw(options.only, options)


if __name__ == "__main__":
    breaks()
