"""Benchmarks that no GPU or peer is there for must still run when one is."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def output(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_row_of_the_gpu_benchmark_no_longer_runs():
    found = output("bench/run_gpu.py", "--device", "cpu", "--tiny")
    rows = [line.split(" | ") for line in found.split("\n\n")[-1].splitlines()[2:]]
    assert len(rows) == 11 and not any("not measured" in row[1] for row in rows)


@pytest.mark.slow
def test_generation_benchmark_compares_unequal_tokens():
    found = output("bench/generation.py", "--batches", "3x1,2x4", "--new-tokens", "12", "--side", "56")
    assert "3 of 3" in found and "8 of 8" in found


@pytest.mark.slow
def test_latency_benchmark_no_longer_runs():
    sizes = ["--questions", "2", "--group", "2", "--slots", "4", "--turn-tokens", "8", "--latency", "0.01"]
    assert "| ratio |" in output("bench/latency.py", *sizes)
