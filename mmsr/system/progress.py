"""How far a long piece of work is: a bar on a terminal, and in a file a line a minute.

A bar redraws itself with carriage returns, which make a file unreadable. So a program draws bars only where both its
outputs are a terminal (a pipe through `tee` would mix them). Anywhere else `progress` writes whole lines, none for
work that is done within a minute. No other module imports tqdm: what a program says goes through `say`, which keeps a
bar out of its way.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm

SILENCE = 60  # seconds between two lines about the same work


def on_terminal() -> bool:
    """Whether a person watches, and nothing else: both outputs are a terminal."""
    return sys.stdout.isatty() and sys.stderr.isatty()


def progress(name: str, total: int, unit: str, shown: bool = True) -> tqdm:
    """For a `with` statement, and `update(n)` in it. Nothing of it stays on a terminal.

    `unit`: what is counted, in the singular. Without `shown`, or with nothing to count, it says nothing.
    """
    hidden = not shown or not total
    width = shutil.get_terminal_size().columns - 3  # leaves room for the ^C of a terminal, which would break the line
    bar = tqdm if on_terminal() else MinuteLines
    return bar(desc=name, total=total, unit=unit, disable=hidden, leave=False, ncols=width)


class MinuteLines(tqdm):
    """A tqdm that writes a line a minute on standard error, and nothing before its first minute is over."""

    def __init__(self, *args: Any, clock: Callable[[], float] = time.time, **how: Any):
        # tqdm looks at its clock at every update, and draws nothing at the start.
        how |= dict(file=sys.stderr, mininterval=SILENCE, maxinterval=SILENCE, miniters=1, delay=SILENCE)
        super().__init__(*args, **how)
        self._time = clock
        self.start_t = self.last_print_t = self.said = clock()
        self.sp = None  # what draws the bar: without it, `close` leaves no carriage return

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the line, if the last one is a minute old: callers may refresh a bar at any time."""
        now = self._time()
        if now - self.said >= SILENCE:
            self.said = now
            self.fp.write(f"{self.line()}\n")
            self.fp.flush()

    def clear(self, nolock: bool = False) -> None:
        """There is no bar to clear."""

    def line(self) -> str:
        """As in "rollouts: 120 of 256 rollouts, 1.9 a second, 1:12 left"."""
        state = self.format_dict
        rate = state["rate"] or (self.n - self.initial) / max(state["elapsed"], 1e-9)
        done = _amount(self.n, self.unit, self.unit_scale)
        if self.total:
            done = f"{_number(self.n, self.unit_scale)} of {_amount(self.total, self.unit, self.unit_scale)}"
        parts = [f"{self.desc.removesuffix(': ')}: {done}", _speed(rate, self.unit, self.unit_scale)]
        if self.total and rate:
            parts.append(f"{duration(max(0, self.total - self.n) / rate)} left")
        if self.postfix:
            parts.append(self.postfix)
        return ", ".join(parts)


def _number(n: float, scaled: bool) -> str:
    return tqdm.format_sizeof(n) if scaled else f"{n:,}"


def _amount(n: float, unit: str, scaled: bool) -> str:
    if scaled:  # bytes
        return f"{_number(n, scaled)}{unit}"
    return f"{_number(n, scaled)} {unit}" if n == 1 else f"{_number(n, scaled)} {unit}s"


def _speed(rate: float, unit: str, scaled: bool) -> str:
    if scaled:
        return f"{_amount(rate, unit, scaled)} a second"
    return f"{rate:.1f} a second" if rate >= 1 else f"{60 * rate:.1f} a minute"


def duration(seconds: float) -> str:
    """As in 0:07, 12:34 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02}"
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line that stays: above a bar if there is one, and at once even where the output is a file."""
    file = file or sys.stdout
    tqdm.write(text, file=file)
    file.flush()
