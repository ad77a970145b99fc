"""What a user can mend, in one line."""

from __future__ import annotations


class UserError(Exception):
    """A user's mistake: one line that says what, where and how to mend it. Entry points print it and exit with 2."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where there is no message."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
