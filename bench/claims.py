"""Tests of the paper's claims in the toy world: `python bench/claims.py --only c d --seeds 0 1 2 --jobs 2`.

    a  search follows familiarity, on concepts that no training question is about, as a curve over exposure
    b  GRPO with N questions beats SFT on demonstrations of a foreign teacher with 2 N
    c  where retrieval errs, searching on demand is at least as accurate as always searching, with 30 % fewer searches
    d  without the search penalty the model always searches
    d2 the same, where memory is worse than the search engine
    e  without search-free questions in training the model always searches
    f  the trained model uses forced search results better than the base model
    g  the blog's reward and the paper's lead to the same behaviour
    h  image and text search are more accurate than image search alone

A claim is a function of one seed's outcomes: what was measured, and whether that meets the criterion. A claim holds if
it does on every seed. The table goes to standard output and DIR/claims.md, the shares of turn shapes by step to
DIR/shapes.tsv, and both curves to --figure. It takes hours on two cores; it may be interrupted and started again
(toy_runs.py), and `--table` summarises the finished runs. Evaluations are greedy, as in the paper, except a, d, d2, e.
"""

from __future__ import annotations

import hashlib
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, Mapping, Sequence

import numpy as np
from common import table
from toy_runs import SHAPES, Outcome, Variant, main, mean, parser

import train
from mmsr.episode import Example
from mmsr.rollout import Script
from mmsr.toy.base import WarmStart, copied, recalled
from mmsr.toy.world import FULL, LOOK_IT_UP, NAME, QUESTIONS, Category, Settings, World, graded, look_up

# ---- variations

EXPOSURES = (1000, 600, 400, 260, 180, 120, 60, 20, 0)
NAIVE = replace(FULL, reader=(0.4, 0.3, 0.3))  # believes the second or third result nearly as often as the first
SEARCH_FREE = ("familiar", "familiar_fact")
NEEDS_TEXT = ("known_new_fact", "unfamiliar_fact", "unknown_two_hop")


def asking(change: Callable[[Category], int]) -> Settings:
    """FULL with other numbers of training questions."""
    categories = tuple(replace(category, train=change(category)) for category in FULL.categories)
    return replace(FULL, categories=categories)


def more_known(times: int) -> Settings:
    """FULL with `times` as many known concepts in a warm start as long, so that each is shown more seldom."""
    pools = []
    for pool in FULL.pools:
        if pool.facts:
            pool = replace(pool, size=pool.size * times, exposure=round(pool.exposure / times))
        pools.append(pool)
    return replace(FULL, pools=tuple(pools))


def foreign_teacher() -> None:
    """Make SFT imitate a teacher with different knowledge, instead of the model's own rollouts.

    Its turns are forced and their tokens trained; as always in SFT, only in conversations that end in a right answer.
    """
    open_run = train.open_setup
    assign = train.assign_advantages

    def open_setup(config, ranks, world):
        setup = open_run(config, ranks, world)
        setup.scripts = lambda example, sample: Script(demonstration(world, example))
        return setup

    def assign_advantages(episodes, config, ranks):
        for episode in episodes:
            episode.imitate()
        return assign(episodes, config, ranks)

    train.open_setup = open_setup
    train.assign_advantages = assign_advantages


def demonstration(world: World, example: Example) -> list[str]:
    """The teacher's turns.

    It knows the names of half of all concepts, independently of the model, and the town for half of those. For the rest
    it searches, and believes the first result.
    """
    concept = world.web.pictures[hashlib.sha256(example.image).digest()]
    digest = hashlib.sha256(f"teacher {world.seed} {concept.name}".encode()).digest()
    knows_name = digest[0] < 128
    knows_town = digest[0] < 64
    question = QUESTIONS.index(example.question)
    turns = []
    name = concept.name
    if not knows_name:
        turns.append(LOOK_IT_UP)
        name = world.web.image_search(example.image).hits[0].title.split()[0]
    if question == NAME:
        return [*turns, recalled(concept, question) if knows_name else copied(name)]
    if knows_town:
        return [recalled(concept, question)]
    town = world.web.text_search(name).hits[0].title.split()[-1]
    return [*turns, look_up(name), copied(town)]


SFT = dict(algorithm="sft", group_size=1, steps=160, kl=0.0)  # twice the questions, each as often as in GRPO
VARIANTS = {
    "full": Variant(forced=True),
    "no-penalty": Variant(options=dict(penalty=0.0)),
    "unsure": Variant(more_known(2), base="unsure"),
    "unsure-no-penalty": Variant(more_known(2), dict(penalty=0.0), base="unsure"),
    "no-search-free": Variant(asking(lambda c: 0 if c.name in SEARCH_FREE else c.train)),
    "blog": Variant(options=dict(reward="blog")),
    "image-only": Variant(options=dict(max_texts=0)),
    "wrong-30": Variant(replace(FULL, wrong=0.3), forced=True),
    "sft-2n": Variant(asking(lambda c: 2 * c.train), SFT, foreign_teacher),
    "naive": Variant(NAIVE, base="naive", recipe=WarmStart(copying=0.5), forced=True),
    "graded": Variant(graded(FULL, EXPOSURES), dict(eval_size=100), base="graded"),
}

