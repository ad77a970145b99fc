"""The folder of a run: one process at a time writes in it, and a resumed run must have the inputs that it began with.

`OUT/inputs.json` records these inputs by their digests: the questions with their pictures, the model's files, the
prompts and recorded conversations; and the source files that decide what is computed. A changed input ends a resumed
run: one row less moves every later question, and another base model is another KL reference. A changed source file is a
warning, for a bug may have been fixed. So is a changed recording of searches that training replays, which may have
grown; an evaluation refuses that, since its numbers are averaged over both parts.

Whole files are hashed, and not a sample of them, in four threads: a second per gigabyte on two busy cores, so a quarter
of a minute for a model of 16 GB, which is then in the system's cache. The questions are read once more, one at a time.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic

from mmsr.assemble import Setup, prompts_folder
from mmsr.chat import PROMPTS
from mmsr.config import CONFIG, AnyOptions, Config, Options, in_use
from mmsr.episode import Example
from mmsr.system.errors import UserError
from mmsr.system.files import Lock, check_out, code_digest, file_digest, json_file, make_out, write_whole
from mmsr.system.parallel import Ranks

INPUTS = "inputs.json"
GIVEN, MAY_CHANGE = "given", "may change"
# All that the program reads of a model.
MODEL_FILES = ("config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json")
MOST_NAMED = 3  # changed things in one message

# Modules that do not affect what a run computes: they show it, save it, or belong to other programs.
ASIDE_ROOMS = ("report", "construct")
ASIDE = {
    *("config.py", "plan.py", "system/checkpoint.py", "system/files.py", "system/interrupt.py", "pretrained/save.py"),
    *("data/judge.py", "search/serve.py", "toy/base.py"),
}

Digests = dict[str, str]  # by what they are of, in the words of a message


class RunFolder(Generic[AnyOptions]):
    """Every rank has one and calls it; the main one alone locks, hashes, writes and prints. For a `with` statement."""

    def __init__(self, config: AnyOptions, ranks: Ranks):
        """Raises UserError where another process is at work in the folder, or where this is not the run in it."""
        self.config, self.folder, self.ranks = config, Path(config.out), ranks
        self.inputs: dict[str, Digests] = {}
        self.noted = False  # whether inputs.json is there
        if ranks.main:
            check_out(self.folder)
        begun = (self.folder / CONFIG).exists()
        self.lock = Lock(self.folder) if begun and ranks.main else None
        try:
            self.check_options(in_use(self.folder))
        except UserError:
            self.release()
            raise

    def check_options(self, used: bool) -> None:
        """Raises UserError where these options may not write in the folder. `used`: something is there already."""
        if used:
            self.config.check_resumes(self.folder)

    def __enter__(self) -> RunFolder[AnyOptions]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()

    def release(self) -> None:
        if self.lock:
            self.lock.release()

    def check_inputs(self, setup: Setup, data: Mapping[str, Sequence[Example]], program: str) -> None:
        """Work out the digests of the inputs, for `keep_inputs`. Raises UserError where an input has changed.

        `data`: questions by the option and name that gave them. `program`: the file of train.py or eval.py.
        """
        if not self.ranks.main:
            return
        recording = _recording(self.config)
        grows = recording if isinstance(self.config, Config) else {}
        self.inputs = {
            GIVEN: _given(setup, data) | (recording if not grows else {}),
            MAY_CHANGE: _sources(self.config, program) | grows,
        }
        if not (self.folder / CONFIG).exists():
            return
        before = self._noted()
        if before is None:
            missing = f"--out {self.folder} has no {INPUTS} of this version to compare with"
            print(f"warning: {missing}: data, model and prompts could not be checked", file=sys.stderr)
            return
        self.noted = True
        if changed := _changed(before[MAY_CHANGE], self.inputs[MAY_CHANGE]):
            print(f"warning: --out {self.folder}: {_said(changed)} since the run in it began", file=sys.stderr)
        if changed := _changed(before[GIVEN], self.inputs[GIVEN]):
            advice = "restore what it was, or name another folder"
            raise UserError(f"--out {self.folder}: {_said(changed)} since the run in it began; {advice}")

    def claim(self) -> None:
        """Make the folder and lock it. UserError where another process was first."""
        make_out(self.folder)
        if self.lock is None:
            self.lock = Lock(self.folder)
            if (self.folder / CONFIG).exists():
                raise UserError(f"--out {self.folder}: another run has begun in it meanwhile; name another folder")

    def keep_inputs(self) -> None:
        """Write inputs.json, unless it is there: it describes how the run began."""
        if self.inputs and not self.noted:
            write_whole(self.folder / INPUTS, [json.dumps(self.inputs, indent=2).encode() + b"\n"])

    def _noted(self) -> dict[str, Digests] | None:
        """What inputs.json says. None where there is none, or one of another version."""
        try:
            found = json_file(self.folder / INPUTS)
        except UserError:
            return None
        parts = [found.get(kind) for kind in (GIVEN, MAY_CHANGE)] if isinstance(found, dict) else [None]
        known = all(isinstance(part, dict) and all(isinstance(said, str) for said in part.values()) for part in parts)
        return found if known else None

    def check_there(self) -> None:
        """Raises UserError where the folder was removed or replaced under the run."""
        if self.lock:
            self.lock.check()


def _given(setup: Setup, data: Mapping[str, Sequence[Example]]) -> Digests:
    config = setup.config
    found = {name: _questions(examples) for name, examples in data.items()}
    if setup.world:
        settings = repr((setup.world.seed, setup.world.settings))
        found["the toy world"] = hashlib.sha256(settings.encode()).hexdigest()
    model = f"--model {config.model}" if config.model else "toy base model"
    files = {f"{model}/{file.name}": file for pattern in MODEL_FILES for file in setup.folder.glob(pattern)}
    for folder in (PROMPTS / "real", prompts_folder(config)):  # what a prompts folder lacks is the real set's
        files |= {f"--prompts {config.prompts}/{file.name}": file for file in folder.glob("*.txt")}
    if isinstance(config, Config):
        files |= {f"--demonstrations {name}": Path(name) for name in config.demonstrations}
    return found | _files(files)


def _recording(config: Options) -> Digests:
    """The file of a search engine that is one: a recording, an index."""
    kind, _, name = config.search.partition(":")
    return _files({f"--search {kind}:{name}": Path(name)}) if Path(name).is_file() else {}


def _sources(config: Options, program: str) -> Digests:
    files = {Path(program).name: Path(program)} | _tool_files(config.tools)
    return _own_sources() | {name: code_digest(file) for name, file in files.items()}


def _tool_files(tools: str) -> dict[str, Path]:
    """The module that --tools names, and of its package what else is loaded."""
    package = tools.partition(":")[0].partition(".")[0]
    if package in ("", "mmsr"):
        return {}
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}
    files = {name: getattr(module, "__file__", None) or "" for name, module in modules.items()}
    return {f"{name.replace('.', '/')}.py": Path(file) for name, file in files.items() if file.endswith(".py")}


@lru_cache  # they are what this process has loaded
def _own_sources() -> Digests:
    package = Path(__file__).parents[1]
    names = sorted(str(file.relative_to(package)) for file in package.rglob("*.py"))
    used = [name for name in names if name not in ASIDE and name.split("/")[0] not in ASIDE_ROOMS]
    return {f"mmsr/{name}": code_digest(package / name) for name in used}


def _files(files: Mapping[str, Path]) -> Digests:
    with ThreadPoolExecutor(4) as threads:
        return dict(zip(files, threads.map(file_digest, files.values())))


def _questions(examples: Sequence[Example]) -> str:
    """How many they are, and a digest of everything that a run sees of them, in order."""
    digest = hashlib.sha256()
    for example in examples:
        said = [example.id, example.question, example.answers, example.category, example.image_url]
        digest.update(json.dumps(said).encode() + b"\n" + hashlib.sha256(example.image).digest())
    return f"{len(examples)} questions, {digest.hexdigest()}"


def _changed(before: Digests, now: Digests) -> list[str]:
    """What changed, in words."""
    names = sorted(before.keys() | now.keys())
    return [f"{n} has changed{_how(before.get(n), now.get(n))}" for n in names if before.get(n) != now.get(n)]


def _how(before: str | None, now: str | None) -> str:
    """What else is known about a change: a file is new or gone, questions are fewer or more."""
    if before is None or now is None:
        return " (was not there)" if before is None else " (is gone)"
    old, new = (digest.rpartition(", ")[0] for digest in (before, now))
    return f" ({old}, now {new})" if old != new else ""


def _said(changed: Sequence[str]) -> str:
    more = len(changed) - MOST_NAMED
    return ", ".join(changed[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
