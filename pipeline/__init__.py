"""OneBase: one frozen 4-bit base, one small adapter per stage, from a base model to an aligned assistant.

from pipeline import read, run

recipe = read("recipes/quickstart.yaml", "stages.dpo.train.beta=0.05")
run(recipe)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["read", "run"]

if TYPE_CHECKING:
    from pipeline.recipe.recipe import read
    from pipeline.runs.runner import run


def __getattr__(name: str) -> Any:
    # Late, so that `import pipeline` in a worker or a test does not pull in what it does not use.
    if name == "read":
        from pipeline.recipe.recipe import read

        return read
    if name == "run":
        from pipeline.runs.runner import run

        return run
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
