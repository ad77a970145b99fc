"""What a user can mend, told in one line."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend it. Entry points print it and exit with 2."""


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
