"""A bar on a terminal, a line a minute in a file, and nothing of a bar where it does not belong."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from mmsr.system import progress as module
from mmsr.system.progress import MinuteLines, duration, progress, say

ROOT = Path(__file__).parents[2]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_redirected_run_is_silent_or_has_carriage_returns(monkeypatch):
    """A line a minute with count, rate and time left, whatever refreshes the bar; and what is said comes through."""
    clock, err = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    with MinuteLines(desc="rollouts", total=256, unit="rollout", clock=clock) as bar:
        for _ in range(180):  # 3 minutes, a rollout a second
            clock.now += 1
            bar.update()
            bar.set_postfix(loss=0.5)
        say("a thumbnail is missing", err)
    assert err.getvalue().splitlines() == [
        "rollouts: 60 of 256 rollouts, 1.0 a second, 3:16 left, loss=0.5",
        "rollouts: 120 of 256 rollouts, 1.0 a second, 2:16 left, loss=0.5",
        "rollouts: 180 of 256 rollouts, 1.0 a second, 1:16 left, loss=0.5",
        "a thumbnail is missing",
    ]
    assert "\r" not in err.getvalue()


def test_a_download_in_a_log_has_the_bars_of_the_hub(monkeypatch):
    """huggingface_hub makes its bars with a total of 0, raises it, and refreshes them as it likes."""
    clock, err = Clock(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    bar = MinuteLines(desc="Downloading", total=0, initial=0, unit="B", unit_scale=True, clock=clock, bar_format="{n}")
    bar.total += 16_000_000_000
    bar.refresh()
    clock.now += 100
    bar.update(4_000_000_000)
    bar.set_description_str("Download complete")
    bar.close()
    assert err.getvalue() == "Downloading: 4.00G of 16.0GB, 40.0MB a second, 5:00 left\n"


def test_short_work_says_anything(capsys):
    with progress("update", 3, "step") as bar, progress("nothing", 0, "step"):
        bar.update(3)
    with progress("of another rank", 9, "step", shown=False) as bar:
        bar.update(3)
    assert capsys.readouterr() == ("", "")


def test_a_time_is_told_in_another_way():
    assert [duration(seconds) for seconds in (0, 7.4, 59.7, 754, 3723)] == ["0:00", "0:07", "1:00", "12:34", "1:02:03"]


DRAWS = """
import time
from mmsr.system.progress import progress, say
with progress("rollouts", 3, "rollout") as bar:
    bar.update(2)
    say("step 1 is done")
    time.sleep(0.2)
    bar.update()
with progress("nothing", 0, "question") as bar:
    bar.update(0)
say("all is done")
"""


def test_a_bar_on_a_terminal_runs_into_a_line_or_leaves_remains():
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "-c", DRAWS]
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen = b""
        while True:
            try:
                part = os.read(ours, 4096)
            except OSError:  # how Linux tells the end of a terminal
                break
            if not part:
                break
            seen += part
        assert process.wait(30) == 0
    os.close(ours)
    assert b"rollouts:" in seen and b"2/3" in seen and b"question" not in seen
    shown = [re.split(rb"\r", line.rstrip(b"\r"))[-1].strip() for line in seen.split(b"\n")]
    assert [line for line in shown if line] == [b"step 1 is done", b"all is done"]


def test_another_module_draws_bars_of_its_own():
    files = [*ROOT.glob("*.py"), *(ROOT / "mmsr").rglob("*.py")]
    users = {file for file in files if re.search(r"^\s*(from|import) tqdm", file.read_text("utf-8"), re.MULTILINE)}
    assert users == {Path(module.__file__)}
