"""Ctrl-C and SIGTERM end a run between steps; nothing that they break off leaves a trace."""

import os
import signal
import subprocess
import sys

import pytest

from mmsr.system.interrupt import Interrupts


def test_signal_breaks_off_what_may_be_dropped_and_lets_the_rest_finish():
    reached = []
    with Interrupts() as stop:
        signal.raise_signal(signal.SIGTERM)
        reached.append("an update goes on")
        assert stop.requested and stop.status == 143
        assert stop.breakable(reached.append, "never begun") is None
    with Interrupts() as stop:
        assert stop.breakable(lambda: 7) == 7 and not stop.requested
        assert stop.breakable(lambda: (signal.raise_signal(signal.SIGINT), reached.append("never reached"))) is None
        assert stop.requested and stop.status == 130
    assert reached == ["an update goes on"]


def test_every_process_answers_one_ctrl_c(capfd):
    for says, lines in ((True, 1), (False, 0)):
        with Interrupts(says) as stop:
            signal.raise_signal(signal.SIGINT)
        assert stop.status == 130 and capfd.readouterr().err.count("SIGINT: stopping") == lines


def test_signal_is_not_swallowed_by_a_tool_that_catches_every_exception():
    def tool():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            return "an observation"

    with Interrupts() as stop:
        assert stop.breakable(tool) is None


def test_handlers_are_the_old_ones_afterwards():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Interrupts():
        signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_second_ctrl_c_stops_at_once(first):
    script = f"""
import os, signal
from mmsr.system.interrupt import Interrupts
with Interrupts() as stop:
    os.kill(os.getpid(), {int(first)})
    print("saving", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("saved", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd())
    assert done.stdout == "saving\n" and done.returncode == -signal.SIGINT
    assert "Ctrl-C stops at once" in done.stderr