# ---- claims: (what was measured, whether the criterion is met) on one seed, from the outcomes by variant

Outcomes = Mapping[str, Outcome]
Finding = tuple[dict[str, float], bool]


def a(of: Outcomes) -> Finding:
    rates = [of["graded"]["after"]["eval_sampled"][f"exposure_{n}"]["search_ratio_image"] for n in EXPOSURES]
    order = rank_correlation(EXPOSURES, rates)
    found = {"rank correlation with exposure": order}
    found |= {f"searched after {n} exposures": rate for n, rate in zip(EXPOSURES, rates)}
    return found, order <= -0.8 and rates[-1] - rates[0] >= 0.8


def b(of: Outcomes) -> Finding:
    found = {
        f"{key}, {name}": mean(of[run]["after"]["eval"], key)
        for key in ("accuracy", "reward", "calls")
        for name, run in (("GRPO N", "full"), ("SFT 2N", "sft-2n"))
    }
    better = [found[f"{key}, GRPO N"] > found[f"{key}, SFT 2N"] for key in ("accuracy", "reward")]
    return found, all(better)


def c(of: Outcomes) -> Finding:
    found, holds = {}, True
    for share, run in ((7, "full"), (30, "wrong-30")):
        mine, forced = of[run]["after"]["eval"], of[run]["forced"]
        always = max(("always, before", "always, after"), key=lambda name: mean(forced[name], "accuracy"))
        accuracy, fewer = mean(mine, "accuracy"), 1 - mean(mine, "calls") / mean(forced[always], "calls")
        baseline, never = mean(forced[always], "accuracy"), mean(forced["never, before"], "accuracy")
        values = {"accuracy on demand": accuracy, "always": baseline, "never": never, "fewer searches": fewer}
        found |= {f"{name} ({share} % wrong)": value for name, value in values.items()}
        holds &= accuracy >= baseline and fewer >= 0.3 and accuracy > never
    return found, holds


def searches_always(of: Outcomes, run: str, usual: str = "full") -> Finding:
    ratio = {name: mean(of[name]["after"]["eval_sampled"], "search_ratio") for name in (run, usual)}
    known = mean(of[run]["after"]["eval_sampled"], "search_ratio", SEARCH_FREE)
    found = {"search ratio": ratio[run], "of what is known": known, "search ratio of the usual run": ratio[usual]}
    return found, ratio[run] >= 0.95 and ratio[usual] < 0.8


d = partial(searches_always, run="no-penalty")
e = partial(searches_always, run="no-search-free")


def d2(of: Outcomes) -> Finding:
    """It tests nothing where memory is not right in about .75, which was decided before any run.

    On seed 9, which is not among those that are tested, memory is right in .78; with three times as many known concepts
    instead of twice as many it was right in .53.
    """
    memory = mean(of["unsure"]["before"]["never_search"], "accuracy", SEARCH_FREE)
    found, holds = searches_always(of, "unsure-no-penalty", "unsure")
    return {"memory right, before": memory, **found}, holds and 0.65 <= memory <= 0.85


def f(of: Outcomes) -> Finding:
    forced, sampled = of["naive"]["forced"], of["naive"]["before"]["always_search"]
    found = {
        "accuracy when forced, before": mean(forced["always, before"], "accuracy"),
        "after": mean(forced["always, after"], "accuracy"),
        "T = 1, before": mean(sampled, "accuracy"),
        "T = 1, after": mean(forced["always, after, T = 1"], "accuracy"),
    }
    better = found["after"] > found["accuracy when forced, before"]
    return found, better and found["T = 1, after"] > found["T = 1, before"]


def g(of: Outcomes) -> Finding:
    found = {
        f"{key}, {run}": mean(of[variant]["after"]["eval"], key)
        for key in ("accuracy", "calls")
        for run, variant in (("paper", "full"), ("blog", "blog"))
    }
    near = abs(found["accuracy, paper"] - found["accuracy, blog"]) <= 0.03
    return found, near and abs(found["calls, paper"] - found["calls, blog"]) <= 0.1


def h(of: Outcomes) -> Finding:
    both, one = of["full"]["after"]["eval"], of["image-only"]["after"]["eval"]
    found = {"accuracy with both": mean(both, "accuracy"), "image alone": mean(one, "accuracy")}
    found |= {"where text is needed, both": mean(both, "accuracy", NEEDS_TEXT)}
    found |= {"where text is needed, image alone": mean(one, "accuracy", NEEDS_TEXT)}
    return found, found["accuracy with both"] > found["image alone"]


