"""What a training run says while it runs: a line that stays for each step and each evaluation, in columns.

    step 12/80  reward 0.634  acc 0.642  image 0.51  text 0.21  2.1 s   2:46 left
    eval 80/80  reward 0.861  acc 0.890  image 0.45  text 0.22  3.3 s  T = 1

The numbers are those of metrics.jsonl. The time left counts what is between the steps too: saves and reports.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mmsr import evaluate
from mmsr.assemble import Setup
from mmsr.config import Config
from mmsr.report.html import MODES, mode_name
from mmsr.system.progress import duration

RECENT = 10  # steps whose pace is that of the steps to come


class Console:
    """Makes the lines; others print them."""

    def __init__(self, setup: Setup[Config], clock: Callable[[], float] = time.monotonic):
        self.config = setup.config
        self.tools = [tool.name.removesuffix("_search") for tool in setup.toolbox.tools.values() if tool.limit]
        self.mix = evaluation_mix(setup)
        self.clock = clock
        self.since = clock()  # when the last step, or this program, was ready
        self.paces: deque[float] = deque(maxlen=RECENT)  # seconds of the last steps, without evaluations
        self.evaluating = 0.0  # seconds since then in evaluations
        self.evaluated: dict[str, float] = {}  # the seconds of each kind of evaluation, last time

    def heading(self, done: int) -> str:
        """Two lines before the others: what is to come, and what it says. `done`: finished steps of a resumed run."""
        self.since = self.clock()
        config = self.config
        size = f"{config.questions} questions × {config.group_size} rollouts"
        columns = "acc: accuracy"
        if self.tools:
            columns += f"; {', '.join(self.tools)}: share of rollouts with such a call"
        return f"{config.out}: steps {done + 1} to {config.steps}, each {size}\n{columns}"

    def step(self, metrics: Mapping[str, Any]) -> str:
        now = self.clock()
        self.paces.append(now - self.since - self.evaluating)
        self.since = now
        self.evaluating = 0.0
        step = metrics["step"]
        seconds = sum(metrics["seconds"].values())
        return self._line("step", step, metrics, seconds, f"{duration(self._left(step)):>5} left")

    def evaluation(self, step: int, mode: str, by_category: Mapping[str, evaluate.Numbers], seconds: float) -> str:
        """`mode` and `by_category` as metrics.jsonl has them."""
        self.evaluating += seconds
        self.evaluated[mode] = seconds
        keys = ["reward", "accuracy", *(f"search_ratio_{tool}" for tool in self.tools)]
        means = evaluate.overall(by_category, self.mix, keys)
        return self._line("eval", step, means, seconds, mode_name(mode))

    def _line(self, what: str, step: int, numbers: Mapping[str, Any], seconds: float, last: str) -> str:
        count = f"{step}/{self.config.steps}".rjust(2 * len(str(self.config.steps)) + 1)
        cells = [f"{what} {count}", f"reward {numbers['reward']:.3f}", f"acc {numbers['accuracy']:.3f}"]
        for tool in self.tools:
            cells.append(f"{tool} {numbers.get(f'search_ratio_{tool}', 0):.2f}")
        took = f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
        return "  ".join([*cells, took.rjust(5), last])

    def _left(self, step: int) -> float:
        """Seconds, by the pace of the last steps and of each evaluation's last time."""
        config = self.config
        evaluations = 1  # after the last step
        if config.eval_every:
            evaluations += (config.steps - 1) // config.eval_every - (step - 1) // config.eval_every
        once = sum(self.evaluated.get(mode, 0.0) for mode in MODES)
        pace = sum(self.paces) / len(self.paces)
        return (config.steps - step) * pace + evaluations * once


def evaluation_mix(setup: Setup[Config]) -> evaluate.Numbers | None:
    """How the categories of an evaluation are weighted: as in training, where the toy world says how."""
    if setup.config.data == "toy" and not setup.config.eval_data:
        return setup.world.settings.mix
    return None
