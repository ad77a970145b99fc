"""README, CONTRIBUTING and docs/: their commands are understood, and their tables say what the program does.

`test_forking.py` takes `commands` and `understand` into a copy of the program that has its page's diffs.
"""

import argparse
import ast
import importlib
import re
import runpy
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from mmsr.config import RECIPES, Config, EvalConfig, parse

ROOT = Path(__file__).parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "bench/README.md",
    "examples/flags/README.md",
    *(f"docs/{p.name}" for p in sorted((ROOT / "docs").glob("*.md"))),
]
OURS, OTHERS = ("python", "torchrun", "pytest", "pip"), ("ruff", "mypy", "hf", "export", "srun")
COMMAND = re.compile(rf"(?:{'|'.join(OURS + OTHERS)})\b")
# What is not on every machine: a command with one of these says what it needs.
WANTING = re.compile(r"nproc|Qwen2|lmms-lab|--search live|--judge|fvqa|DIR|-m gpu")
# Programs that read no options, and one that begins with a package that may be missing.
ELSEWHERE = ["scripts/download.py", "search_r1/search/"]  # programs of another repository
UNREAD = ["recorded_answers", *ELSEWHERE, *(["against_trl"] if find_spec("trl") is None else [])]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The command lines of a page's indented blocks, and those in backticks, without what stands for something else."""
    text = re.sub(r" *\\\n *", " ", without_code(text))
    listed = re.findall(r"^    (.*)$", text, re.MULTILINE) + re.findall(r"`([^`]*)`", text.replace("\n", " "))
    single = [part for line in listed for part in line.split(" && ")]
    return [line for line in single if COMMAND.match(line) and " " in line and not re.search("[…]", line.split("#")[0])]


class Understood(Exception):
    """A program has read its command line."""


def understand(command: str) -> None:
    """Have the program that a command names read the rest of it. Raises what the program does where it cannot."""
    words = shlex.split(command, comments=True)
    if words[0] in ("pytest", "pip"):
        files = [word for word in words if re.search(r"\.(py|txt)$", word)]
        assert all((ROOT / word).is_file() for word in files)
        if "-k" in words:
            assert words[words.index("-k") + 1] in (ROOT / files[0]).read_text(encoding="utf-8")
        return
    place = next((i for i, word in enumerate(words) if word.endswith(".py") or word == "-m"), None)
    if words[:2] == ["python", "-c"]:
        compile(words[2], command, "exec")
        return
    if place is None:
        assert words[0] in OTHERS
        return
    module = words[place] == "-m"
    program, *argv = words[place + module :]
    if kind := {"train.py": Config, "eval.py": EvalConfig}.get(program):
        parse([word for word in argv if word != "--help"], kind, program)
        return
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Understood):
        patch.setattr(argparse.ArgumentParser, "parse_args", understood(argparse.ArgumentParser.parse_args))
        patch.setattr(sys, "argv", [program, *argv])
        patch.syspath_prepend(str(ROOT / "bench"))
        if module:
            package = find_spec(program).submodule_search_locations is not None
            importlib.import_module(f"{program}.__main__" if package else program).main(argv)
        runpy.run_path(program, run_name="__main__")


def understood(parse_args):
    def stop(parser, *given):
        parse_args(parser, *given)
        raise Understood

    return stop


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/forking.md"])
def test_a_command_is_not_understood_by_its_program(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    wrong = {}
    for command in commands(read(page)):
        if any(name in command for name in UNREAD):
            continue
        try:
            understand(command)
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            wrong[command] = repr(error)
    assert not wrong


@pytest.mark.parametrize("page", [page for page in PAGES if page != "bench/README.md"])  # its tables say so
def test_a_block_of_commands_wants_what_its_text_does_not_say(page):
    silent = []
    for before, block in re.findall(
        r"((?:^(?! {4}|```|\n).*\n)+)\n((?:^ {4}.*\n)+)", without_code(read(page)), re.MULTILINE
    ):
        if commands(block) and WANTING.search(block) and not re.search(r"\bneed", before + block):
            silent.append(block)
    assert not silent


def anchors(page: Path) -> set[str]:
    """What `#…` may name on a page, as GitHub makes it of headings: lower case, blanks as hyphens, no punctuation."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_a_page_links_to_what_is_not_there():
    for page in PAGES:
        for link, anchor in re.findall(r'(?:\]\(|src=")([^)#"]*)(?:#([^)"]+))?[)"]', read(page)):
            if link.startswith("https:"):
                continue
            target = (ROOT / page).parent.joinpath(link) if link else ROOT / page
            assert target.exists(), f"{page}: {link}"
            assert not anchor or anchor in anchors(target), f"{page}: {link}#{anchor}"


def test_the_recipes_of_the_files_page_are_not_those_of_the_program():
    found, named = (
        [parse(["--recipe", "toy"]), *(parse(["--recipe", r, "--model", "x"]) for r in list(RECIPES)[1:])],
        set(),
    )
    for options, *cells in re.findall(
        r"^\| (`--.*?) \|(.*?)\|(.*?)\|(.*?)\|(.*?)\|$", read("docs/files.md"), re.MULTILINE
    ):
        names = [name.replace("-", "_") for name in re.findall("`--(.*?)`", options)]
        named |= set(names)
        for config, cell in zip(found, cells, strict=True):
            for name, said in zip(names, cell.strip().split(", "), strict=True):
                value = getattr(config, name)
                assert float(said) == value if isinstance(value, float) else said == str(value), (config.recipe, name)
    assert named == {name for recipe in RECIPES.values() for name in recipe}


def test_the_readme_has_other_numbers_than_the_results_page():
    rows = re.findall(r"^\| .* \| [\d.]+ · .*\|$", read("README.md"), re.MULTILINE)
    assert len(rows) == 3 and all(row in read("docs/results.md") for row in rows)


def test_the_readme_installs_another_torch_than_the_requirements():
    (torch,) = re.findall(r"^torch==.*$", read("requirements.txt"), re.M)
    assert f"`pip install {torch} --index-url" in read("README.md")


# ---- the house


PACKAGE = ROOT / "mmsr"


def modules() -> dict[str, Path]:
    """The package's modules by what stands behind `mmsr.` where they are imported."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"]
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in files}


