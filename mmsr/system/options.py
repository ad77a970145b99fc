"""A dataclass as a command line: an option per field, with the string below the field as its help."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import typing
from collections.abc import Container, Mapping
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
    types = typing.get_type_hints(kind)
    docs = field_docs(kind)
    for field in dataclasses.fields(kind):
        name = field.name
        if name in names:
            text = docs.get(name, "") + notes.get(name, "")
            _add_option(parser, kebab(name), types[name], text)


def _add_option(parser: argparse.ArgumentParser, name: str, kind: Any, text: str) -> None:
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
    parser.add_argument(f"--{name}", default=argparse.SUPPRESS, help=text.replace("%", "%%"), **how)


def default_notes(kind: type, defaults: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """For the help: what each field of `kind` is where it is not given, unless it is off or empty.

    `defaults`: by the name of a recipe, what it sets. Where recipes differ, each is named with its value.
    """
    notes = {}
    for field in dataclasses.fields(kind):
        recipes_by_value: dict[str, list[str]] = {}
        for recipe, values in defaults.items():
            value = values.get(field.name, field.default)
            text = " ".join(value) if isinstance(value, tuple) else str(value)
            recipes_by_value.setdefault(text, []).append(recipe)
        if len(recipes_by_value) > 1:
            by_recipe = []
            for text, recipes in recipes_by_value.items():
                by_recipe.append(f"{'/'.join(recipes)}: {text or 'none'}")
            notes[field.name] = f" ({', '.join(by_recipe)})"
        elif field.name != "recipe" and not recipes_by_value.keys() & {"", "False", "None"}:
            notes[field.name] = f" ({', '.join(recipes_by_value)})"
    return notes


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


def kebab(name: str) -> str:
    """A field's name as an option has it."""
    return name.replace("_", "-")
