"""Reads a pickle of plain values, whoever made it.

A pickle is a program for a stack machine, and Python's own machine has instructions that import and call anything. This
one has none: it builds dictionaries, lists, tuples, strings, numbers and bytes. An object of Pillow's becomes an
`Inert`, which keeps the state that the object had and is nothing else; any other class or function is refused by name.

Python's reader with all classes forbidden would not do: it allocates what an instruction merely claims, hashes whatever
stands for a key, be it a tuple nested so deeply that the process dies, and cannot be told to stop. What is here never
walks a value: one that holds another twice, which holds another twice, and so on, is small and takes for ever to print.
"""

from __future__ import annotations

import mmap
import pickletools
from pathlib import Path
from typing import Any

from mmsr.system.errors import UserError

MOST_STEPS = 20_000_000  # bounds the time (a minute) and, with the size of the file, the memory
MOST_DEPTH = 64  # of containers under way

# Instructions that push the value written beside them, and those that push one of their own.
VALUES = set("INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE SHORT_BINUNICODE BINUNICODE".split())
VALUES |= set("BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8".split())
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
MOST_KEY = 1000  # characters: of equal keys each look-up compares all
SMALL = range(1 << 16)  # numbers that are keys: larger ones can be chosen so that all of them have the same hash


class Inert:
    """In place of an object: what it was pickled with, `state`."""

    state: Any = None


class _Refused(Exception):
    """One line about a pickle that is in order, but not plain."""


def read_plain(path: Path | str) -> Any:
    """The value in a pickle file. UserError where it is damaged, too large or deep, or names a class or function.

    What comes back may be nested beyond all measure: look at the levels that you know, and do not walk further.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _Machine().run(content)
    except _Refused as error:
        raise UserError(f"{path}: {error}; give a file of plain values") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give a readable file") from None
    except Exception as error:  # a wrong instruction shows in a dozen ways
        why = (str(error) or type(error).__name__).splitlines()[0][:100]
        raise UserError(f"{path}: no pickle, or cut short or damaged ({why}); get it again") from None


class _Machine:
    def __init__(self):
        self.stack: list[Any] = []
        self.marks: list[int] = []  # where on the stack the items of a container under way begin
        self.memo: dict[int, Any] = {}

    def run(self, content: Any) -> Any:  # a mmap: bytes that can be read like a file
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
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "DICT" | "LIST":  # of protocol 0, and always empty
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
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.take(int(name[5:]) if name[5:] else None)))
            case "MEMOIZE" | "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[len(self.memo) if value is None else value] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[value])
            case "GLOBAL" | "STACK_GLOBAL":
                module, kind = value.split(" ", 1) if value else self.take(2)
                if not isinstance(module, str) or not isinstance(kind, str):
                    raise _Refused("has a name that is no text")
                if not module.startswith("PIL."):
                    raise _Refused(f"wants {module[:100]}.{kind[:100]}")
                stack.append(Inert)
            case "NEWOBJ" | "REDUCE" if self.take(2)[0] is Inert:
                stack.append(Inert())
            case "BUILD" if isinstance(stack[-2], Inert):
                stack[-2].state = stack[-1]
                stack.pop()
            case _ if name not in ("PROTO", "FRAME"):
                raise _Refused(f"has an instruction beyond plain values ({name})")

    def take(self, count: int | None) -> list[Any]:
        """The uppermost `count` values, or those above the last mark."""
        floor = self.marks.pop() if count is None else self.marks[-1] if self.marks else 0
        start = floor if count is None else len(self.stack) - count
        if start < floor:
            raise ValueError("nothing there to take")
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _key(value: Any) -> Any:
    """`value` if it can be a key at little cost. Text and bytes can: no stranger knows the hash that they get here."""
    kind = type(value)
    if kind is int and value in SMALL or kind in (str, bytes) and len(value) <= MOST_KEY:
        return value
    raise _Refused(f"has a {kind.__name__} for a key, or a long one")
