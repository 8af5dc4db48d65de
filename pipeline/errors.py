"""The one error a person is meant to read."""

from __future__ import annotations


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
