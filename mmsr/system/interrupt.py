"""Ctrl-C and SIGTERM as requests, so that a run ends where nothing is half done.

What may be dropped at any moment (rollouts, evaluation) is broken off at once; what may not (an update, its files, a
checkpoint) is finished first.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Callable, TypeVar

T = TypeVar("T")


class BrokenOff(BaseException):
    """No Exception, so that no `except Exception` on the way out takes it for an error of its own.

    Who has to catch every BaseException (`tools`) lets this one through.
    """


class Interrupts:
    """Within `with Interrupts() as stop`, a signal sets `stop.requested`. A second Ctrl-C kills the process at once.

    For the main thread, the only one that Python hands signals to.
    """

    def __init__(self):
        self.signal = 0
        self._may_break = False

    def __enter__(self) -> Interrupts:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        return self.signal != 0

    @property
    def status(self) -> int:
        """Exit status as shells have it: 130 after Ctrl-C, 143 after SIGTERM, 0 without either."""
        return 128 + self.signal if self.signal else 0

    def breakable(self, work: Callable[..., T], *args: Any) -> T | None:
        """work(*args), broken off by a signal: then, and where one came before, None. It must leave nothing behind."""
        if self.requested:
            return None
        try:
            try:
                self._may_break = True
                return work(*args)
            finally:
                self._may_break = False
        except BrokenOff:  # raised in `work`, or in the line before this one
            return None

    def _note(self, number: int, frame: Any) -> None:
        if not self.signal:
            self.signal = number
            message = f"\n{signal.Signals(number).name}: stopping after what cannot be dropped; Ctrl-C stops at once\n"
            os.write(2, message.encode())  # print may be what the signal came into the middle of
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._may_break:
            self._may_break = False
            raise BrokenOff
