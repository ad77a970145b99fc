"""docs/forking.md: its diffs apply, its code runs with them, its commands are understood, its quotes are the files."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_docs import commands

ROOT = Path(__file__).parents[1]
SECTIONS = dict(part.split("\n", 1) for part in (ROOT / "docs/forking.md").read_text("utf-8").split("\n## ")[1:])
BLOCK = re.compile(r"^```(\w+) ?([^\n]*)\n(.*?\n)```$", re.MULTILINE | re.DOTALL)
UNDERSTAND = """
import sys
sys.path.insert(0, "tests")
from test_docs import understand
for command in sys.argv[1:]:
    understand(command)
"""


@pytest.fixture
def copy(tmp_path):
    """A copy of the program that may be changed."""
    for name in ("mmsr", "tests", "examples"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train.py", tmp_path)
    return tmp_path


def run(copy, *argv, **more):
    done = subprocess.run(argv, cwd=copy, capture_output=True, text=True, timeout=120, **more)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("section", SECTIONS)
def test_what_the_page_says_works_when_it_is_done(section, copy):
    blocks = BLOCK.findall(SECTIONS[section])
    assert blocks
    for kind, name, text in blocks:
        if kind == "diff":
            outside = {**os.environ, "GIT_CEILING_DIRECTORIES": str(copy.parent)}  # a repository around would be meant
            run(copy, "git", "apply", "-", input=text, env=outside)
        elif name:
            assert text == (ROOT / name).read_text("utf-8"), f"{name} is quoted otherwise than it stands"
        else:
            (copy / "block.py").write_text(text, "utf-8")
            run(copy, sys.executable, "block.py")
    run(copy, sys.executable, "-c", UNDERSTAND, *commands(SECTIONS[section]))


def test_diffs_are_small():
    added = {
        section: sum(line.startswith("+") and line[1:2] != "+" for line in text.splitlines())
        for section, text in SECTIONS.items()
    }
    assert max(added.values()) <= 45, added
    quoted = (ROOT / "mmsr" / "more_tools" / "crop.py").read_text("utf-8").split('"""', 2)[2]
    assert sum(bool(line.strip()) for line in quoted.splitlines()) <= 40
