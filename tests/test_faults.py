"""Ranks that are killed, hang, or have a failing tool, under torchrun as a user starts it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_parallel import ROOT, read

from mmsr.system.files import Lock

pytestmark = pytest.mark.slow
RUN = (
    "--data toy --toy basic --steps 4 --save-every 1 --eval-size 2 --questions 6 --mini-batch 3 --group-size 4".split()
)


class Torchrun:
    """`torchrun --nproc-per-node 2 SCRIPT …`, what it says going to files: nobody reads its pipes while it hangs."""

    def __init__(self, place: Path, model: Path, out: Path, *options: str, launch=(), script="train.py"):
        place.mkdir(exist_ok=True)
        self.said = place / "said.txt"
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *launch, script]
        line += [*RUN, "--model", model, "--out", out, *options]
        places = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
        with open(self.said, "wb") as file:
            self.process = subprocess.Popen(
                [str(part) for part in line], env={**os.environ, **places}, cwd=ROOT, stdout=file, stderr=file
            )

    def children(self) -> list[int]:
        me = self.process.pid
        return [int(pid) for pid in Path(f"/proc/{me}/task/{me}/children").read_text().split()]

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        for pid in self.children():
            if f"RANK={number}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return pid
        raise AssertionError(f"torchrun has no rank {number}: {self.said.read_text()}")

    def after(self, file: Path) -> None:
        """Wait for a file of the run."""
        deadline = time.monotonic() + 120
        while not file.exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.02)

    def ended(self, within: float) -> int:
        try:
            return self.process.wait(within)
        except subprocess.TimeoutExpired:
            pytest.fail(f"not ended within {within} s: {self.said.read_text()}")
        finally:
            if self.process.poll() is None:
                for child in self.children():
                    os.kill(child, signal.SIGKILL)
                self.process.kill()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    place = tmp_path_factory.mktemp("whole")
    run = Torchrun(place, folder, place / "out")
    assert run.ended(200) == 0, run.said.read_text()
    return place / "out"


def same(out: Path, whole: Path) -> bool:
    """Whether two runs left equal bits."""
    files = [each / "model" / "model.safetensors" for each in (out, whole)]
    return files[0].read_bytes() == files[1].read_bytes() and read(out) == read(whole)


def test_job_outlives_a_killed_rank_or_resumes_to_other_weights(folder, tmp_path, whole):
    out, rank = tmp_path / "out", 0  # the main one; the next test kills the other
    run = Torchrun(tmp_path, folder, out)
    run.after(out / "checkpoints" / "step-000002")
    begun = time.monotonic()
    os.kill(run.rank(rank), signal.SIGKILL)
    assert run.ended(15) != 0
    print(f"ended {time.monotonic() - begun:.1f} s after rank {rank} was killed")
    said = run.said.read_text()
    assert f"rank      : {rank} (local_rank: {rank})" in said and "Signal 9" in said, said
    again = Torchrun(tmp_path, folder, out, "--resume")
    assert again.ended(200) == 0, again.said.read_text()
    assert "Resumed after step" in again.said.read_text() and same(out, whole)


def test_torchrun_does_not_restart_from_the_checkpoint(folder, tmp_path, whole):
    """The launch line of docs/renting.md: nobody is there when a rank dies."""
    out = tmp_path / "out"
    run = Torchrun(tmp_path, folder, out, "--resume", launch=["--max-restarts", "1"])
    run.after(out / "checkpoints" / "step-000002")
    os.kill(run.rank(1), signal.SIGKILL)
    assert run.ended(200) == 0, run.said.read_text()
    assert "Resumed after step" in run.said.read_text() and same(out, whole)


def test_stopped_rank_holds_the_job_for_ever(folder, tmp_path):
    out, timeout, rank = tmp_path / "out", 8, 0  # which holds the store, too
    run = Torchrun(tmp_path, folder, out, "--timeout", str(timeout))
    run.after(out / "checkpoints" / "step-000002")
    stopped = run.rank(rank)
    begun = time.monotonic()
    os.kill(stopped, signal.SIGSTOP)
    assert run.ended(timeout + 10) != 0
    print(f"ended {time.monotonic() - begun:.1f} s after rank {rank} was stopped, time-out {timeout} s")
    assert f"rank {1 - rank} of 2 lost another rank, or waited for it too long" in run.said.read_text()
    assert not Path(f"/proc/{stopped}").exists(), "a process is left behind"


def test_second_job_in_a_folder_writes_beside_the_first_or_hangs(folder, tmp_path, whole):
    """A job that is queued again while the old one still saves: the main rank alone holds the folder, all are told."""
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    lock = Lock(out)
    second = Torchrun(tmp_path, folder, out, "--resume")
    assert second.ended(100) != 0
    said = second.said.read_text()
    assert said.count("another run is at work in it (process ") == 1 and "Traceback" not in said.split("torch")[0], said
    lock.release()
    assert same(out, whole)


BROKEN_TOOL = """
import os, sys, train
from mmsr.toy import world as toy

def broken(self, *given):
    if os.environ["RANK"] == "1":
        raise SystemExit("the search engine is on fire")
    return whole(self, *given)

whole, toy.Web.image_search = toy.Web.image_search, broken
train.main(sys.argv[1:])
"""


def test_a_tool_that_exits_on_one_rank_parts_the_ranks(folder, tmp_path, then="drop"):
    (tmp_path / "broken.py").write_text(BROKEN_TOOL)
    run = Torchrun(tmp_path, folder, tmp_path / "out", "--on-tool-error", then, script=tmp_path / "broken.py")
    assert run.ended(200) == 0, run.said.read_text()
    metrics, rollouts = read(tmp_path / "out")
    steps = [line for line in metrics if "reward" in line]
    seen = [turn["observation"] for rollout in rollouts for turn in rollout["turns"] if "observation" in turn]
    failed = [observation for observation in seen if not observation["ok"]]
    assert len(steps) == 4 and len(rollouts) == 4 * 24
    assert sum(line["tool_failures"] for line in steps) == len(failed) > 0 and len(failed) < len(seen)
    assert all("on fire" in observation["error"] for observation in failed)
    assert sum(line["status"].get("tool-error", 0) for line in steps) == len(failed)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["on_tool_error"] == then
