"""The folder of a run: one process at a time writes in it, and a resumed run must have the inputs that it began with.

`OUT/inputs.json` records these inputs by their digests: the questions with their pictures, the model's files, the
prompts and recorded conversations; and the source files that decide what is computed. A changed input ends a resumed
run: one row less moves every later question, and another base model is another KL reference. A changed source file is a
warning, for a bug may have been fixed. A changed recording of searches is a warning in training, where it may have
grown. An evaluation refuses it, since its numbers are averaged over both parts.

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

from mmsr.assemble import Setup
from mmsr.chat import PROMPTS, WORDING
from mmsr.config import CONFIG, AnyOptions, Config, in_use
from mmsr.episode import Example
from mmsr.pretrained.hub import resolve_adapter
from mmsr.setup.policy import prompts_folder
from mmsr.system.errors import UserError
from mmsr.system.files import Lock, check_out, code_digest, file_digest, json_file, make_out, write_whole
from mmsr.system.parallel import Ranks
from mmsr.system.progress import say

INPUTS = "inputs.json"
GIVEN = "given"  # the key in inputs.json of what must stay
MAY_CHANGE = "may change"  # and of what may change, with a warning
# All that the program reads of a model.
MODEL_FILES = ("config.json", "tokenizer.json", "*.safetensors", "model.safetensors.index.json")
LARGE = 10**9  # bytes of a model that take so long that they are announced
MOST_NAMED = 3  # changed things in one message

# Modules that do not affect what a run computes: they show it, save it, or belong to other programs.
ASIDE_ROOMS = ("report", "construct")
ASIDE = {
    *("config.py", "plan.py", "disk.py", "setup/checks.py", "pretrained/save.py"),
    *("setup/preflight.py", "setup/sizes.py", "pretrained/hub.py"),
    *("system/checkpoint.py", "system/files.py", "system/interrupt.py", "system/options.py"),
    *("system/progress.py", "system/number_types.py", "data/columns.py", "search/contents.py", "search/serve.py"),
    "toy/base.py",
}

Digests = dict[str, str]  # by what they are of, in the words of a message


class RunFolder(Generic[AnyOptions]):
    """Every rank has one and calls it; the main one alone locks, hashes, writes and prints. For a `with` statement."""

    def __init__(self, config: AnyOptions, ranks: Ranks):
        """Raises UserError where another process is at work in the folder, or where this is not the run in it."""
        self.config = config
        self.folder = Path(config.out)
        self.ranks = ranks
        self.inputs: dict[str, Digests] = {}
        self.noted = False  # whether inputs.json is there
        self.lock: Lock | None = None
        if ranks.main:
            check_out(self.folder)
            if (self.folder / CONFIG).exists():
                self.lock = Lock(self.folder)
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
        size = sum(file.stat().st_size for file in setup.folder.glob("*.safetensors"))
        if size > LARGE:
            say(f"Hashing the {size / 1e9:.0f} GB of the model, and the data, for {INPUTS}.")
        recording: Digests = {}
        for name in self.config.back_ends.values():
            recording |= _recording(name)
        given = _given(setup, data)
        may_change = _sources(program, self.config.tool_names)
        if isinstance(self.config, Config):
            may_change |= recording
        else:
            given |= recording
        self.inputs = {GIVEN: given, MAY_CHANGE: may_change}
        if (self.folder / CONFIG).exists():
            self._compare()

    def _compare(self) -> None:
        """Warn of what may change and did. Raises UserError where another input has changed."""
        before = self._inputs_before()
        if before is None:
            missing = f"--out {self.folder} has no {INPUTS} of this version to compare with"
            print(f"warning: {missing}: data, model and prompts could not be checked", file=sys.stderr)
            return
        self.noted = True
        changed = _changed(before[MAY_CHANGE], self.inputs[MAY_CHANGE])
        if changed:
            print(f"warning: --out {self.folder}: {_said(changed)} since the run in it began", file=sys.stderr)
        changed = _changed(before[GIVEN], self.inputs[GIVEN])
        if changed:
            advice = "restore what it was, or name another folder"
            raise UserError(f"--out {self.folder}: {_said(changed)} since the run in it began; {advice}")

    def claim(self) -> None:
        """Make the folder and lock it. UserError where another process was first."""
        make_out(self.folder)
        if self.lock is None:
            self.lock = Lock(self.folder)
            if (self.folder / CONFIG).exists():
                raise UserError(f"--out {self.folder}: another run has started in it meanwhile; name another folder")

    def keep_inputs(self) -> None:
        """Write inputs.json, unless it is there: it describes how the run began."""
        if self.inputs and not self.noted:
            write_whole(self.folder / INPUTS, [json.dumps(self.inputs, indent=2).encode() + b"\n"])

    def _inputs_before(self) -> dict[str, Digests] | None:
        """What inputs.json says. None where there is none, or one of another version."""
        try:
            found = json_file(self.folder / INPUTS)
        except UserError:
            return None
        if isinstance(found, dict) and _are_digests(found.get(GIVEN)) and _are_digests(found.get(MAY_CHANGE)):
            return found
        return None

    def check_there(self) -> None:
        """Raises UserError where the folder was removed or replaced under the run."""
        if self.lock:
            self.lock.check()


def _are_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(digest, str) for digest in value.values())


def _given(setup: Setup, data: Mapping[str, Sequence[Example]]) -> Digests:
    """Of the questions, the toy world, and the files of model, prompts and demonstrations."""
    config = setup.config
    found = {name: _questions(examples) for name, examples in data.items()}
    if setup.world:
        settings = repr((setup.world.seed, setup.world.settings))
        found["the toy world"] = hashlib.sha256(settings.encode()).hexdigest()
    if setup.chat.turn_start:
        found["how a turn begins, by --thinking and the model's chat template"] = setup.chat.turn_start
    files: dict[str, Path] = {}
    model = f"--model {config.model}" if config.model else "toy base model"
    for pattern in MODEL_FILES:
        for file in setup.folder.glob(pattern):
            files[f"{model}/{file.name}"] = file
    if config.adapter:
        for file in sorted(resolve_adapter(config.adapter).glob("adapter_*")):
            files[f"--adapter {config.adapter}/{file.name}"] = file
    for folder in (PROMPTS / WORDING[config.grammar], prompts_folder(config.prompts)):  # what the second lacks is there
        for file in [*folder.glob("*.txt"), *folder.glob("tools.json")]:
            files[f"--prompts {config.prompts}/{file.name}"] = file
    if isinstance(config, Config):
        for name in config.demonstrations:
            files[f"--demonstrations {name}"] = Path(name)
        if config.reward_judge:
            files["the judge's instructions"] = PROMPTS / "judge.txt"
    return found | _files(files)


def _recording(search: str) -> Digests:
    """The file of a search engine that is one: a recording, an index."""
    kind, _, name = search.partition(":")
    if not Path(name).is_file():
        return {}
    return _files({f"--search {kind}:{name}": Path(name)})


def _sources(program: str, tools: Sequence[str]) -> Digests:
    sources = dict(_own_sources())
    sources[Path(program).name] = code_digest(Path(program))
    for name, file in _tool_files(tools).items():
        sources[name] = code_digest(file)
    return sources


def _tool_files(tools: Sequence[str]) -> dict[str, Path]:
    """The modules of the user's that --tools names, and what else of their packages is loaded."""
    packages = {name.partition(":")[0].partition(".")[0] for name in tools if ":" in name} - {"mmsr"}
    files = {}
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None) or ""
        if name.split(".")[0] in packages and file.endswith(".py"):
            files[f"{name.replace('.', '/')}.py"] = Path(file)
    return files


