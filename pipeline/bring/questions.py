"""Questions put to the person at the keyboard, each with a default; a bad answer is asked again."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import UserError

T = TypeVar("T")


def settle(given: str, question: str, default: str, option: str, asking: bool, read: Callable[[str], T]) -> T:
    """The value of an option: as it was given, else the default, or the answer to the question where it is asked.

    `read` makes the value of a text, or raises UserError. Raises UserError for a bad option, or without any answer.
    """
    if given or not asking:
        if not given and not default:
            raise UserError(f"{option} is missing: {question}")
        return read(given or default)
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip() or default
        except EOFError:
            raise UserError(
                f"no answer to '{question}'. Give it as {option}, or take the defaults with --yes"
            ) from None
        try:
            if answer:
                return read(answer)
        except UserError as error:
            print(f"  {error}")