CLAIMS: dict[str, tuple[str, Callable[[Outcomes], Finding], tuple[str, ...]]] = {
    "a": ("search follows familiarity (rank correlation ≤ −.8, ends ≥ .8 apart; T = 1)", a, ("graded",)),
    "b": ("GRPO with N beats SFT from a foreign teacher with 2 N, in accuracy and reward", b, ("full", "sft-2n")),
    "c": ("on demand ≥ always (the better of both models), ≥ 30 % fewer searches, > never", c, ("full", "wrong-30")),
    "d": ("no penalty: search ratio ≥ .95 (T = 1), < .8 with it", d, ("no-penalty", "full")),
    "d2": ("d where memory is right in .65 to .85 before training", d2, ("unsure-no-penalty", "unsure")),
    "e": ("no search-free questions: search ratio ≥ .95 (T = 1), < .8 with them", e, ("no-search-free", "full")),
    "f": ("forced results are used better after training, greedy and at T = 1", f, ("naive",)),
    "g": ("blog and paper reward: accuracy within .03, calls within .1", g, ("full", "blog")),
    "h": ("image and text search beat image search alone", h, ("full", "image-only")),
}


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Spearman's, ties at the mean of their ranks; 0 where one side is constant."""
    x_ranks = _ranks(xs)
    y_ranks = _ranks(ys)
    if not np.ptp(x_ranks) or not np.ptp(y_ranks):
        return 0.0
    return float(np.corrcoef(x_ranks, y_ranks)[0, 1])


def _ranks(values: Sequence[float]) -> list[float]:
    return [(np.sum(np.less(values, x)) + np.sum(np.less_equal(values, x)) - 1) / 2 for x in values]


# ---- the table and the curves


def row(letter: str, outcomes: Mapping[str, Mapping[int, Outcome]], seeds: Sequence[int]) -> list[str]:
    """Claim, what was measured as mean ± standard deviation over the finished seeds, and the verdict."""
    text, claim, needs = CLAIMS[letter]
    finished = []
    findings = []
    for seed in seeds:
        if all(seed in outcomes[name] for name in needs):
            finished.append(seed)
            findings.append(claim({name: outcomes[name][seed] for name in needs}))
    if not findings:
        return [letter, text, "", "not yet run"]
    measured = []
    for key in findings[0][0]:
        values = [found[key] for found, _ in findings]
        measured.append(f"{key.strip()} {across(values)}")
    met = sum(holds for _, holds in findings)
    verdict = "holds" if met == len(findings) else f"does not hold (met on {met} of {len(findings)} seeds)"
    return [letter, text, "; ".join(measured), verdict + f", seeds {' '.join(map(str, finished))}"]


def across(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def shape_shares(runs: Mapping[int, Outcome]) -> list[list[float]]:
    """The mean of every shape's share over seeds; a row for each step."""
    rows = []
    for seeds in zip(*[outcome["shapes"] for outcome in runs.values()]):  # the shares of one step
        row = []
        for shape in (*SHAPES, "other"):
            row.append(statistics.mean([shares[shape] for shares in seeds]))
        rows.append(row)
    return rows


def draw(outcomes: Mapping[str, Mapping[int, Outcome]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, share in zip((*SHAPES, "other"), zip(*shape_shares(outcomes.get("full", {})))):
        left.plot(range(1, len(share) + 1), share, label=name)
    left.set(xlabel="step", ylabel="share of the rollouts", ylim=(0, 1), title="Turn shapes in training")
    left.legend(fontsize=8)
    for seed, outcome in outcomes.get("graded", {}).items():
        found = outcome["after"]["eval_sampled"]
        rates = [found[f"exposure_{n}"]["search_ratio_image"] for n in EXPOSURES]
        right.plot(EXPOSURES, rates, "o-", label=f"seed {seed}")
    right.set(xlabel="exposures in the warm start", ylabel="image searches a question", ylim=(-0.02, 1.02))
    right.set_xscale("symlog", linthresh=20)
    right.set_xticks(EXPOSURES, map(str, EXPOSURES), fontsize=7)
    right.set_xlim(left=-2)
    right.set_title("Searches, by how well a concept is known")
    right.legend(fontsize=8)
    figure.savefig(path)


def claims() -> None:
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=CLAIMS, default=list(CLAIMS), help="claims")
    options = options.parse_args()
    needed = {name for letter in options.only for name in CLAIMS[letter][2]}
    chosen = VARIANTS if options.child else {name: VARIANTS[name] for name in VARIANTS if name in needed}
    outcomes = main(chosen, options)
    shares = shape_shares(outcomes.get("full", {}))
    rows = [row(letter, outcomes, options.seeds) for letter in options.only]
    text = table(["", "claim and criterion", "measured, mean ± standard deviation", "verdict"], rows)
    (options.out / "claims.md").write_text(text + "\n", encoding="utf-8")
    lines = [["step", *SHAPES, "other"]]
    lines += [[str(step), *map("{:.4f}".format, share)] for step, share in enumerate(shares, 1)]
    text_of_shapes = "".join("\t".join(line) + "\n" for line in lines)
    (options.out / "shapes.tsv").write_text(text_of_shapes, encoding="utf-8")
    if options.figure:
        draw(outcomes, options.figure)
    print(f"\n{text}\n\n{options.out}: claims.md, shapes.tsv")


if __name__ == "__main__":
    claims()
