"""Reads plain values from a pickle of any origin.

A pickle is a program for a stack machine, and Python's machine has instructions that import and call anything. The one
here has none: it builds dictionaries, lists, tuples, strings, numbers and bytes. A Pillow object becomes an `Inert`,
which only keeps the state that was pickled; any other class or function is refused by name.

Python's own reader with all classes forbidden is not enough: it allocates as much as an instruction claims, hashes any
key (a deeply nested tuple crashes the process), and cannot be stopped. This reader never walks through a value: if each
value contains the next one twice, the value is small in memory, but printing it would never end.
"""

from __future__ import annotations

import mmap
import pickletools
from pathlib import Path
from typing import Any

from mmsr.system.errors import UserError

MOST_STEPS = 20_000_000  # limits the time (to a minute) and, with the size of the file, the memory
MOST_DEPTH = 64  # of unfinished containers

# Instructions that push their argument, and those that push a constant.
VALUES = set("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE".split())
VALUES |= set("BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split())
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
MOST_KEY = 1000  # characters: a look-up compares equal keys to their end
SMALL = range(1 << 16)  # numbers as keys: larger ones can be chosen so that all have the same hash


class Inert:
    """Replaces an object; `state` is what it was pickled with."""

    state: Any = None


class _Refused(Exception):
    """One line about a pickle that is valid, but contains more than plain values."""


def read_plain(path: Path | str) -> Any:
    """The value in a pickle file. UserError where it is damaged, too large or deep, or names a class or function. The
    value may be nested without limit: look only at the levels that you expect."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Machine().run(content)
    except _Refused as error:
        raise UserError(f"{path}: {error}; give a file of plain values") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    except Exception as error:  # a damaged instruction can raise anything
        why = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{path}: no pickle, or cut short or damaged ({why}); get it again") from None


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []  # the stack's heights at which the items of unfinished containers begin
        self.memo: dict[int, Any] = {}

    def run(self, content: Any) -> Any:
        """The value of a program; `content` is a mmap, bytes that can be read like a file."""
        for count, (opcode, value, _) in enumerate(pickletools.genops(content)):
            if opcode.name == "STOP":
                return self.stack.pop()
            if count == MOST_STEPS or len(self.marks) > MOST_DEPTH:
                raise _Refused(f"over {MOST_STEPS:,} instructions, or over {MOST_DEPTH} containers in each other")
            self.step(opcode.name, value)

    def step(self, name: str, value: Any) -> None:
        stack = self.stack
        match name:
            case _ if name in VALUES:
                stack.append(value)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "EMPTY_DICT" | "EMPTY_LIST":
                stack.append({} if name == "EMPTY_DICT" else [])
            case "DICT" | "LIST":  # protocol 0 makes them empty, and adds the items later
                if self.take(None):
                    raise ValueError("not as Python writes it")
                stack.append({} if name == "DICT" else [])
            case "MARK":
                self.marks.append(len(stack))
            case "SETITEM" | "SETITEMS":
                items = self.take(2 if name == "SETITEM" else None)
                dict.update(stack[-1], zip(map(_key, items[::2]), items[1::2], strict=True))
            case "APPEND" | "APPENDS":
                items = self.take(1 if name == "APPEND" else None)
                list.extend(stack[-1], items)
            case "TUPLE":
                stack.append(tuple(self.take(None)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take(int(name[-1]))))
            case "MEMOIZE" | "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if value is None else value] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                module, name_in_it = value.split(" ", 1) if value else self.take(2)
                stack.append(_class(module, name_in_it))
            case "NEWOBJ" | "REDUCE" if self.take(2)[0] is Inert:
                stack.append(Inert())
            case "BUILD" if isinstance(stack[-2], Inert):
                stack[-2].state = stack[-1]
                stack.pop()
            case _ if name not in ("PROTO", "FRAME"):
                raise _Refused(f"has an instruction beyond plain values ({name})")

    def take(self, count: int | None) -> list[Any]:
        """Remove and return the top `count` values of the stack; for None all values above the last mark."""
        if count is None:
            start = self.marks.pop()
        else:
            start = len(self.stack) - count
            if start < (self.marks[-1] if self.marks else 0):
                raise ValueError("nothing there to take")
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _class(module: Any, name: Any) -> type[Inert]:
    """The replacement of a class."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise _Refused("has a name that is not text")
    if not module.startswith("PIL."):
        raise _Refused(f"wants {module[:100]}.{name[:100]}")
    return Inert


def _key(value: Any) -> Any:
    """`value`, if look-ups of it are fast. The hashes of text and bytes are random in each process, so that a file
    cannot contain many keys with the same hash."""
    kind = type(value)
    if kind is int and value in SMALL or kind in (str, bytes) and len(value) <= MOST_KEY:
        return value
    raise _Refused(f"has a {kind.__name__} for a key, or a long one")