def imported(module: str) -> set[str]:
    """The modules of the package that one imports, wherever in its file."""
    known, found = modules(), set()
    for node in ast.walk(ast.parse(known[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mmsr":
            place = node.module.removeprefix("mmsr").removeprefix(".")
            inside = [f"{place}.{alias.name}".lstrip(".") for alias in node.names]
            found |= ({place} | set(inside)) & known.keys()
    return found


def floors() -> dict[str, int]:
    """Room of the architecture page's first table → its floor: "mmsr/search/", and modules that have their own."""
    rows = re.findall(r"^\| (\d+) \| (.*?) \|", read("docs/architecture.md"), re.M)
    return {room: int(number) for number, rooms in rows for room in re.findall("`(.*?)`", rooms)}


def room(module: str) -> str:
    own = f"mmsr/{module}.py"
    return own if own in floors() else "/".join(["mmsr", *module.split(".")[:-1], ""])


def listed() -> list[str]:
    """The modules of the architecture page's tables, in its order; those of the core's table come first."""
    found = []
    for heading, table in re.findall(
        r"^\| (.*?) \| responsibility \|\n((?:\|.*\n)+)", read("docs/architecture.md"), re.M
    ):
        room = heading.strip("`/") + "." if "/" in heading else ""
        names = re.findall(r"^\| `([\w/]+)\.py`", table, re.M)
        found += [room + name.replace("/", ".") for name in names]
    return found


def test_the_architecture_page_lacks_a_module():
    named = [module for module in listed() if module != "train"]
    assert sorted(named) == sorted(modules())


def test_a_module_imports_one_of_a_floor_above_or_beside_it():
    height, wrong = floors(), set()
    for module in modules():
        here = room(module)
        for other in imported(module):
            if room(other) != here and height[room(other)] >= height[here]:
                wrong.add((module, other))
    assert not wrong


def test_the_core_is_read_in_an_order_in_which_a_module_needs_what_comes_later():
    order = listed()[: listed().index("train")]
    forward = {(name, other) for place, name in enumerate(order) for other in imported(name) & set(order[place:])}
    assert not forward
    numbers = re.findall(r"^ +([\w/]+)\.py +(\d+) ", read("README.md"), re.M)
    assert [name.replace("/", ".") for name, _ in sorted(numbers, key=lambda pair: int(pair[1]))] == [*order, "train"]


def imports_at_the_top(file: Path) -> list[str]:
    """The modules that a file imports when it is imported, in this order."""
    found = []
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return [name for name in found if name.partition(".")[0] not in sys.stdlib_module_names]


def test_a_command_line_waits_for_torch():
    """`mmsr` comes first, as it sets what torch reads when it is imported; and a command line is read without torch."""
    for program in ("train.py", "eval.py", "search.py"):
        assert imports_at_the_top(ROOT / program)[0].startswith("mmsr"), program
    waiting, seen = ["config"], set()
    while waiting:
        module = waiting.pop()
        seen.add(module)
        imports = imports_at_the_top(modules()[module])
        assert all(name.startswith("mmsr.") for name in imports), module
        waiting += imported(module) - seen
    for program in ("train.py", "eval.py"):
        gate, *_, main = [node for node in ast.parse(read(program)).body if isinstance(node, ast.If)]
        assert ast.unparse(gate.test) == ast.unparse(main.test) and "check_command_line" in ast.unparse(gate)
        before = "\n".join(read(program).splitlines()[: gate.lineno])
        assert re.findall(r"^(?:import|from) (\S+)", before, re.M) == ["__future__", "sys", "mmsr.config"], program


def test_a_module_has_no_tests():
    tests = {".".join(file.relative_to(ROOT / "tests").parts) for file in (ROOT / "tests").rglob("test_*.py")}
    tested = {
        name for name in modules() if ".".join([*name.split(".")[:-1], f"test_{name.split('.')[-1]}.py"]) in tests
    }
    said = read("CONTRIBUTING.md").split("tested beside")[1].split("    pytest")[0]
    elsewhere = {name.removesuffix(".py").replace("/", ".") for name in re.findall(r"`([\w/]+?)`", said)}
    assert tested | elsewhere == modules().keys() and not tested & elsewhere


def test_a_fault_is_promised_by_a_test_that_is_not_there():
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    rows = [row for row in read("docs/faults.md").splitlines() if row.startswith("| ") and "| test |" not in row]
    assert len(rows) > 50
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split(" | ")[2])
        assert named and all(f"def {name}(" in tests for name in named), row
