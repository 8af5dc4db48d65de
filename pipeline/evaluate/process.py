"""Held-out questions to every policy and reward model of a run, one process for all, one loaded base.

    python -m pipeline.evaluate.process RECIPE [--runs DIR] [--votes DIR] [--judge URL MODEL] [--lm-eval TASKS]

Each measure of each stage is an artifact of its own, runs/<recipe>/evaluation/<measure>-<stage>.json, with a
fingerprint over all that it depends on: the adapters' bytes, the base, the held-out rows, the settings. What is fresh
is not computed again, and results.json holds the numbers made of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from pipeline.errors import BrokenInvariant, UserError
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.judge import Judge
from pipeline.language.say import speak
from pipeline.recipe.recipe import read
from pipeline.runs.environment import ERROR_MARK, EVERYWHERE, LANGUAGE, complete_own


def main() -> None:
    parser = argparse.ArgumentParser(prog="pipeline.evaluate.process", description=__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--runs", default="runs", type=Path)
    parser.add_argument("--votes", type=Path)
    parser.add_argument("--judge", nargs=2, metavar=("URL", "MODEL"))
    parser.add_argument("--lm-eval", nargs="+", default=[], metavar="TASK", dest="tasks")
    given = parser.parse_args()
    complete_own(EVERYWHERE)
    speak(os.environ.get(LANGUAGE, "en"))
    try:
        judge = Judge(*given.judge) if given.judge else None
        evaluate(read(given.recipe), given.runs, judge, given.tasks, given.votes)
    except (UserError, BrokenInvariant) as error:
        print(f"{ERROR_MARK}{error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
