"""The house stays readable: what made it hard to read before does not come back."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORE = [ROOT / "train.py", *sorted((ROOT / "mmsr").glob("*.py"))]
CODE = [*CORE, *ROOT.glob("*.py"), *(ROOT / "mmsr").glob("*/*.py"), *(ROOT / "examples").rglob("*.py")]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
SCREEN = 40  # lines of a function, with its docstring
DENSITY = 9.5  # tokens a line on average; nanochat and nano-vllm have 8, this project had 11.4

# Words that made readers stop: archaic ones, and riddles for plain facts.
STOPS = r"anew|whoever|bears|hears of|obituary|somebody|begun|thereby|heed|lest|nought|in vain|is no news|none is"


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def nodes(kinds: tuple[type, ...]) -> list[tuple[Path, ast.AST]]:
    return [(file, node) for file in CODE for node in ast.walk(tree(file)) if isinstance(node, kinds)]


def place(file: Path, node: ast.AST) -> str:
    return f"{file.relative_to(ROOT)}:{node.lineno}"


def words(file: Path) -> list[tuple[int, str]]:
    """The comments and strings of a file, docstrings and messages, each with its line."""
    readline = io.StringIO(file.read_text(encoding="utf-8")).readline
    kinds = (tokenize.COMMENT, tokenize.STRING)
    return [(token.start[0], token.string) for token in tokenize.generate_tokens(readline) if token.type in kinds]


def test_a_comprehension_hides_in_another():
    hidden = set()
    for file, outer in nodes(COMPREHENSIONS):
        if any(inner is not outer and isinstance(inner, COMPREHENSIONS) for inner in ast.walk(outer)):
            hidden.add(place(file, outer))
    assert not hidden


def test_statements_are_joined_by_commas():
    joined = [place(file, node) for file, node in nodes((ast.Expr,)) if isinstance(node.value, ast.Tuple)]
    assert not joined


def test_a_function_does_not_fit_a_screen():
    functions = nodes((ast.FunctionDef, ast.AsyncFunctionDef))
    long = [place(file, node) for file, node in functions if node.end_lineno - node.lineno + 1 > SCREEN]
    assert not long


def test_the_lines_of_the_core_hold_more_than_a_reader_takes_in():
    tokens, rows = 0, 0
    for file in CORE:
        readline = io.StringIO(file.read_text(encoding="utf-8")).readline
        layout = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT, tokenize.ENDMARKER)
        found = [token for token in tokenize.generate_tokens(readline) if token.type not in layout]
        code = [token for token in found if not token.string.startswith('"""')]
        tokens += len(code)
        rows += len({token.start[0] for token in code})
    assert tokens / rows < DENSITY


@pytest.mark.parametrize("file", [*CODE, *(ROOT / "docs").glob("*.md"), ROOT / "README.md"], ids=lambda file: file.name)
def test_a_word_makes_a_reader_stop(file):
    page = re.sub(r"`test_\w+`", "", file.read_text(encoding="utf-8"))
    texts = words(file) if file.suffix == ".py" else [(0, page)]
    found = {(line, stop[0]) for line, text in texts for stop in re.finditer(rf"\b({STOPS})\b", text)}
    assert not found
