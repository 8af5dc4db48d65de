"""The one error a person is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class UserError(Exception):
    """Something in a recipe, a data file or a run folder that the person at the keyboard can fix.

    The message names the place (file and line, or dotted key), what is wrong, and the fix. The command line prints it
    without a traceback and exits with status 2.
    """


class Interrupted(Exception):
    """A stage was asked to stop (Ctrl-C, SIGTERM) and has left a checkpoint to go on from."""


class BrokenInvariant(Exception):
    """A hand-over is not what it must be; the stage stops before it trains on it."""

    def __init__(self, expected: str, found: str, cause: str) -> None:
        super().__init__(f"expected {expected}\n   found {found}\n  likely {cause}")


def complaint(message: str, *place: str) -> ValidationError:
    """What a check of a recipe raises: what is wrong, and where below the section that pydantic is validating;
    pipeline/recipe/sections.py turns the whole place into file, line and dotted key."""
    from pydantic_core import InitErrorDetails, PydanticCustomError, ValidationError

    error = PydanticCustomError("complaint", "{message}", {"message": message})
    return ValidationError.from_exception_data("recipe", [InitErrorDetails(type=error, loc=place, input=None)])


def suggest(word: str, known: Iterable[str]) -> str:
    """What a misspelt word was meant to be, or what there is if that is little."""
    known = [str(one) for one in known]
    close = difflib.get_close_matches(str(word), known, 1)
    return f"; did you mean '{close[0]}'?" if close else f" (there is: {', '.join(known)})" if len(known) < 12 else ""
