"""A dataclass as a command line: an option per field, with the string below the field as its help.

A comment `# ---- GROUP` between the fields begins a group of the help.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import typing
from collections.abc import Container, Mapping
from functools import cache
from typing import Any, Literal

from mmsr.system.credentials import hidden


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line, and exits with status 2."""

    def error(self, message: str) -> typing.NoReturn:
        print(f"{self.prog}: {hidden(message)}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def add_options(
    parser: argparse.ArgumentParser, kind: type, names: Container[str], notes: Mapping[str, str] = {}
) -> None:
    """Give `parser` the fields of the dataclass `kind` that are named. What the command line lacks will be absent.

    `notes`, by field, are added to the help.
    """
    types = field_types(kind)
    docs = field_docs(kind)
    groups = field_groups(kind)
    shown: dict[str, argparse._ActionsContainer] = {"": parser}
    for field in dataclasses.fields(kind):
        name = field.name
        if name in names:
            group = groups[name]
            if group not in shown:
                shown[group] = parser.add_argument_group(group)
            text = docs.get(name, "") + notes.get(name, "")
            _add_option(shown[group], kebab(name), types[name], text)


def _add_option(group: argparse._ActionsContainer, name: str, kind: Any, text: str) -> None:
    """`kind`: the type of the values: a literal, a tuple of strings, a bool, or what is called with the text."""
    how: dict[str, Any] = {}
    if typing.get_origin(kind) is Literal:
        how["choices"] = [choice for choice in typing.get_args(kind) if choice]
    elif typing.get_origin(kind) is tuple:
        how["nargs"] = "+"
        how["metavar"] = name.upper()
    elif kind is bool:
        how["action"] = argparse.BooleanOptionalAction
    else:
        how["type"] = kind
        how["metavar"] = kind.__name__.upper()
    group.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def default_notes(kind: type, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For the help: what each field of `kind` is where it is not given.

    `defaults`: by the name of a recipe, what it sets. Where recipes differ, each is named with its value.
    """
    notes = {}
    for field in dataclasses.fields(kind):
        recipes_by_value: dict[str, list[str]] = {}
        for recipe, values in defaults.items():
            text = _shown(values.get(field.name, field.default))
            recipes_by_value.setdefault(text, []).append(recipe)
        if len(recipes_by_value) > 1:
            by_recipe = [f"{'/'.join(recipes)}: {text}" for text, recipes in recipes_by_value.items()]
            notes[field.name] = f" ({', '.join(by_recipe)})"
        elif field.name != "recipe":  # its text says on what it depends
            notes[field.name] = f" (default: {', '.join(recipes_by_value)})"
    return notes


def _shown(value: Any) -> str:
    """A default as the help writes it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        value = " ".join(value)
    return str(value) or '""'


@cache
def field_types(kind: type) -> dict[str, Any]:
    """The type of each field of a dataclass and of its bases."""
    return typing.get_type_hints(kind)


@cache
def field_docs(kind: type) -> dict[str, str]:
    """The string below each field in the source of a dataclass and of its bases."""
    docs: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):  # without `object`; the most derived last: its text of a field counts
        (definition,) = ast.parse(inspect.getsource(base)).body
        statements = definition.body  # type: ignore[attr-defined]
        for field, text in zip(statements, statements[1:]):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            if is_field and is_text:
                docs[field.target.id] = text.value.value.strip()
    return docs


# A comment that begins a group of the help, and a field.
GROUP = re.compile(r"    # ---- (.+)")
FIELD = re.compile(r"    (\w+): ")


@cache
def field_groups(kind: type) -> dict[str, str]:
    """The group of each field of a dataclass and of its bases: the last such comment above it, or ""."""
    groups: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        group = ""
        for line in inspect.getsource(base).splitlines():
            if heading := GROUP.fullmatch(line):
                group = heading[1]
            elif field := FIELD.match(line):
                groups[field[1]] = group
    return groups


def kebab(name: str) -> str:
    """A field's name as an option has it."""
    return name.replace("_", "-")