@lru_cache  # they are what this process has loaded
def _own_sources() -> Digests:
    package = Path(__file__).parents[1]
    sources = {}
    for name in sorted(str(file.relative_to(package)) for file in package.rglob("*.py")):
        if name not in ASIDE and name.split("/")[0] not in ASIDE_ROOMS:
            sources[f"mmsr/{name}"] = code_digest(package / name)
    return sources


def _files(files: Mapping[str, Path]) -> Digests:
    with ThreadPoolExecutor(4) as threads:
        digests = threads.map(file_digest, files.values())
        return dict(zip(files, digests))


def _questions(examples: Sequence[Example]) -> str:
    """How many they are, and a digest of everything that a run sees of them, in order."""
    digest = hashlib.sha256()
    for example in examples:
        texts = [example.id, example.question, example.answers, example.category, example.image_url]
        picture = hashlib.sha256(example.image).digest()
        digest.update(json.dumps(texts).encode() + b"\n" + picture)
    return f"{len(examples)} questions, {digest.hexdigest()}"


def _changed(before: Digests, now: Digests) -> list[str]:
    """What changed, in words."""
    changed = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new:
            changed.append(f"{name} has changed{_how(old, new)}")
    return changed


def _how(before: str | None, now: str | None) -> str:
    """What else is known about a change: a file is new or gone, questions are fewer or more."""
    if before is None:
        return " (was not there)"
    if now is None:
        return " (is gone)"
    old = before.rpartition(", ")[0]  # "N questions" of what `_questions` gives, else empty
    new = now.rpartition(", ")[0]
    return f" ({old}, now {new})" if old != new else ""


def _said(changed: Sequence[str]) -> str:
    listed = ", ".join(changed[:MOST_NAMED])
    more = len(changed) - MOST_NAMED
    return f"{listed} and {more} more" if more > 0 else listed
