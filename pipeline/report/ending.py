"""The page as a run ends with it. The drawing libraries are loaded once it is written, and not before the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.language.say import say
from pipeline.recipe.recipe import Recipe


def write_if_possible(recipe: Recipe, typed: str, runs: Path, overrides: Sequence[str]) -> str:
    """The path of the page, or why there is none: a run that has succeeded does not fail by it."""
    from pipeline.report.page import write

    try:
        return str(write(recipe, typed, runs, overrides=overrides)[0])
    except (UserError, OSError) as error:
        return say("not written: {error}", error=error)
