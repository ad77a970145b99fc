"""Ctrl-C and SIGTERM as requests, so that a run ends where nothing is half done.

Work that may be dropped at any moment (rollouts, evaluation) is broken off at once. Work that may not (an update, its
files, a checkpoint) is finished first.
"""

from __future__ import annotations

import os
import signal
from typing import Any, Callable, TypeVar

T = TypeVar("T")


class BrokenOff(BaseException):
    """Raised by a signal. It is no Exception, so that no `except Exception` on its way out mistakes it for an error.

    Code that has to catch every BaseException (`tools`) lets this one through.
    """


class Interrupts:
    """Within `with Interrupts() as stop`, a signal sets `stop.requested`. A second Ctrl-C kills the process at once.

    For the main thread, the only one in which Python handles signals.
    """

    def __init__(self, says: bool = True):
        """`says`: whether this process is the one that answers a signal with a line."""
        self.says = says
        self.signal = 0  # the number of the first one; 0 before
        self._may_break = False
        self._before: dict[int, Any] = {}  # the handlers to put back

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self.signal != 0

    @property
    def status(self) -> int:
        """Exit status as shells have it: 130 after Ctrl-C, 143 after SIGTERM, 0 without either."""
        return 128 + self.signal if self.signal else 0

    def breakable(self, work: Callable[..., T], *args: Any) -> T | None:
        """work(*args), which a signal breaks off. None then, and if a signal came before.

        `work` must leave nothing half done outside of it.
        """
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
        """Handles a signal."""
        if not self.signal:
            self.signal = number
            if self.says:
                name = signal.Signals(number).name
                message = f"{clear_line()}{name}: stopping after what cannot be dropped; Ctrl-C stops at once\n"
                os.write(2, message.encode())  # the signal may have come in the middle of a print
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._may_break:
            self._may_break = False
            raise BrokenOff


def clear_line() -> str:
    """What clears the line on a terminal, of a bar and the terminal's ^C, before a message on standard error."""
    return "\r\x1b[K" if os.isatty(2) else ""
