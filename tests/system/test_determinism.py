"""Equal bits with several threads, on a machine that does other things meanwhile."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mmsr.system.determinism import deterministic

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def busy_programs(n: int):
    """`n` processes that use a core each."""
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


@contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def gradients_of_shared_rows(times: int) -> set[bytes]:
    """The distinct gradients of a few rows that thousands of tokens read, computed `times` times."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 128, generator=generator, requires_grad=True)
    read = torch.randint(16, (4000,), generator=generator)
    weights = torch.randn(4000, 128, generator=generator)
    found = set()
    for _ in range(times):
        rows.grad = None
        (rows[read] * weights).sum().backward()
        found.add(rows.grad.numpy().tobytes())
    return found


def test_a_gradient_depends_on_which_thread_comes_first():
    with threads(4), busy_programs(2):
        deterministic(True)
        assert len(gradients_of_shared_rows(30)) == 1
        deterministic(False)
        if len(gradients_of_shared_rows(30)) == 1:
            pytest.skip("torch adds in one order here by itself, so this machine can show nothing")


@pytest.mark.slow
def test_a_busy_machine_changes_the_bits_of_a_run(miniature, tmp_path):
    """`train.py` as a user starts it, with four threads whatever the cores: alone, and beside two programs."""
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    options = "--recipe toy --toy full --data toy --steps 2 --eval-size 2".split()

    def run(name: str) -> tuple[list[dict], bytes]:
        """The metrics and the weights."""
        out = tmp_path / name
        command = [sys.executable, "train.py", "--model", str(miniature), *options, "--out", str(out)]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        metrics = [{**json.loads(line), "seconds": None} for line in lines]
        return metrics, (out / "model" / "model.safetensors").read_bytes()

    alone = run("alone")
    assert sum(line["tokens"]["trained"] for line in alone[0] if "tokens" in line) > 0
    with busy_programs(2):
        busy = run("busy")
    assert busy == alone
